import pytest
import torch

import bayesprune as bp
from bayesprune.moments import Moments, parts
from tests.moments.sampled import exact, near, near_shared, sampled


def example(*shape: int, seed: int = 0, shared: tuple[int, ...] | None = None) -> Moments:
    generator = torch.Generator().manual_seed(seed)

    def rand(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    mean = 2 * rand(*shape) - 0.5
    if shared is None:
        return Moments(mean, 0.2 * rand(*shape) + 0.05)
    common = 0.1 * rand(*shared) + 0.05
    return Moments(mean, common + 0.1 * rand(*shape), common)


CERTAIN = torch.linspace(-1, 2, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 3,
        lambda x: 3 + x,
        lambda x: x - CERTAIN,
        lambda x: CERTAIN - x,
        lambda x: 2 - x,
        lambda x: torch.rsub(x, 1, alpha=2),
        lambda x: torch.add(x, CERTAIN, alpha=-2),
        lambda x: x * CERTAIN,
        lambda x: CERTAIN * x,
        lambda x: x / 4,
        lambda x: x / (CERTAIN + 2),
        lambda x: -x,
        lambda x: torch.addcmul(x, CERTAIN, CERTAIN, value=2),
        lambda x: x.masked_fill(CERTAIN > 0, 7.0),
        lambda x: torch.where(CERTAIN > 0, x, 0.0),
        lambda x: x**2,
        lambda x: x + CERTAIN.reshape(3, 1, 1),
        lambda x: x[:, :1] * CERTAIN.reshape(1, 3),
    ],
)
def test_with_certain_operands(function):
    exact(function, example(4, 3))


@pytest.mark.parametrize(
    "function",
    [
        torch.add,
        lambda a, b: torch.sub(a, b, alpha=0.5),
        torch.mul,
        lambda a, b: torch.addcmul(a, b, CERTAIN),
        lambda a, b: torch.where(CERTAIN > 0, a, b),
        lambda a, b: a[:, :1] * b,
        lambda a, b: a[:1] + b,
    ],
)
def test_of_two_independent_tensors(function):
    exact(function, example(4, 3), example(4, 3, seed=1))


def test_quotients():
    """The reciprocal as that of a positive, log-normal number."""
    a, b = example(4, 3), example(4, 3, seed=1)
    near(torch.div, a, Moments(b.mean + 3, b.variance), mean=0.01, variance=0.05)
    near(lambda t: 1 / (t + 4), a, mean=0.01, variance=0.05)
    near(lambda t: 2**t, a, mean=0.01, variance=0.01)


def test_of_one_origin():
    x = example(4, 3)
    exact(lambda t: t + t, x)
    exact(lambda t: t - t * 0.5, x)
    near(lambda t: t.exp() / (1 + t.exp()), x, mean=0.01, variance=0.01)
    near(lambda t: t.sigmoid() ** (t + 0.0), x, mean=0.01, variance=0.01)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (torch.add, ((2, 3, 5), (2, 3, 5))),
        (torch.mul, ((2, 3, 5), (2, 3, 5))),
        (lambda a, b: a * 2 + b, ((2, 3, 5), (2, 3, 5))),
    ],
)
def test_shared_covariance_of_two_tensors(function, shapes):
    """What is computed counts each position with itself too, hence an error of the order of 1 / positions."""
    a, b = example(*shapes[0], shared=(2, 3, 1)), example(*shapes[1], seed=1, shared=(2, 3, 1))
    result = exact(function, a, b)
    assert result.shared.shape == (2, 3, 1)
    near_shared(result, sampled(function, a, b), tolerance=0.1)


def test_what_spreads_over_positions_shares_its_variance():
    """A gate (N, C, 1) times a map (N, C, P): the gate's noise is the same at every position."""
    gate, x = example(2, 3, 1), torch.rand(2, 3, 5, dtype=torch.float64)
    result = exact(torch.mul, gate, x)
    near_shared(result, sampled(torch.mul, gate, x), tolerance=0.1)
    both = exact(torch.mul, gate, example(2, 3, 5, seed=1, shared=(2, 3, 1)))
    assert both.shared.shape == (2, 3, 1)
    with bp.moments.settings(covariance="diagonal"):
        assert (gate * x).shared is None


def test_a_scale_over_positions_dilutes_what_they_share():
    x, scale = example(2, 3, 4, shared=(2, 3, 1)), torch.tensor([1.0, 0, 0, 1], dtype=torch.float64)
    result = exact(lambda t: t * scale, x)
    near_shared(result, sampled(lambda t: t * scale, x), tolerance=0.2)
    torch.testing.assert_close(result.shared, x.shared / 4)


def test_refusals():
    x = example(3)
    with pytest.raises(NotImplementedError, match="power of two independent"):
        x ** example(3, seed=1)
    with pytest.raises(NotImplementedError, match="rounding_mode"):
        torch.div(x, 2, rounding_mode="floor")


@pytest.mark.parametrize("function", [torch.add, torch.mul, lambda a, b: torch.where(CERTAIN > 0, a, b)])
def test_gradients(function):
    a, b = example(2, 3, shared=(2, 1)), example(2, 3, seed=1, shared=(2, 1))

    def flat(*tensors):
        return tuple(p for p in parts(function(Moments(*tensors[:3]), Moments(*tensors[3:]))) if p is not None)

    inputs = [part.clone().requires_grad_() for x in (a, b) for part in parts(x)]
    assert torch.autograd.gradcheck(flat, inputs)
