"""Maxima against draws: the table of the rules' file, and every form that a model may call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from bayesprune.moments import Moments, parts, settings
from tests.moments.sampled import exact, near_shared, sampled


def uncertain(*shape, spread=1.0, shared=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    own = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    if shared is None:
        return Moments(mean, own)
    common = 0.3 + torch.rand(shared, generator=generator, dtype=torch.float64)
    return Moments(mean, own + common, common)


POOLS = {
    "2d": (lambda x: F.max_pool2d(x, 2), (1, 2, 4, 4)),
    "2d, overlapping": (lambda x: F.max_pool2d(x, 3, 2, 1), (1, 2, 5, 5)),
    "2d, dilated": (lambda x: F.max_pool2d(x, (2, 3), stride=1, padding=(1, 0), dilation=(2, 1)), (1, 2, 3, 4)),
    "2d, ceil": (lambda x: F.max_pool2d(x, 2, 2, 0, 1, True), (1, 2, 5, 3)),
    "1d": (lambda x: F.max_pool1d(x, 3, 1, 1), (1, 2, 6)),
    "3d": (lambda x: F.max_pool3d(x, 2), (1, 1, 4, 2, 4)),
    "adaptive": (lambda x: F.adaptive_max_pool2d(x, (2, 3)), (1, 2, 3, 4)),
    "adaptive to one": (lambda x: F.adaptive_max_pool2d(x, 1), (1, 2, 3, 3)),
    "adaptive 1d": (lambda x: F.adaptive_max_pool1d(x, 2), (1, 2, 5)),
    "amax": (lambda x: x.amax((-1, -2)), (2, 2, 3)),
    "max along": (lambda x: torch.max(x, 1).values, (2, 4)),
    "all": (torch.max, (2, 2)),
    "amin": (lambda x: torch.amin(x, 1, keepdim=True), (2, 4)),
    "min along": (lambda x: x.min(-1, keepdim=True)[0], (2, 4)),
}


@pytest.mark.parametrize("name", POOLS)
def test_the_first_order_rule_is_the_function_of_the_means_and_the_variance_there(name):
    function, shape = POOLS[name]
    x = uncertain(*shape)
    result = function(x)
    mean, variance, _ = parts(result)
    assert torch.equal(mean, function(parts(x).mean))
    source = {
        value.item(): own.item() for value, own in zip(parts(x).mean.flatten(), x.variance.flatten(), strict=True)
    }
    assert torch.equal(
        variance.flatten(), torch.tensor([source[value.item()] for value in mean.flatten()], dtype=torch.float64)
    )


def test_errors_that_the_rule_states():
    """It is far off where means are alike."""
    x = Moments(torch.zeros(1, 1, 2, 2).double(), torch.ones(1, 1, 2, 2))
    found = sampled(lambda t: F.max_pool2d(t, 2), x)
    mean, variance, _ = parts(F.max_pool2d(x, 2))
    off = ((mean - found.mean) / found.variance.sqrt()).item(), (variance / found.variance).item()
    print(off)
    assert -1.5 < off[0] < -1.43
    assert 1.95 < off[1] < 2.1


def test_what_positions_share_goes_through_pooling():
    x = uncertain(1, 3, 4, 4, spread=2.0, shared=(1, 3, 1, 1))
    result = F.max_pool2d(x, 2)
    assert parts(result).shared.shape == (1, 3, 1, 1)
    near_shared(result, sampled(lambda t: F.max_pool2d(t, 2), x), tolerance=0.1)


def test_what_units_share_over_positions_is_followed_through_a_maximum_of_units():
    x = uncertain(1, 3, 12, spread=0.5, shared=(1, 3, 1))
    result = x.amax(1)
    found = sampled(lambda t: t.amax(1), x)
    near_shared(result, found, tolerance=0.15)
    assert parts(result).shared.shape == (1, 1)


def test_shared_parts_that_pixels_have_of_their_own_are_picked_with_them():
    mean = torch.arange(4.0).reshape(1, 1, 2, 2)
    shared = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]])
    result = F.max_pool2d(Moments(mean.expand(2, 1, 2, 2), torch.ones(2, 1, 2, 2), shared), 2)
    assert parts(result).shared.item() == pytest.approx(0.4)


def test_two_tensors():
    a, b = uncertain(3, 4), uncertain(3, 4, seed=1)
    exact(torch.maximum, a, b)
    exact(torch.minimum, a, b)
    exact(lambda x, y: x.max(y), a, uncertain(4, seed=2))
    exact(lambda x: torch.max(x, torch.full((3, 4), 0.2).double()), a)
    exact(lambda x: torch.minimum(torch.tensor([[0.2], [0.1], [0.5]]).double(), x), uncertain(1, 4))
    result = torch.maximum(a, -a)  # of one origin: the absolute value
    expected = torch.abs(a)
    with settings(num_nodes=41):
        result = torch.maximum(a, -a)
    assert (torch.Tensor(result.mean) - expected.mean).abs().max() < 0.05


def test_two_tensors_that_share_over_positions():
    a, b = uncertain(1, 2, 16, shared=(1, 2, 1)), uncertain(1, 2, 16, shared=(1, 2, 1), seed=1)
    near_shared(torch.maximum(a, b), sampled(torch.maximum, a, b), tolerance=0.05)


def test_without_variance_a_maximum_is_torchs_and_certain():
    for function, shape in POOLS.values():
        mean = torch.randn(shape)
        result = function(Moments(mean, torch.zeros(shape)))
        torch.testing.assert_close(torch.Tensor(result.mean), function(mean), rtol=1e-6, atol=1e-6)
        assert (result.variance == 0).all()


def test_a_border_of_minus_infinity_never_wins():
    x = uncertain(1, 1, 3, 3)
    padded = F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-float("inf")), 3, 2)
    stock = F.max_pool2d(x, 3, 2, 1)
    for found, expected in zip(parts(padded)[:2], parts(stock)[:2], strict=True):
        torch.testing.assert_close(found, expected)


def test_indices_are_those_of_the_means():
    x = uncertain(2, 3, 4, 4)
    mean = parts(x).mean
    _, indices = nn.MaxPool2d(2, return_indices=True)(x)
    assert torch.equal(indices, F.max_pool2d(mean, 2, return_indices=True)[1])
    _, indices = F.adaptive_max_pool2d(x, 2, return_indices=True)
    assert torch.equal(indices, F.adaptive_max_pool2d(mean, 2, return_indices=True)[1])
    assert torch.equal(torch.max(x, 1).indices, mean.max(1).indices)
    assert torch.equal(x.min(1)[1], mean.min(1)[1])


@pytest.mark.parametrize(
    "function", [lambda x: F.max_pool2d(x, 2, 1), lambda x: x.amax(1), lambda x: torch.maximum(x, x.flip(1))]
)
def test_gradients(function):
    given = [part.detach().requires_grad_() for part in parts(uncertain(1, 2, 3, 3, shared=(1, 2, 1, 1)))]
    assert gradcheck(lambda *given: tuple(p for p in parts(function(Moments(*given))) if p is not None), given)


def test_half_precision():
    x = Moments(torch.randn(1, 2, 4, 4, dtype=torch.bfloat16), torch.full((1, 2, 4, 4), 1e-8))
    result = F.max_pool2d(x, 2)
    assert result.dtype == torch.bfloat16
    assert result.variance.dtype == torch.float32
    assert (result.variance > 0).all()


def test_along_directions_of_a_low_rank_covariance():
    torch.manual_seed(0)
    mean, directions = torch.randn(1, 2, 4, 4), torch.randn(8, 1, 2, 4, 4)
    x = Moments.along(mean, directions)
    for function in (lambda x: F.max_pool2d(x, 2), lambda x: torch.max(x, 1)[0], lambda x: F.adaptive_max_pool2d(x, 1)):
        result = function(x)
        step = (function(mean + 1e-4 * directions[3]) - function(mean)) / 1e-4
        assert (result.directions[3] - step).abs().max() < 0.02
