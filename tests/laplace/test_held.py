"""How many layers' tensors are alive at once while a posterior is fitted or weights are compensated: a few, not all."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bayesprune as bp
from bayesprune.laplace import calibration, kronecker
from bayesprune.laplace.sites import fittable_layers, sites_of

NUM_LAYERS = 12


def net() -> nn.Module:
    """Residual blocks would do as well; what counts is that no layer is read by a later one than the next."""
    torch.manual_seed(0)
    pairs = (layer for _ in range(NUM_LAYERS - 1) for layer in (nn.Linear(8, 8), nn.ReLU()))
    return bp.to_variational(nn.Sequential(*pairs, nn.Linear(8, 3))).eval()


class Alive:
    """Counts tensors that are alive, whenever one more is shown."""

    def __init__(self) -> None:
        self.shown: list[Callable[[], torch.Tensor | None]] = []
        self.most = 0

    def show(self, tensor: torch.Tensor) -> None:
        self.shown.append(weakref.ref(tensor))
        self.most = max(self.most, sum(reference() is not None for reference in self.shown))


@pytest.fixture
def outputs(monkeypatch):
    """Outputs of linear layers."""
    alive = Alive()
    forward = nn.functional.linear

    def linear(*args, **kwargs):
        output = forward(*args, **kwargs)
        alive.show(output)
        return output

    monkeypatch.setattr(nn.functional, "linear", linear)
    return alive


def test_a_look_at_all_layers_keeps_the_tensors_of_a_few(outputs):
    model = net()
    sites = sites_of(model, [torch.randn(16, 8)], fittable_layers(model), rows_per_column=1)
    assert [site.name for site in sites] == [str(2 * index) for index in range(NUM_LAYERS)]
    assert len({site.source for site in sites}) == NUM_LAYERS
    assert len(outputs.shown) == NUM_LAYERS
    assert outputs.most <= 3


def test_layers_with_the_same_input_have_the_same_source_after_it_is_gone():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            x = x + 1
            return self.last(self.first(x).relu() * self.second(x).relu())

    model = bp.to_variational(Both()).eval()
    sites = sites_of(model, [torch.randn(16, 8)], fittable_layers(model), rows_per_column=1)
    first, second, last = (site.source for site in sites)
    assert first == second != last


def test_a_posterior_takes_gradients_one_layer_after_the_other(monkeypatch):
    alive, rows = Alive(), kronecker._rows

    def shown(call, *args, **kwargs):
        alive.show(call.gradients)
        return rows(call, *args, **kwargs)

    monkeypatch.setattr(kronecker, "_rows", shown)
    posterior = bp.laplace.fit_kronecker(net(), [torch.randn(16, 8)], loss=calibration.output_metric)
    assert len(posterior) == len(alive.shown) == NUM_LAYERS
    assert alive.most <= 3


class Factors(TorchDispatchMode):
    """Shows every float64 matrix that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = Alive()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        is_new = not any(found is argument for argument in args)
        if isinstance(found, torch.Tensor) and found.dtype == torch.double and found.dim() == 3 and is_new:
            self.alive.show(found)
        return found


def test_a_posterior_holds_its_factors_once():
    with Factors() as factors:
        posterior = bp.laplace.fit_kronecker(net(), [torch.randn(16, 8) for _ in range(3)])
    kept = sum(len(its.inputs) + len(its.outputs) for its in posterior.values())
    assert kept == 2 * NUM_LAYERS
    assert kept <= factors.alive.most <= kept + 3
