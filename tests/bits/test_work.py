"""Rounding in sequence: each layer is fitted to what it gave before, from what the rounded layers before it give."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.laplace import KroneckerPosterior, compensation, kronecker
from bayesprune.layers import named_posteriors
from tests.mixtures import ARRANGEMENTS, of_dense_router

pytest.importorskip("constriction")

OPTIONS = ({"bits": 3}, {"bits": 3, "per": "channel"}, {"bytes": 900})


class Block(nn.Module):
    """A convolution whose output is added to its input, behind a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Block(), Block(), nn.Flatten(), nn.Linear(6 * 16, 8)
    )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.3)
                module.weight.uniform_(0.5, 1.5)
    return model.eval()


def images(seed: int) -> Tensor:
    """Of few patterns, so that inputs depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(5, 2 * 36, generator=torch.Generator().manual_seed(9))
    found = torch.randn(256, 5, generator=generator) @ patterns + 0.2 * torch.randn(256, 72, generator=generator)
    return found.view(-1, 2, 6, 6)


@pytest.fixture(scope="module")
def data() -> list[tuple[Tensor, Tensor]]:
    return [(x, x.mean((1, 2, 3)).gt(0).long()) for x in images(0).split(64)]


@torch.no_grad()
def distance(model: nn.Module, dense: nn.Module) -> float:
    x = images(1)
    return float((model(x) - dense(x)).square().mean())


@pytest.mark.parametrize("options", OPTIONS)
def test_held_out_outputs_are_closer_than_with_each_layer_alone(data, options):
    found = {}
    for compensate in (True, "alone", False):
        model = net()
        report = bp.quantize(model, data, compensate=compensate, **options)
        found[compensate] = distance(model, net())
        if "bytes" in options:
            assert 0.9 * options["bytes"] < report.coded_bytes <= options["bytes"]
    assert found[True] < 0.8 * found["alone"]
    assert found["alone"] < found[False]


def test_weights_lie_on_the_grids_of_the_report_and_norms_keep_eleven_bits(data):
    model = net()
    buffers = dict(model.named_buffers())
    report = bp.quantize(model, data, bits=3)
    values = model.state_dict()
    for name, grid in report.grids.items():
        integers = (values[name].double() / grid.step).round()
        assert torch.equal((integers * grid.step).float(), values[name])
        assert float(integers.abs().max()) <= grid.limit
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name]
        if name.endswith("running_mean"):
            assert torch.equal(buffer.half().float(), buffer)
            is_moved = not torch.equal(buffer, net().get_buffer(name).half().float())
            assert is_moved is (name != "1.running_mean"), "before it stands a layer with a bias"


def test_a_stock_model_is_rounded_as_its_posterior_is(data):
    stock, variational = net(), bp.to_variational(net())
    torch.manual_seed(1)
    bp.quantize(stock, data, bits=3)
    torch.manual_seed(1)
    bp.laplace.fit_laplace(variational, data, loss=bp.laplace.output_metric)
    bp.quantize(variational, data, bits=3)
    for name, value in bp.to_deterministic(variational).state_dict().items():
        assert torch.equal(value, stock.state_dict()[name])


def test_removed_weights_stay_zero_and_what_has_no_grid_as_it_is(data):
    model = bp.laplace.fit_laplace(bp.to_variational(net()), data)
    bp.prune_weights(model, "weights=0.5")
    masks = {its.name: its.mask for its in named_posteriors(model) if its.mask is not None}
    bp.quantize(model, data, bits=3)
    assert masks
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()
    model = net()
    model[3].conv.weight.requires_grad_(False)
    bp.quantize(model, data, bits={"0": 3, "6.weight": 3})
    for name in ("4.conv.weight", "6.bias"):
        assert torch.equal(model.get_parameter(name), net().get_parameter(name))
    assert torch.allclose(model[3].conv.weight, net()[3].conv.weight, rtol=2.0**-11)


@pytest.mark.parametrize("make", [net, lambda: bp.to_variational(net())])
def test_an_error_on_the_way_leaves_the_model_as_it_was(data, monkeypatch, make):
    model, calls = make(), itertools.count()

    def refit(*args: Any, **options: Any) -> Tensor | None:
        if next(calls) == 2:
            raise RuntimeError("on the way")
        return compensation.refit(*args, **options)

    monkeypatch.setattr("bayesprune.bits.work.refit", refit)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="on the way"):
        bp.quantize(model, data, bits=3)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("value", ["low", None, (1.0, 2.0), torch.ones(2)])
def test_a_loss_that_is_no_number_is_told_and_leaves_the_model_as_it_was(data, value):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match="loss returned .*; expected a number, or a tensor that holds one"):
        bp.quantize(model, data, bits=3, loss=lambda model, batch: value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_compensation_is_one_of_three(data):
    with pytest.raises(ValueError, match="compensate is 'layer'; expected True, \"alone\" or False"):
        bp.quantize(net(), data, bits=3, compensate="layer")


class Routed(nn.Module):
    """Examples with a positive first input go through an expert, as behind a router, and all through the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.expert, self.last = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        chosen = x[:, 0] > 0
        return self.last(hidden.index_put((chosen.nonzero()[:, 0],), self.expert(hidden[chosen])))


