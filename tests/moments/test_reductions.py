"""Sums, means, variances and norms against draws."""

import pytest
import torch
import torch.nn.functional as F

from bayesprune.moments import Moments, parts
from tests.moments.sampled import exact, near, near_shared, sampled


def uncertain(*shape: int, shared: tuple[int, ...] | None = None, seed: int = 0, variance: float = 0.5) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    own = variance * (0.5 + torch.rand(shape, generator=generator, dtype=torch.float64))
    if shared is None:
        return Moments(mean, own)
    common = variance * (0.5 + torch.rand(shared, generator=generator, dtype=torch.float64))
    return Moments(mean, own + common, common)


LINEAR = {
    "sum": lambda x: x.sum(),
    "sum over one": lambda x: x.sum(1),
    "sum over two": lambda x: torch.sum(x, (0, -1), keepdim=True),
    "mean": lambda x: torch.mean(x),
    "mean over one": lambda x: x.mean(-1),
    "mean over two": lambda x: x.mean(dim=[1, 2], keepdim=True),
    "axis": lambda x: x.mean(axis=1),
    "no dimensions": lambda x: x.sum(()),
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("shared", [None, (2, 1, 4), (2, 1, 1)])
def test_linear_reductions(name, shared):
    exact(LINEAR[name], uncertain(2, 3, 4, shared=shared), num_samples=50_000)


def test_what_is_left_of_positions_stays_shared():
    x = uncertain(2, 3, 4, 5, shared=(2, 3, 1, 1))
    result = x.mean(3)
    assert result.shared.shape == (2, 3, 1)
    near_shared(result, sampled(lambda t: t.mean(3), x, num_samples=50_000), tolerance=0.03)


def test_the_mean_of_tokens_behind_a_layer_is_exact():
    """All of its noise is in the weights, which every token meets."""
    x, weight = torch.randn(2, 5, 4, dtype=torch.float64), uncertain(3, 4, seed=1)
    exact(lambda w: F.linear(x, w).mean(1), weight, num_samples=50_000)


ROUGH = {
    "var": (lambda x: x.var(1), 0.2, 0.15),
    "var, biased": (lambda x: torch.var(x, 1, correction=0), 0.2, 0.15),
    "var, unbiased=False": (lambda x: x.var(1, False, True), 0.2, 0.15),
    "var of all": (lambda x: x.var(unbiased=False), 0.1, 0.15),
    "var_mean": (lambda x: torch.var_mean(x, dim=1)[0], 0.2, 0.15),
    "std": (lambda x: torch.std(x, dim=1, keepdim=True), 0.2, 0.15),
    "vector_norm": (lambda x: torch.linalg.vector_norm(x, dim=1), 0.15, 0.15),
    "norm": (lambda x: x.norm(p=2, dim=1, keepdim=True), 0.15, 0.15),
    "norm of all": (lambda x: torch.norm(x), 0.15, 0.15),
}


@pytest.mark.parametrize("name", ROUGH)
@pytest.mark.parametrize("shared", [None, (3, 1)])
def test_first_order(name, shared):
    function, mean, variance = ROUGH[name]
    x = uncertain(3, 8, shared=shared, variance=0.05)
    result = near(function, x, mean=mean, variance=variance, num_samples=20_000)
    assert result.shape == function(parts(x).mean).shape


def test_the_mean_beside_a_variance():
    x = uncertain(3, 8)
    torch.testing.assert_close(parts(torch.var_mean(x, 1)[1]), parts(x.mean(1)))


def test_norms_of_another_order_are_told():
    with pytest.raises(NotImplementedError, match="a norm of order 0 has no rule; expected a positive number"):
        torch.linalg.vector_norm(uncertain(2, 3), 0)


def test_gradients_are_finite_at_zero():
    mean = torch.zeros(2, 3, requires_grad=True)
    result = torch.linalg.vector_norm(Moments(mean, torch.zeros(2, 3)), dim=1)
    (result.mean.sum() + result.variance.sum()).backward()
    assert mean.grad.isfinite().all()


def test_numpys_names_of_arguments():
    x = uncertain(3, 8)
    assert torch.sum(x, axis=0, keepdims=True).shape == x.mean(axis=0, keepdims=True).shape == (1, 8)
