"""Compensation layer by layer: exact where it can be, in the right order, and nothing touched that should not be."""

import copy
import itertools
import threading
from contextlib import closing, nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

import bayesprune as bp
from bayesprune.foundation.model import eval_mode
from bayesprune.laplace import compensate
from bayesprune.laplace.flow import Walk, layer_calls, watched
from bayesprune.laplace.matrices import drawn_positions, expert_rows, input_weight, silenced
from bayesprune.layers import variational_layers
from tests.mixtures import ARRANGEMENTS, EXPERTS, HIDDEN, WIDTH, Mixture, of_dense_router


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    """A stem, and two blocks whose outputs are added to the stream by way of a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.first = nn.ModuleList([nn.Conv2d(6, 8, 3, padding=1, bias=False) for _ in range(2)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(2)])
        self.second = nn.ModuleList([nn.Conv2d(8, 6, 3, padding=1, bias=False) for _ in range(2)])
        self.outer = nn.ModuleList([nn.BatchNorm2d(6) for _ in range(2)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        for first, norm, second, outer in zip(self.first, self.norms, self.second, self.outer, strict=True):
            x = F.relu(x + outer(second(F.relu(norm(first(x))))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def residual() -> nn.Module:
    torch.manual_seed(0)
    model = Residual()
    model.train()(normal(64, 3, 6, 6, seed=1))  # statistics of batch norm
    with torch.no_grad():
        for norm in model.outer:
            norm.weight.copy_(torch.rand(6) + 0.5)
    return bp.to_variational(model.eval())


def mlp(*sizes: int, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o, bias=bias), nn.ReLU())]
    return bp.to_variational(nn.Sequential(*layers[:-1]).eval())


def test_a_twin_is_made_up_for_exactly():
    model = mlp(5, 4, 3)
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = model[0].weight[0] * 2, model[0].bias[0] * 2
    x = normal(64, 5)
    expected = model(x)
    compensate(model, [x], {"2": [0]})
    assert not model[2].weight[:, 0].any()
    assert torch.allclose(model(x), expected, atol=1e-3)


def test_a_constant_input_goes_into_the_bias():
    model = mlp(5, 4, 3)
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 1.5
    x = normal(64, 5)
    expected = model(x)
    compensate(model, [x], {"2": [2]})
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_a_constant_input_goes_into_the_mean_of_a_batch_norm():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3))
    model = bp.to_variational(net.eval())
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 1.5
    x = normal(32, 2, 3, 3)
    expected, mean = model(x), model[3].running_mean
    compensate(model, [x], {"2": [2]})
    assert torch.allclose(model(x), expected, atol=1e-3)
    assert model[3].running_mean is not mean, "an undo puts the old buffer back"


def test_equals_least_squares_with_next_to_no_damping(monkeypatch):
    monkeypatch.setattr("bayesprune.laplace.regression.DAMPINGS", (1e-9,))
    model = mlp(6, 8, 3)
    x = normal(200, 6)
    target = model(x).detach()
    compensate(model, [x], {"2": [1, 4, 5]})
    kept = [0, 2, 3, 6, 7]
    inputs = torch.cat([F.relu(model[0](x))[:, kept], torch.ones(200, 1)], dim=1).double()
    best = torch.linalg.lstsq(inputs, target.double()).solution
    assert torch.allclose(model[2].weight[:, kept].double(), best[:-1].T, atol=1e-4)
    assert torch.allclose(model[2].bias.double(), best[-1], atol=1e-4)


@torch.no_grad()
def error(model: nn.Module, dense: nn.Module, x: torch.Tensor) -> float:
    return float((model(x) - dense(x)).square().mean())


def test_layers_behind_and_the_stream_make_up_for_more(residual):
    x = normal(128, 3, 6, 6, seed=2)
    removed = {"second.0": [0, 3, 5], "second.1": [1, 2]}
    dense, conditioned, fitted = residual, copy.deepcopy(residual), copy.deepcopy(residual)
    posterior = bp.laplace.fit_kronecker(conditioned, [x])
    bp.laplace.condition_on_channels(conditioned, posterior, removed)
    compensate(fitted, [x], removed)
    assert error(fitted, dense, x) < 0.7 * error(conditioned, dense, x)
    assert error(fitted, dense, normal(64, 3, 6, 6, seed=3)) < error(conditioned, dense, normal(64, 3, 6, 6, seed=3))


def test_streams_and_norms_are_seen(residual):
    layers = dict(variational_layers(residual))
    calls = {call.name: call for call in layer_calls(residual, normal(2, 3, 6, 6), layers)}
    assert [name for name, call in calls.items() if call.addend is not None] == ["second.0", "second.1"]
    assert calls["second.0"].norm is residual.outer[0]
    assert calls["first.1"].norm is residual.norms[1]
    gain = residual.outer[0].weight / (residual.outer[0].running_var + residual.outer[0].eps).sqrt()
    assert torch.allclose(calls["second.0"].gain.flatten(), gain)
    assert calls["stem"].norm is None
    assert calls["head"].norm is None


def test_what_a_forward_writes_into_a_tensor_does_not_change_what_was_seen():
    class InPlace(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.act, self.in_place = nn.ReLU(in_place), in_place

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.act(self.first(x))
            y = self.second(x)
            if self.in_place:
                x += y
            else:
                x = x + y
            return self.last(x)

    calls = []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = bp.to_variational(InPlace(in_place).eval())
        calls.append(layer_calls(model, normal(8, 4), dict(variational_layers(model))))
    for expected, found in zip(*calls, strict=True):
        assert torch.equal(found.inputs, expected.inputs)
        assert torch.equal(found.output, expected.output)
    assert torch.equal(calls[1][1].addend, calls[0][1].addend)


def test_a_norm_takes_no_shift_of_what_is_read_elsewhere_too():
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.norm(y) + y.tanh()

    model = bp.to_variational(Fork().eval())
    (call,) = layer_calls(model, normal(2, 2, 3, 3), {"conv": model.conv})
    assert call.norm is None


class TwoIntoOne(nn.Module):
    """Two convolutions that lose inputs, with one batch norm behind both, or the first twice."""

    def __init__(self, second: str) -> None:
        super().__init__()
        self.stem, self.last, self.norm = nn.Conv2d(2, 6, 1), nn.Linear(3, 2), nn.BatchNorm2d(3)
        self.first, self.other = nn.Conv2d(6, 3, 1, bias=False), nn.Conv2d(6, 3, 1, bias=False)
        self.second = second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        y = self.norm(self.first(x)).relu(), self.norm(self.get_submodule(self.second)(2 * x)).relu()
        return self.last(torch.cat(y, 2).mean((2, 3)))


def test_a_norm_behind_two_layers_takes_no_shift_and_one_behind_two_runs_does():
    for second, keeps_its_mean in (("other", True), ("first", False)):
        torch.manual_seed(0)
        model = bp.to_variational(TwoIntoOne(second).eval())
        before = model.norm.running_mean.clone()
        compensate(model, [normal(64, 2, 3, 3)], {"first": [0, 1], "other": [0, 1]})
        assert torch.equal(model.norm.running_mean, before) is keeps_its_mean


def test_a_frozen_bias_is_no_part_of_the_shift_of_a_norm():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1), nn.BatchNorm2d(3)).eval()
    nn.init.constant_(net[2].bias, 2.0)
    net[2].bias.requires_grad_(False)
    dense, x = bp.to_variational(net), normal(64, 2, 1, 1)
    model = copy.deepcopy(dense)
    compensate(model, [x], {"2": [0, 1, 2]})
    assert torch.equal(model[2].bias, dense[2].bias)
    torch.testing.assert_close(model(x).mean((0, 2, 3)), dense(x).mean((0, 2, 3)))


def test_a_sum_with_what_is_made_of_the_output_is_none():
    class Cubic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            return y + 0.04 * y**3

    model = bp.to_variational(Cubic().eval())
    (call,) = layer_calls(model, normal(4, 2), {"linear": model.linear})
    assert call.addend is None


def test_a_walk_goes_on_with_weights_that_changed_on_the_way(residual):
    layers, x, found = dict(variational_layers(residual)), normal(2, 3, 6, 6), []
    residual.head.register_forward_hook(lambda module, args, output: found.append(output))
    shift = torch.arange(6.0) / 10
    with torch.no_grad(), eval_mode(residual), watched(layers), closing(Walk(residual, x, ["second.0"])) as walk:
        assert walk.advance("first.0") is not None
        residual.first[0].weight.mul_(2)
        walk.change()
        call = walk.advance("second.0")
        assert call is not None
        assert torch.equal(call.addend, F.relu(residual.stem(x)))
        residual.second[0].weight.mul_(-1)
        residual.outer[0]._buffers["running_mean"] = residual.outer[0].running_mean - shift
        walk.change(shift)
        assert walk.advance("second.0") is None, "it runs once"
        assert torch.allclose(found[-1], residual(x), atol=1e-6)


def test_a_walk_ends_where_it_is_closed_or_fails(residual):
    layers, ran = dict(variational_layers(residual)), []
    residual.first[1].register_forward_hook(lambda *_: ran.append("first.1"))
    with torch.no_grad(), eval_mode(residual), watched(layers):
        walk = Walk(residual, normal(2, 3, 6, 6))
        assert walk.advance("second.0") is not None
        walk.close()
        assert not ran
        failing = Walk(residual, normal(2, 4, 6, 6))
        with pytest.raises(RuntimeError, match="channels"):
            failing.advance("stem")
        failing.close()
    assert "bayesprune-walk" not in [thread.name for thread in threading.enumerate()]


def test_a_walk_ends_although_the_forward_catches_every_exception():
    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return self.linear(x)
            except Exception:  # noqa: BLE001
                return self.linear(x)

    model = bp.to_variational(Catching().eval())
    with torch.no_grad(), eval_mode(model), watched({"linear": model.linear}):
        walk = Walk(model, normal(4, 2))
        assert walk.advance("linear") is not None
        walk.close()
    assert "bayesprune-walk" not in [thread.name for thread in threading.enumerate()]


def test_forwards_that_begin_anew_for_each_layer_find_the_same(residual, monkeypatch):
    batches = list(normal(64, 3, 6, 6, seed=2).split(16))
    removed = {"second.0": [0, 3, 5], "second.1": [1, 2]}
    again = copy.deepcopy(residual)
    compensate(residual, batches, removed)
    monkeypatch.setattr("bayesprune.laplace.sequence._MAX_HELD", 0)
    monkeypatch.setattr("bayesprune.laplace.sequence._PLENTY", 1e9)
    compensate(again, batches, removed)
    for name, value in residual.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-4, atol=1e-4)


def test_frozen_tied_and_earlier_layers_stay_as_they_are():
    model = mlp(5, 4, 4, 4, 3)
    model[6].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    compensate(model, [normal(64, 5)], {"4": [0], "6": [1]})
    assert torch.equal(model[0].weight, before[0].weight)
    assert torch.equal(model[2].weight, before[2].weight)
    assert not torch.equal(model[4].weight, before[4].weight)
    frozen = before[6].weight.clone()
    frozen[:, 1] = 0
    assert torch.equal(model[6].weight, frozen)


def test_weights_that_a_mask_removed_stay_zero():
    model = mlp(5, 8, 3)
    bp.prune_weights(model, "weights=0.5")
    mask = model[2].mask("weight").clone()
    compensate(model, [normal(64, 5)], {"2": [0]})
    assert not model[2].weight[~mask].any()
    assert not model[2].weight[:, 0].any()
    assert torch.equal(model[2].mask("weight"), mask)


def test_grouped_convolutions_are_fitted_by_group():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2))
    model = bp.to_variational(net.eval())
    with torch.no_grad():
        for one, other in ((0, 1), (4, 5)):  # a twin in each group
            model[0].weight[one], model[0].bias[one] = model[0].weight[other], model[0].bias[other]
    x = normal(32, 3, 5, 5)
    expected = model(x)
    compensate(model, [x], {"2": [0, 4]})
    assert torch.allclose(model(x), expected, atol=2e-3)


CANNOT_BE_FITTED = {
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 2), None),
    "grouped and transposed": (lambda: nn.ConvTranspose2d(8, 8, 2, groups=2), None),
    "deterministic": (lambda: nn.Conv2d(8, 8, 1), lambda layer, name: name != "2"),
    "deterministic and grouped": (lambda: nn.Conv2d(8, 8, 1, groups=2), lambda layer, name: name != "2"),
}


@pytest.mark.parametrize("name", CANNOT_BE_FITTED)
def test_layers_behind_one_that_cannot_be_fitted_make_up_for_what_it_lost(name):
    torch.manual_seed(3)
    build, filter_fn = CANNOT_BE_FITTED[name]
    net = nn.Sequential(nn.Conv2d(2, 8, 1), nn.ReLU(), build(), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()
    dense, x = bp.to_variational(net, filter_fn=filter_fn), normal(64, 2, 4, 4)
    silenced, fitted, lost = copy.deepcopy(dense), copy.deepcopy(dense), [1, 2, 6]
    silenced[1].register_forward_hook(lambda _, args, output: output.index_fill(1, torch.tensor(lost), 0))
    compensate(fitted, [x], {"2": lost})
    hidden = dense[1](dense[0](x))
    torch.testing.assert_close(fitted[2](hidden), silenced[2](silenced[1](silenced[0](x))))
    assert all(torch.equal(p, q) for p, q in zip(fitted[0].parameters(), dense[0].parameters(), strict=True))
    assert error(fitted, dense, x) < 0.8 * error(silenced, dense, x)


@torch.no_grad()
@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=str)
def test_experts_make_up_for_units_that_they_lost(arrangement):
    dense = bp.to_variational(arrangement.build())
    model, silent, x = copy.deepcopy(dense), copy.deepcopy(dense), normal(256, 4)
    lost = [1, 3, HIDDEN + 2, HIDDEN + 4, 2 * HIDDEN + 5, 2 * HIDDEN + 7]
    input_weight(silent.experts).copy_(silenced(silent.experts, lost))
    compensate(model, x.split(128), {"experts": lost})
    before, now, whole = (of_dense_router(dense, net.experts, x) for net in (silent, model, dense))
    assert F.mse_loss(now, whole) < 0.05 * F.mse_loss(before, whole)
    assert torch.equal(model.experts.down_proj, silenced(model.experts, lost))
    changed = {name for name, value in dense.named_parameters() if not torch.equal(model.get_parameter(name), value)}
    assert changed == {"experts.down_proj", "last.weight", "last.bias"}


@torch.no_grad()
def test_an_expert_is_fitted_to_the_tokens_that_reach_it_by_how_much_they_count():
    """As the weighted least squares fit of each expert by itself."""
    net = ARRANGEMENTS[-1].build()
    dense = bp.to_variational(net, filter_fn=lambda _, name: name == "experts")
    model, x = copy.deepcopy(dense), normal(256, 4)
    compensate(model, [x], {"experts": [1, HIDDEN + 2, 2 * HIDDEN + 5]}, damping=0)
    rows = dense.first(x).tanh()
    weights = dense.router(rows).softmax(-1)
    for expert, lost in enumerate((1, 2, 5)):
        hidden = weights[:, expert, None] * F.relu(F.linear(rows, dense.experts.up_proj[expert]))
        matrix = dense.experts.down_proj[expert]
        kept = [unit for unit in range(HIDDEN) if unit != lost and hidden[:, unit].any()]
        expected = torch.linalg.lstsq(hidden[:, kept], hidden @ matrix.mT).solution.mT
        mixed = copy.deepcopy(matrix).zero_()
        mixed[:, kept] = expected
        fits = (model.experts.down_proj[expert], mixed)
        error, best = (float(F.mse_loss(hidden @ fit.mT, hidden @ matrix.mT)) for fit in fits)
        assert error == pytest.approx(best, rel=0.02, abs=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=str)
def test_rows_of_experts_are_their_hidden_units_times_what_the_router_gives_them(arrangement):
    net = bp.to_variational(arrangement.build())
    units: list[torch.Tensor] = []
    with torch.enable_grad():
        output = of_dense_router(net, net.experts, normal(9, 4))
    for expert in range(EXPERTS):
        alone = copy.deepcopy(net.experts)
        if arrangement.options.get("bias"):
            alone.down_proj_bias.zero_()
        for unit in range(HIDDEN):  # the first output is this unit
            input_weight(alone).zero_()
            column = (expert, unit, 0) if arrangement.options["transposed"] else (expert, 0, unit)
            input_weight(alone)[column] = 1
            units.append(of_dense_router(net, alone, normal(9, 4))[:, 0])
    expected = torch.stack(units, 1).view(9, EXPERTS, HIDDEN)
    few = expert_rows(net.experts, output, torch.tensor([2, 5, 7]))
    assert torch.allclose(few.abs(), expected[[2, 5, 7]].abs(), atol=1e-6)
    many = expert_rows(net.experts, output, torch.arange(9))
    signs = [sign * few.new_ones(1) for sign in (1, -1)]
    for row in range(3):  # 9 positions on 6 rows
        sums = [a * expected[row] + b * expected[row + WIDTH] for a in signs for b in signs]
        assert any(torch.allclose(many[row], one, atol=1e-5) for one in sums)


@torch.no_grad()
@pytest.mark.parametrize("cut", ["units", "weights"])
def test_a_batch_norm_behind_experts_takes_no_shift_of_theirs(cut):
    class Normed(Mixture):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x).tanh()
            return self.last(self.experts(x, self.router(x).softmax(-1)))

    torch.manual_seed(0)
    net = Normed(**ARRANGEMENTS[0].options)
    net.last = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 5))
    dense = bp.to_variational(net.eval(), filter_fn=lambda _, name: name == "experts")
    model, x = copy.deepcopy(dense), normal(256, 4)
    if cut == "units":
        compensate(model, [x], {"experts": [1, HIDDEN + 2]})
    else:
        bp.prune_one_shot(model, [x], "weights=0.5", scope="layer")
    assert not torch.equal(model.experts.down_proj, dense.experts.down_proj)
    assert torch.isfinite(model(x)).all()


@torch.no_grad()
def test_single_weights_that_experts_lost_stay_zero():
    dense = bp.to_variational(ARRANGEMENTS[0].build())
    bp.prune_weights(dense, "weights=0.9")
    model, silent, x = copy.deepcopy(dense), copy.deepcopy(dense), normal(256, 4)
    lost = [1, HIDDEN + 2, 2 * HIDDEN + 5]
    input_weight(silent.experts).copy_(silenced(silent.experts, lost))
    compensate(model, [x], {"experts": lost})
    before, now, whole = (of_dense_router(dense, net.experts, x) for net in (silent, model, dense))
    assert F.mse_loss(now, whole) < 0.1 * F.mse_loss(before, whole)
    assert not model.experts.down_proj[~dense.experts.mask("down_proj")].any()


@torch.no_grad()
@pytest.mark.parametrize("case", ["not variational", "frozen"])
def test_experts_that_cannot_be_fitted_lose_their_units_alone(case):
    net = ARRANGEMENTS[0].build()
    if case == "frozen":
        net.experts.down_proj.requires_grad_(False)
    dense = bp.to_variational(net, filter_fn=lambda _, name: case != "not variational" or name != "experts")
    model = copy.deepcopy(dense)
    compensate(model, [normal(128, 4)], {"experts": [1, HIDDEN + 2]})
    assert torch.equal(model.experts.down_proj, silenced(dense.experts, [1, HIDDEN + 2]))
    assert not torch.equal(model.last.weight, dense.last.weight)


def test_a_layer_whose_weight_is_given_to_a_function_counts_as_the_first():
    class ByFunction(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = F.linear(F.relu(self.first(x)), self.second.weight, self.second.bias)
            return self.last(F.relu(hidden))

    torch.manual_seed(0)
    dense = bp.to_variational(ByFunction().eval())
    model = copy.deepcopy(dense)
    compensate(model, [normal(64, 5)], {"second": [0, 1]})
    assert torch.equal(model.first.weight, dense.first.weight)
    assert not model.second.weight[:, :2].any()
    assert not torch.equal(model.last.weight, dense.last.weight)


def test_without_a_batch_it_says_so():
    with pytest.raises(ValueError, match="no batch"):
        compensate(mlp(5, 4, 3), [], {"2": [0]})


def test_an_error_on_the_way_leaves_the_model_as_it_was(fails_on_second_call):
    model = mlp(5, 8, 6, 3)
    before = copy.deepcopy(model.state_dict())
    calls = fails_on_second_call("bayesprune.laplace.compensation", "refit")
    with pytest.raises(MemoryError):
        compensate(model, [normal(64, 5)], {"2": [0]})
    assert len(calls) == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_whose_rows_differ_from_the_dense_ones_is_left():
    class Routed(nn.Module):
        """The rows that reach an expert depend on what comes before."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.expert = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.second(F.relu(self.first(x)))
            chosen = x[:, 0] > 0
            return x.index_put((chosen.nonzero()[:, 0],), self.expert(x[chosen]))

    torch.manual_seed(0)
    model = bp.to_variational(Routed().eval())
    expert = model.expert.weight.detach().clone()
    compensate(model, [normal(64, 4)], {"second": [0, 1, 2, 3]})
    assert torch.equal(model.expert.weight, expert)


