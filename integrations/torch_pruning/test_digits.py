"""The card's program does what the card says, with a small model and small images."""

import pytest

from bayesprune.app.data.images import load_data

pytest.importorskip("timm")
pytest.importorskip("sklearn")

from integrations.torch_pruning.digits import run


def test_torch_pruning_script_keeps_training_after_the_cut():
    result = run(name="test_resnet", num_epochs=4, data=load_data("digits", image_size=8))
    assert result["parameters kept"] < 0.8
    assert result["accuracy"] > 0.8  # chance is 0.1
