"""The card's program does what the card says, with a small model and in a few epochs."""

import pytest

from bayesprune.app.data.images import load_data

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from integrations.timm.digits import run


def test_timm_loop_halves_the_macs_and_reloads_exactly(tmp_path):
    result = run(tmp_path / "out", name="test_resnet", num_epochs=2, data=load_data("digits", image_size=16))
    assert result["MACs kept"] <= 0.5
    assert result["difference after loading"] == 0.0
    assert result["accuracy after"] > 0.8  # chance is 0.1
