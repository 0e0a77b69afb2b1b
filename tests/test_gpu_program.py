"""The program that measures on a GPU runs on a processor, too, and says what it needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent / "benchmarks"
PROGRAM = [sys.executable, str(BENCHMARKS / "gpu.py")]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def options(**others):
    from argparse import Namespace

    return Namespace(**{"device": "cuda", "quick": False} | others)


def test_without_a_gpu_it_says_so_in_a_sentence(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds none here: run it where there is one"):
        gpu.checked_device(options())
    with pytest.raises(SystemExit, match="give it --quick"):
        gpu.checked_device(options(device="cpu"))
    assert gpu.checked_device(options(device="cpu", quick=True)).type == "cpu"


def test_forward_and_loss_run_in_bf16(gpu):
    """And all rows that it names are there."""
    device = torch.device("cpu")
    ways = gpu.ways_of(gpu.task_of(gpu.QUICK, gpu.Settings(), device, compiled=False), device)
    assert [way.name for way in ways][:4] == [
        "deterministic",
        "per_weight, weight_sampling",
        "per_channel, weight_sampling",
        "deterministic, once more",
    ]
    dtypes = set()
    for way in ways[:4]:
        way.prepare()
        way.model.train()
        handle = way.model.register_forward_hook(lambda _, args, output: dtypes.add(output.dtype))
        way.loss().backward()
        handle.remove()
    assert dtypes == {torch.bfloat16}


def test_the_page_says_that_nothing_was_measured(gpu):
    assert "No GPU has been measured." in gpu.page([], {})
    assert "between CUDA events" in gpu.page([], {})


@pytest.mark.slow
def test_the_program_runs(tmp_path):
    """Eager and compiled; a second start finds everything measured."""
    command = [*PROGRAM, "--device", "cpu", "--quick", "--out", str(tmp_path / "gpu.json")]
    for _ in range(2):
        subprocess.run(command, check=True, cwd=BENCHMARKS.parents[1])
    eager, compiled = json.loads((tmp_path / "gpu.json").read_text())["runs"]
    for run in (eager, compiled):
        names = {row["name"] for row in run["rows"]}
        assert {"deterministic", "per_weight, weight_sampling", "per_channel, weight_sampling"} <= names
        assert not [name for name in run["failures"] if "_" in name], "rows of this library do not fail"
        assert all(row["memory"]["step_mib"] > 0 for row in run["rows"])
    assert "## quick, compiled" in (tmp_path / "gpu.md").read_text()
