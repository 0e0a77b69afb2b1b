"""Dropout against draws of input and mask, all exact; and tensors made in the likeness of an uncertain one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from bayesprune.moments import Moments, parts, settings
from tests.moments.sampled import exact, near_shared, sampled


def uncertain(*shape, shared=None):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    own = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    if shared is None:
        return Moments(mean, own)
    common = 0.3 + torch.rand(shared, generator=generator, dtype=torch.float64)
    return Moments(mean, own + common, common)


CASES = {
    "dropout": (lambda x: F.dropout(x, 0.3), (2, 3)),
    "torch.dropout": (lambda x: torch.dropout(x, 0.3, True), (2, 3)),
    "1d": (lambda x: F.dropout1d(x, 0.4), (2, 2, 3)),
    "1d, one example": (lambda x: F.dropout1d(x, 0.4), (2, 3)),
    "2d": (lambda x: F.dropout2d(x, 0.4), (1, 3, 2, 2)),
    "3d": (lambda x: F.dropout3d(x, 0.4), (1, 2, 2, 1, 2)),
    "feature": (lambda x: torch.feature_dropout(x, 0.2, True), (1, 3, 2, 2)),
    "alpha": (lambda x: F.alpha_dropout(x, 0.2, True), (2, 3)),
    "feature alpha": (lambda x: F.feature_alpha_dropout(x, 0.2, True), (1, 3, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_moments_are_those_of_input_and_mask(name):
    function, shape = CASES[name]
    exact(function, uncertain(*shape))
    with settings(covariance="diagonal"):
        assert parts(function(uncertain(*shape))).shared is None


@pytest.mark.parametrize("name", CASES)
def test_positions_share_what_they_shared_and_a_common_mask(name):
    function, shape = CASES[name]
    units = 1 if name == "1d, one example" or len(shape) == 2 else 2
    shared = (*shape[:units], *(1,) * (len(shape) - units))
    x = uncertain(*shape, shared=shared)
    flat = Moments(torch.full(shape, 0.7).double(), *parts(x)[1:])  # so that the square of the mean is the mean square
    result = exact(function, flat)
    near_shared(result, sampled(function, flat), tolerance=0.02)


def test_a_common_mask_makes_independent_positions_share():
    for function, shape in ((F.dropout1d, (1, 2, 40)), (F.dropout2d, (1, 2, 6, 6))):
        x = Moments(parts(uncertain(*shape)).mean + 0.7, uncertain(*shape).variance)
        near_shared(function(x), sampled(function, x, num_samples=20_000), tolerance=0.04)


def test_outside_training_nothing_happens():
    x = uncertain(2, 3, 4)
    for layer in (nn.Dropout(0.5), nn.Dropout1d(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5)):
        assert layer.eval()(x) is x
    assert F.dropout(x, 0.0) is x


def test_all_dropped_is_nothing_and_certain():
    result = F.dropout(uncertain(2, 3), 1.0)
    assert not torch.Tensor(result.mean).any()
    assert not result.variance.any()


def test_in_place():
    for write, function in (
        (lambda x: F.dropout(x, 0.3, inplace=True), lambda x: F.dropout(x, 0.3)),
        (lambda x: torch.dropout_(x, 0.3, True), lambda x: F.dropout(x, 0.3)),
        (lambda x: F.dropout2d(x, 0.3, inplace=True), lambda x: F.dropout2d(x, 0.3)),
    ):
        x = uncertain(1, 2, 2, 2)
        assert write(x) is x
        torch.testing.assert_close(x.variance, function(uncertain(1, 2, 2, 2)).variance)


@pytest.mark.parametrize("name", ["dropout", "2d", "alpha"])
def test_gradients(name):
    function, shape = CASES[name]
    units = 1 if len(shape) == 2 else 2
    given = parts(uncertain(*shape, shared=(*shape[:units], *(1,) * (len(shape) - units))))
    given = [part.detach().requires_grad_() for part in given]
    assert gradcheck(lambda *given: tuple(parts(function(Moments(*given)))), given)


def test_along_directions_of_a_low_rank_covariance():
    torch.manual_seed(0)
    mean, directions, residual = (
        torch.randn(1, 3, 4).double(),
        torch.randn(64, 1, 3, 4).double() / 8,
        torch.ones(1, 3, 4),
    )
    x = Moments.along(mean, directions, residual.double())
    whole = Moments(mean, x.variance)
    for function in (lambda x: F.dropout(x, 0.3), lambda x: F.alpha_dropout(x, 0.3, True)):
        result, expected = function(x), function(whole)
        torch.testing.assert_close(result.variance, expected.variance)
        assert (result.directions / directions - (result.directions / directions).mean()).abs().max() < 1e-9
    result, expected = F.dropout1d(x, 0.3), F.dropout1d(whole, 0.3)
    assert (result.variance / expected.variance - 1).abs().max() < 0.5  # as random as 64 samples
    position = result.directions - directions  # the mask's share: all positions of a channel move together
    torch.testing.assert_close(position / mean, (position / mean)[..., :1].expand(64, 1, 3, 4))


def drop_path(x, keep):
    """Stochastic depth as timm writes it."""
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
    return x * mask.div_(keep)


def test_drop_path_draws_its_mask():
    torch.manual_seed(0)
    x = uncertain(200, 2)
    result = drop_path(x, 0.75)
    kept = result.variance[:, 0] > 0
    assert 120 < kept.sum() < 180
    torch.testing.assert_close(result.variance[kept], x.variance[kept] / 0.75**2)


def test_what_is_made_in_the_likeness_of_an_uncertain_tensor_is_certain():
    x = Moments(torch.randn(2, 3, dtype=torch.bfloat16), torch.ones(2, 3))
    made = (torch.zeros_like(x), torch.ones_like(x), torch.empty_like(x), torch.full_like(x, 2.0), torch.rand_like(x))
    made += (torch.randn_like(x), x.new_zeros(2, 3), x.new_ones((2, 3)), x.new_full((2, 3), 1.0), x.new_empty(2, 3))
    made += (x.new_tensor([[1.0] * 3] * 2), torch.randint_like(x, 3))
    for tensor in made:
        assert type(tensor) is torch.Tensor
        assert tensor.shape == (2, 3)
        assert tensor.dtype == torch.bfloat16
    assert torch.ones_like(x, dtype=torch.bool).dtype == torch.bool
    assert (made[3] == 2).all()
