"""Latency as the target of a cut: what is timed, and how the times of cut models correct the prediction."""

import copy

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.errors import InfeasibleTargetError
from bayesprune.foundation.latency import seconds_by_module
from bayesprune.prune.channels import budget as budgets
from bayesprune.prune.channels.budget import LatencyBudget


class Clock:
    """Times of cut models by a formula of their numbers of parameters, in place of the real clock."""

    def __init__(self, share_of) -> None:
        self.share_of, self.num_timed = share_of, 0

    def __call__(self, models, example_inputs, *, num_repeats):
        self.num_timed += 1
        dense, cut = (sum(p.numel() for p in model.parameters()) for model in models)
        return [[1.0] * num_repeats, [self.share_of(cut / dense)] * num_repeats]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def cut(clock, monkeypatch, target, **options):
    monkeypatch.setattr(budgets, "seconds_in_turn", clock)
    model = bp.to_variational(net(), std="per_channel")
    return model, bp.prune_channels(model, torch.randn(8, 16), target, **options)


@pytest.mark.parametrize("overhead", [0.0, 0.2, 0.4])
def test_a_cut_is_corrected_until_the_whole_model_has_the_time_that_was_asked_for(overhead, monkeypatch):
    clock = Clock(lambda kept: overhead + (1 - overhead) * kept)
    model, report = cut(clock, monkeypatch, "latency=0.6")
    sizes = [sum(p.numel() for p in m.parameters()) for m in (bp.to_deterministic(model), net())]
    assert report.latency == pytest.approx(clock.share_of(sizes[0] / sizes[1]), rel=0.02)
    assert 0.96 * 0.6 <= report.achieved["latency"] <= 1.01 * 0.6
    assert clock.num_timed <= 6
    assert "target latency=0.6, " in str(report)


def test_what_no_cut_reaches_is_refused_and_nothing_changed(monkeypatch):
    before = net().state_dict()
    model = bp.to_variational(net(), std="per_channel")
    monkeypatch.setattr(budgets, "seconds_in_turn", Clock(lambda kept: 0.9 + 0.1 * kept))
    with pytest.raises(InfeasibleTargetError, match="latency"):
        bp.prune_channels(model, torch.randn(8, 16), "latency=0.5")
    now = bp.to_deterministic(model).state_dict()
    assert all(torch.equal(before[name], now[name]) for name in before)


def test_steps_of_a_clock_end_with_the_slowest_cut_that_is_fast_enough(monkeypatch):
    clock = Clock(lambda kept: 0.45 if kept < 0.55 else 0.8)  # nothing in between
    _, report = cut(clock, monkeypatch, "latency=0.6")
    assert report.latency == 0.45
    assert clock.num_timed <= 6


def test_calibration_data_divides_a_latency_too(monkeypatch):
    clock = Clock(lambda kept: 0.1 + 0.9 * kept)
    _, report = cut(clock, monkeypatch, "latency=0.7", data=[torch.randn(32, 16) for _ in range(2)])
    assert report.how.startswith("channels ranked by UnitSNRImportance; the budget divided by trial")
    assert report.latency == pytest.approx(0.7, rel=0.04)


def test_a_dry_run_leaves_the_model_and_says_what_it_measured(monkeypatch):
    model, report = cut(Clock(lambda kept: kept), monkeypatch, "latency=0.6", dry_run=True)
    assert report.latency is not None
    assert model.get_submodule("0").out_features == 64


def test_a_module_is_timed_without_its_children():
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(512, 512)

        def forward(self, x):
            return self.inner(x)

    model = nn.Sequential(Slow(), nn.Linear(512, 8))
    seconds = seconds_by_module(model, torch.randn(256, 512))
    assert seconds.keys() == {"", "0", "0.inner", "1"}
    assert seconds["0.inner"] > 2 * seconds["0"]
    assert all(module._forward_hooks == {} for module in model.modules())


def test_the_budget_keeps_the_dense_model_apart():
    model = net()
    budget = LatencyBudget(model, torch.randn(8, 16), 0.5)
    reference = copy.deepcopy(budget.dense.state_dict())
    with torch.no_grad():
        model.get_parameter("0.weight").zero_()
    assert all(torch.equal(value, reference[name]) for name, value in budget.dense.state_dict().items())