def test_prune_channels_compensates_with_any_importance():
    x = normal(128, 6)
    dense = mlp(6, 16, 16, 3)
    errors = []
    for before_cut in (None, "compensate"):
        model = copy.deepcopy(dense)
        importance = tp.importance.MagnitudeImportance()
        bp.prune_channels(model, x[:1], "macs=0.4", importance=importance, data=[x], before_cut=before_cut)
        errors.append(error(model, dense, x))
    assert errors[1] < 0.5 * errors[0]


def test_a_failure_leaves_the_model_as_it_was(residual):
    x = normal(16, 3, 6, 6)
    before = copy.deepcopy(residual.state_dict())

    def fail(removed: dict[str, list[int]]) -> None:
        compensate(residual, [x], removed)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        bp.prune_channels(residual, x[:1], "macs=0.6", before_cut=fail)
    after = residual.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_half_precision_is_fitted_in_higher(residual):
    model = residual.to(torch.bfloat16)
    compensate(model, [normal(32, 3, 6, 6).to(torch.bfloat16)], {"second.0": [0]})
    assert model.second[0].weight.dtype == torch.bfloat16
    assert model.second[0].weight.isfinite().all()


def test_arguments_by_name_and_progress(capsys):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.second(F.relu(self.first(input=inputs)))

    model = bp.to_variational(Named().eval())
    partial(compensate, progress=True)(model, [{"inputs": normal(8, 4)}], {"second": [0]})
    assert "Compensate" in capsys.readouterr().err


