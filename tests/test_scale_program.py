"""The program that measures pruning at scale measures stages inside each other, and runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


def test_a_stage_has_the_peak_of_what_runs_inside_it_and_not_of_what_ran_before(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import scale

    now, highest = 100, 100

    def hold(size: int) -> None:
        nonlocal now, highest
        now, highest = size, max(highest, size)

    def reset() -> None:
        nonlocal highest
        highest = now

    monkeypatch.setattr(scale, "memory", lambda key: now if key == "VmRSS" else highest)
    monkeypatch.setattr(scale, "reset_peak", reset)
    stages = scale.Stages()

    def outer() -> str:
        hold(300)
        hold(200)
        stages.run("inner", lambda: (hold(900), hold(250)))
        stages.run("later", lambda: hold(400))
        return "done"

    assert stages.run("outer", outer) == "done"
    stages.run("after", lambda: hold(50))
    found = {row["name"]: (row["held"], row["peak"]) for row in stages.rows}
    assert found == {"outer": (100, 900), "inner": (200, 900), "later": (250, 400), "after": (400, 400)}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")
def test_the_program_runs(tmp_path):
    """Every chain of stages, and the imports; a page from the results alone."""
    command = [sys.executable, str(BENCHMARKS / "scale.py"), "--quick", "--out", str(tmp_path / "scale.json")]
    for options in ([], ["--table"]):
        subprocess.run([*command, *options], check=True, cwd=BENCHMARKS.parents[1])
    runs = {run["chain"]: run for run in json.loads((tmp_path / "scale.json").read_text())["runs"]}
    names = [row["name"] for chain in ("files", "posterior", "compensation", "data") for row in runs[chain]["stages"]]
    for stage in ("convert", "save", "load", "fit_kronecker", "unit scores", "compensate", "prune_channels, data"):
        assert stage in names
    assert runs["imports"]["seconds"]["bayesprune"][0] > runs["imports"]["seconds"]["torch"][0] / 2
    page = (tmp_path / "scale.md").read_text()
    assert "| fit_kronecker |" in page
    assert "## Import" in page
