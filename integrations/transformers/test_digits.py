"""The card's program does what the card says, in a few epochs."""

import pytest

from bayesprune.app.data.images import load_data

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from integrations.transformers.digits import run


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_transformers_trainer_halves_the_macs_and_reloads_exactly(tmp_path):
    result = run(tmp_path / "out", num_epochs=3, data=load_data("digits", image_size=8))
    assert result["MACs kept"] <= 0.51
    assert result["difference after loading"] == 0.0
    assert result["accuracy after"] > 0.8  # chance is 0.1