class Tokens(nn.Module):
    """Two layers at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.first(inputs))) * attention_mask[..., None]


def test_what_stands_at_masked_positions_does_not_count():
    torch.manual_seed(0)
    dense = bp.to_variational(Tokens().eval())
    mask = torch.arange(7) < torch.arange(1, 17)[:, None] % 7 + 1
    weights = []
    for padding in (0.0, 50.0):
        model = copy.deepcopy(dense)
        inputs = normal(16, 7, 4).where(mask[..., None], normal(16, 7, 4, seed=1) * padding)
        compensate(model, [{"inputs": inputs, "attention_mask": mask.long()}], {"second": [0, 1]})
        weights.append(model.second.weight.detach())
    assert torch.equal(*weights)


def tokens(num_examples: int, num_positions: int, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same inputs at positions that count, whatever the number of positions."""
    inputs = torch.zeros(num_examples, num_positions, 4)
    inputs[:, :3] = normal(num_examples, 3, 4)
    return {"inputs": inputs, "attention_mask": (torch.arange(num_positions) < lengths[:, None]).long()}


def test_padding_leaves_the_fit_as_it_is():
    torch.manual_seed(0)
    dense = bp.to_variational(Tokens().eval())
    lengths = torch.arange(256) % 3 + 1
    weights = []
    for num_positions in (3, 64):
        model = copy.deepcopy(dense)
        compensate(model, [tokens(256, num_positions, lengths)], {"second": [0, 1]})
        weights.append(model.second.weight.detach())
    torch.testing.assert_close(*weights)


