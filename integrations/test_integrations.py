"""The programs of the cards do what the cards say, in a few epochs."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from bayesprune.app.data.images import load_data

pytest.importorskip("timm")
pytest.importorskip("sklearn")


def program(name: str) -> ModuleType:
    path = Path(__file__).parent / name / "digits.py"
    spec = importlib.util.spec_from_file_location(f"integrations_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_timm_loop_halves_the_macs_and_reloads_exactly(tmp_path):
    result = program("timm").run(tmp_path / "out", num_epochs=2, data=load_data("digits", image_size=16))
    assert result["MACs kept"] <= 0.5
    assert result["difference after loading"] == 0.0
    assert result["accuracy after"] > 0.8  # chance is 0.1


def test_torch_pruning_script_keeps_training_after_the_cut():
    result = program("torch_pruning").run(num_epochs=2, data=load_data("digits", image_size=16))
    assert result["parameters kept"] < 0.8
    assert result["accuracy"] > 0.8  # chance is 0.1


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_transformers_trainer_halves_the_macs_and_reloads_exactly(tmp_path):
    pytest.importorskip("transformers")
    result = program("transformers").run(tmp_path / "out", num_epochs=3, data=load_data("digits", image_size=8))
    assert result["MACs kept"] <= 0.51
    assert result["difference after loading"] == 0.0
    assert result["accuracy after"] > 0.8  # chance is 0.1
