"""Cumulative sums and products, differences, triangles, linear equations: against samples."""

import pytest
import torch

from bayesprune.moments import Moments
from tests.moments.sampled import exact, near, near_shared, sampled


def example(*shape: int, shared: tuple[int, ...] | None = None, seed: int = 0) -> Moments:
    generator = torch.Generator().manual_seed(seed)

    def positive(size: tuple[int, ...]) -> torch.Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64) + 0.1

    mean, own = torch.randn(shape, generator=generator, dtype=torch.float64), positive(shape)
    common = None if shared is None else positive(shared)
    return Moments(mean, own if common is None else own + common, common)


@pytest.mark.parametrize("shared", [None, (2, 1, 3), (1, 5, 1)])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.cumsum(1),
        lambda x: torch.cumsum(x, dim=-2, dtype=torch.float64),
        lambda x: torch.diff(x, dim=1),
        lambda x: torch.tril(x),
        lambda x: x.triu(1),
    ],
    ids=["cumsum", "torch.cumsum", "diff", "tril", "triu"],
)
def test_linear_maps_along_a_dimension(function, shared):
    exact(function, example(2, 5, 3, shared=shared))


def test_cumulative_sums_share():
    x = example(2, 5, 3, shared=(2, 1, 3))
    near_shared(x.cumsum(1), sampled(lambda t: t.cumsum(1), x), tolerance=0.35)
    assert x.cumsum_(1) is x


def test_products_of_independent_entries():
    x = example(2, 4)
    near(lambda t: t.cumprod(1), x, mean=0.01, variance=0.05)
    near(lambda t: torch.prod(t, 1, keepdim=True), x, mean=0.01, variance=0.05)
    near(lambda t: t[0, :3].prod(), x, mean=0.01, variance=0.05)


def test_a_difference_of_neighbours_with_a_start():
    x, start = example(2, 4), torch.zeros(2, 1, dtype=torch.float64)
    exact(lambda t: torch.diff(t, prepend=start), x)
    exact(lambda t: torch.trace(t), example(3, 3))


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("unitriangular", [False, True])
@pytest.mark.parametrize("left", [True, False])
def test_triangular_equations(upper, unitriangular, left):
    mean = torch.eye(4, dtype=torch.float64) * 2 + 0.3 * example(4, 4).mean
    a = Moments(mean, torch.full((4, 4), 1e-4, dtype=torch.float64))
    b = example(4, 2, seed=1) if left else example(2, 4, seed=1)

    def solve(a, b):
        return torch.linalg.solve_triangular(a, b, upper=upper, left=left, unitriangular=unitriangular)

    near(solve, a, b, mean=0.01, variance=0.02)
    exact(solve, mean, b)
    near(solve, a, b.mean + 0, mean=0.05, variance=0.05)


def test_equations_and_inverses():
    mean = torch.eye(3, dtype=torch.float64) * 2 + 0.3 * example(3, 3).mean
    a = Moments(mean, torch.full((3, 3), 1e-4, dtype=torch.float64))
    near(torch.linalg.solve, a, example(3, 2, seed=1), mean=0.01, variance=0.02)
    near(torch.linalg.solve, a, example(3, seed=1), mean=0.01, variance=0.02)
    near(torch.linalg.inv, a, mean=0.05, variance=0.03)