def test_more_positions_are_drawn_where_a_share_of_the_examples_has_them():
    counted = torch.zeros(8, 100, dtype=torch.bool)
    counted[:2, 50:] = True
    chosen = drawn_positions(100, 5, counted)
    assert len(chosen) == 20
    assert chosen.min() >= 50
    assert torch.equal(drawn_positions(100, 20, counted), torch.arange(50, 100))


def test_data_that_count_in_the_last_quarter_alone_are_fitted():
    torch.manual_seed(0)
    model = bp.to_variational(Tokens().eval())
    before = model.second.weight.detach().clone()
    compensate(model, [tokens(4, 3, torch.tensor([0, 0, 0, 3]))], {"second": [0]})
    assert not torch.equal(model.second.weight[:, 1:], before[:, 1:])


def test_a_mask_that_hides_everything_is_refused():
    torch.manual_seed(0)
    model = bp.to_variational(Tokens().eval())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="hides all positions at which second runs"):
        compensate(model, [tokens(8, 3, torch.zeros(8))], {"second": [0]})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Halved(nn.Sequential):
    """A model whose own forward computes in bfloat16, as accelerate leaves it after training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


@pytest.mark.parametrize("is_own", [True, False])
def test_a_forward_under_autocast_is_compensated_nearly_as_well(is_own):
    """A layer that is run again in the walk sees its new weights, and not a cast that autocast has kept."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)]
    x, autocast = normal(512, 8), torch.autocast("cpu", torch.bfloat16, enabled=not is_own)
    dense = nn.Sequential(*layers)
    errors = []
    for kind in (nn.Sequential, Halved if is_own else nn.Sequential):
        model = bp.to_variational(kind(*copy.deepcopy(layers)).eval())
        with autocast if errors else nullcontext():
            compensate(model, x.split(128), {"2": list(range(16))})
        with torch.no_grad():
            errors.append(float((nn.Sequential(*model)(x) - dense(x)).square().mean()))
    uncompensated = copy.deepcopy(dense)
    with torch.no_grad():
        uncompensated[2].weight[:, :16] = 0
        start = float((uncompensated(x) - dense(x)).square().mean())
    assert errors[1] < 1.1 * errors[0] < 0.5 * start


