"""The budget divided between layers by measured losses."""

import copy
import itertools

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.prune.measured import MeasuredImportance, layer_shares, slopes
from bayesprune.prune.scores.weights import magnitude


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()


def test_slopes_are_those_of_the_lower_hull():
    found = slopes([2, 4, 6], [2.0, 3.0, 9.0], 8)
    assert found.tolist() == [0.75] * 4 + [3.0] * 2 + [30.0] * 2
    assert slopes([1], [-1.0], 3).tolist()[0] == -1.0


def test_sparsities_are_the_best_division_among_all():
    model = bp.to_variational(net())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    tables = {p: torch.rand(4, generator=generator).sort().values for p in ("0.weight", "2.weight", "4.weight")}

    def loss(cut):
        """A convex cost of the zeros of each layer, so that the best division is known."""
        total = 0.0
        for name, table in tables.items():
            gone = float((cut.get_parameter(name) == 0).double().mean()) * 4
            total += (
                sum(float(t) * min(max(gone - i, 0.0), 1.0) for i, t in enumerate(table))
                * cut.get_parameter(name).numel()
            )
        return total

    found = layer_shares(model, "weights=0.5", loss, score=magnitude, levels=(0.25, 0.5, 0.75))
    sizes = {name: model.get_parameter(name).numel() for name in tables}
    assert round(sum((1 - found[name]) * size for name, size in sizes.items())) == 56
    report = bp.prune_weights(model, found, score=magnitude)
    assert report.total - report.kept == 56
    best = loss(model)
    model.load_state_dict(state, strict=False)
    for fractions in itertools.product((0, 0.25, 0.5, 0.75, 1.0), repeat=3):
        division = dict(zip(tables, fractions, strict=True))
        if sum(division[name] * size for name, size in sizes.items()) >= 56:
            costs = [float(t[: int(4 * division[n])].sum()) * sizes[n] for n, t in tables.items()]
            assert best <= sum(costs) + 1e-9


class Branches(nn.Module):
    """Two equal branches, of which the second counts little."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = (nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2)) for _ in range(2))

    def forward(self, x):
        return self.one(x) + 0.01 * self.other(x)


def test_channels_go_where_they_cost_least_and_the_model_stays():
    model = bp.to_variational(Branches())
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(inputs).detach()

    def loss(cut):
        return float((cut(inputs) - expected).square().mean())

    importance = MeasuredImportance(model, inputs[:1], loss, levels=(0.3, 0.6, 0.9))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    report = bp.prune_channels(model, inputs[:1], target="macs=0.6", importance=importance)
    assert {name: len(gone) for name, gone in report.removed.items()} == {"other.0": 8}


@pytest.mark.parametrize("levels", [(), (0.5, 0.5), (0.9, 0.1), (0.5, 1.0)])
def test_levels_that_do_not_rise_are_refused(levels):
    with pytest.raises(ValueError, match="levels are"):
        layer_shares(bp.to_variational(net()), "weights=0.5", lambda model: 0.0, levels=levels)


def test_a_loss_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="the loss is nan"):
        layer_shares(bp.to_variational(net()), "weights=0.5", lambda model: float("nan"))


def test_shares_of_a_model_in_channels_last_are_those_of_the_same_model():
    model = bp.to_variational(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    shares = [layer_shares(net, "weights=0.5", lambda net: float(net(x).square().mean())) for net in (model, last)]
    assert shares[0] == pytest.approx(shares[1])
