"""How many units leave which group: the cost follows one group at a time, and is the same as counted from the start."""

import itertools

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.prune.channels import plan
from bayesprune.prune.graph.find import groups_in
from bayesprune.prune.graph.observe import Observed


@pytest.fixture
def costs() -> plan.CostModel:
    torch.manual_seed(0)
    sizes = [6, *range(8, 20), 3]
    layers = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    model = bp.to_variational(nn.Sequential(*layers[:-1]).eval())
    observed = Observed(model, torch.randn(1, 6))
    return plan.cost_model(model, groups_in(observed).groups, observed.macs)


def counted(monkeypatch) -> list[int]:
    """A list that grows with every cost that is counted from the start."""
    calls, parts = [], plan.CostModel.parts

    def counting(self, *args):
        calls.append(1)
        return parts(self, *args)

    monkeypatch.setattr(plan.CostModel, "parts", counting)
    return calls


@pytest.mark.parametrize("what", ["macs", "params"])
def test_what_a_unit_saves_is_counted_once_for_all_groups(costs, what, monkeypatch):
    number = len(costs.groups)
    dense = costs.cost(what, [0] * number)
    expected = [dense - costs.cost(what, [int(other == group) for other in range(number)]) for group in range(number)]
    calls = counted(monkeypatch)
    assert costs.saved(what) == expected
    assert len(calls) == 1


@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
def test_room_in_the_budget_is_given_back_without_counting_anew_for_each_group(costs, what, fraction, monkeypatch):
    """As many levels as the budget asks for leave; then each group takes back what fits, the last to leave first."""
    number = len(costs.groups)
    generator = torch.Generator().manual_seed(1)
    scores = [torch.rand(len(group.units), generator=generator).tolist() for group in costs.groups]
    order = plan.order(costs.groups, scores, uniform=False, round_to=1)
    budget = fraction * costs.cost(what, [0] * number)
    level = next(n for n in range(len(order.levels) + 1) if costs.cost(what, order.totals(number, n)) <= budget)
    expected, full = order.totals(number, level), set()
    for group in order.groups[: order.levels[level - 1]].flip(0).tolist():
        fewer = [count - (other == group) for other, count in enumerate(expected)]
        if group in full or costs.cost(what, fewer) > budget:
            full.add(group)
        else:
            expected = fewer
    calls = counted(monkeypatch)
    assert plan.smallest_counts(costs, order, what, budget, gives_back=True) == expected
    assert len(calls) <= len(order.levels).bit_length() + 2