@pytest.mark.parametrize("where", ["data", "weights"])
def test_numbers_that_are_not_finite_are_refused(where):
    model, x = mlp(5, 8, 6, 3), normal(64, 5)
    (x if where == "data" else model[2].weight.data)[1, 2] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="inputs, outputs or gradients of 2 are not finite"):
        compensate(model, [x], {"2": [0]})
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_products_of_inputs_that_leave_are_not_made(monkeypatch):
    from bayesprune.laplace import sequence

    widths = []

    class Seen(sequence.Moments):
        def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
            widths.append(inputs.shape[2])
            super().add(inputs, targets)

    monkeypatch.setattr(sequence, "Moments", Seen)
    model = mlp(5, 8, 3)
    compensate(model, [normal(64, 5)], {"2": [0, 3, 5]})
    assert set(widths) == {5}


class Routed(nn.Module):
    """Examples with a positive first input go through an expert, as behind a router, and all through the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.first(x))
        routed = torch.zeros_like(y)
        routed[x[:, 0] > 0] = self.expert(y[x[:, 0] > 0])
        return self.last(y + routed)


def test_an_expert_that_meets_some_examples_or_none_stays_and_the_rest_is_fitted():
    torch.manual_seed(0)
    model = bp.to_variational(Routed().eval())
    batches = [normal(32, 5, seed=seed) for seed in (1, 2, 3)]
    batches[1][:, 0] = -1.0  # the expert meets none
    batches[2][:16, 0], batches[2][16:, 0] = 1.0, -1.0
    before = copy.deepcopy(model)
    compensate(model, batches, {"expert": [0], "last": [1]})
    assert not model.expert.weight[:, 0].any()
    assert torch.equal(model.expert.weight[:, 1:], before.expert.weight[:, 1:])
    assert not torch.equal(model.last.weight, before.last.weight)
