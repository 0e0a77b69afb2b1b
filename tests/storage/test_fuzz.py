"""Damaged directories give the right model or a StorageError: a few draws of `tests.benchmarks.fuzz`."""

import sys
from pathlib import Path

import pytest

from tests.storage.fuzz_cases import plain_cases, timm_cases
from tests.storage.judging import CRASH, OTHER, OURS, OUTSIDE, RIGHT, THEIRS, Workshop
from tests.storage.mutations import CRAFTED, MUTATIONS

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs pipes and alarms")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Workshop]:
    return {name: Workshop(case, tmp_path_factory.mktemp("case")) for name, case in plain_cases().items()}


@pytest.mark.parametrize("kind", MUTATIONS)
def test_damaged_modules(plain, kind):
    verdicts = [shop.judge(kind, "bp.load", f"{name}/{n}", seconds=10) for name, shop in plain.items() for n in (0, 1)]
    accepted = {OURS, OTHER} if kind in CRAFTED else {OURS, RIGHT}
    assert {verdict for verdict, *_ in verdicts} <= accepted, verdicts


def test_damaged_timm_models(tmp_path):
    pytest.importorskip("timm")
    for name, case in timm_cases().items():
        shop = Workshop(case, tmp_path / name)
        for kind in MUTATIONS:
            verdict = shop.judge(kind, "timm.create_model", kind, seconds=10)
            assert verdict[0] in {OURS, RIGHT, THEIRS, OTHER}, (kind, verdict)


def test_judge_tells_failures(plain, monkeypatch):
    """A load that gave another model, one that read another directory, and one that failed otherwise, would be seen."""
    shop = plain["plain module"]
    load = shop.case.routes["bp.load"]

    def quietly_other(directory: Path):
        model = load(directory)
        model[0].weight.data.neg_()
        return model

    def elsewhere(directory: Path):
        return load(shop.other)

    def asking(directory: Path):
        return load(directory) if input("may its code be run?") == "y" else None

    def failing(directory: Path):
        raise KeyError(directory)

    monkeypatch.setitem(shop.case.routes, "bp.load", quietly_other)
    assert shop.judge("extra file, pickle, code", "bp.load", "0", seconds=10)[0] == "silent wrong load"
    for leading_out in (elsewhere, asking):
        monkeypatch.setitem(shop.case.routes, "bp.load", leading_out)
        assert shop.judge("extra file, pickle, code", "bp.load", "0", seconds=10)[0] == OUTSIDE
    monkeypatch.setitem(shop.case.routes, "bp.load", failing)
    assert shop.judge("truncated file", "bp.load", "0", seconds=10)[0] == CRASH
