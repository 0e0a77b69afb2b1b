"""The program behind the speed tables measures what it says, and runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parent / "benchmarks"


def test_memory_is_that_of_a_known_case(monkeypatch):
    """Static: parameters and Adam's two averages. On top: activations, then gradients, never all at once."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import speed_measure
    import speed_ways

    def allocations():
        first = torch.empty(600_000, dtype=torch.uint8)
        second = torch.empty(300_000, dtype=torch.uint8)
        del first
        return second, torch.empty(500_000, dtype=torch.uint8)

    assert speed_measure.peak_of(allocations) == 900_000
    assert speed_measure.size_of({"a": [torch.zeros(10), (view := torch.zeros(5, 2)), view.T]}) == 80
    network = nn.Linear(256, 1024, bias=False)
    x = torch.randn(1, 256)
    way = speed_ways.deterministic(speed_ways.Task(network, x, torch.tensor([3])))
    speed_measure.step(way)
    measured = speed_measure.memory(way)
    assert measured["static_mib"] == pytest.approx(3, abs=1e-3)  # beside the counter of steps
    assert measured["step_mib"] == pytest.approx(1, abs=0.05)  # the gradient; the activations are 4 KiB each


@pytest.mark.slow
def test_the_program_runs(tmp_path):
    """With every estimator and structure, a page and a plot."""
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(BENCHMARKS / "speed.py"), "--quick", "--out", str(tmp_path / "speed.json")]
    for options in ([], ["--table"]):
        subprocess.run([*command, *options], check=True, cwd=BENCHMARKS.parents[1])
    (run,) = json.loads((tmp_path / "speed.json").read_text())["runs"]
    names = {row["name"] for row in run["rows"]}
    assert {"deterministic", "per_weight, weight_sampling", "rank_one, local_reparameterization"} <= names
    assert not [name for name in run["failures"] if "_" in name], "rows of this library do not fail"
    assert "| per_channel, moments |" in (tmp_path / "speed.md").read_text()
    assert (tmp_path / "speed.png").stat().st_size > 10_000
