"""The control of the SST-2 benchmark that takes its division from another cut."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from torch import nn

import bayesprune as bp

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_a_control_removes_as_many_of_each_group_and_its_own_lowest():
    pytest.importorskip("transformers")
    from sst2_at_once import Divided

    torch.manual_seed(0)
    sizes = (6, 16, 12, 3)
    layers = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    model = bp.to_variational(nn.Sequential(*layers[:-1]))
    x = torch.randn(64, 6)
    magnitude = tp.importance.MagnitudeImportance()
    control = copy.deepcopy(model)
    report = bp.prune_channels(copy.deepcopy(model), x[:1], "macs=0.5", data=[x])
    own = bp.prune_channels(copy.deepcopy(model), x[:1], "macs=0.5", importance=magnitude)
    assert [row.kept for row in own.rows] != [row.kept for row in report.rows]
    found = bp.prune_channels(control, x[:1], "macs=0.5", importance=Divided(magnitude, report), dry_run=True)
    assert [row.kept for row in found.rows] == [row.kept for row in report.rows]
    for row, other in zip(found.rows, own.rows, strict=True):
        both = set(found.removed.get(row.layer, ())), set(own.removed.get(other.layer, ()))
        assert both[0] <= both[1] or both[1] <= both[0]