def test_only_layers_outside_the_sequence_need_factors(data, monkeypatch):
    """They are half of the time that a fixed width takes."""
    fitted: list[nn.Module] = []

    def fit_kronecker(model: nn.Module, *args: Any, **options: Any) -> KroneckerPosterior:
        fitted.append(model)
        return kronecker.fit_kronecker(model, *args, **options)

    monkeypatch.setattr("bayesprune.bits.work.fit_kronecker", fit_kronecker)
    bp.quantize(net(), data, bits=3)
    assert not fitted
    tied = net()
    tied[4].conv.weight = tied[3].conv.weight
    bp.quantize(tied, data, bits=3)
    assert len(fitted) == 1, "two layers with one weight are not in it"


def test_a_layer_behind_a_router_leaves_the_rest_in_sequence():
    torch.manual_seed(0)
    routed = bp.to_variational(Routed()).eval()
    x = torch.randn(250, 5) @ torch.randn(5, 8)
    errors = {}
    for compensate in (True, False):
        model = copy.deepcopy(routed)
        bp.quantize(model, [(part, part.sum(1).gt(0).long()) for part in x.split(125)], bits=3, compensate=compensate)
        with torch.no_grad():
            errors[compensate] = float((model(x) - routed(x)).square().mean())
    assert errors[True] < 0.8 * errors[False]


@pytest.mark.parametrize("compensate", [True, "alone"])
def test_inputs_that_are_constant_are_no_obstacle(compensate):
    """Their covariance is rounding noise, which has negative directions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 8))
    model[0].weight.data.zero_()
    model[0].bias.data.uniform_(0.5, 3)
    batches = [(torch.randn(200, 4), torch.randint(8, (200,))) for _ in range(4)]
    bp.quantize(model, batches, bits=3, compensate=compensate)
    assert torch.isfinite(model(batches[0][0])).all()


@torch.no_grad()
@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=str)
def test_matrices_of_experts_make_up_for_their_rounding(arrangement):
    dense = bp.to_variational(arrangement.build(), filter_fn=lambda _, name: name == "experts")
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    losses = []
    for compensate in (False, True):
        rounded = copy.deepcopy(dense)
        bp.quantize(rounded, x.split(64), bits={"experts": 3}, compensate=compensate)
        moved = of_dense_router(dense, rounded.experts, x) - of_dense_router(dense, dense.experts, x)
        losses.append(float(moved.square().mean()))
        assert rounded.experts.down_proj.unique().numel() <= 2**3
    assert losses[1] < 0.7 * losses[0]
