import pytest
import torch
import torch.nn.functional as F

import bayesprune as bp
from bayesprune.moments import Moments, parts
from tests.moments.sampled import exact, near_shared, sampled


def rand(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uncertain(*shape: int, seed: int = 0, variance: float = 0.1) -> Moments:
    return Moments(rand(*shape, seed=seed) - 0.3, variance * (rand(*shape, seed=seed + 50) + 0.1))


CASES = {
    "linear": (F.linear, (2, 4), (3, 4), (3,)),
    "tokens": (F.linear, (2, 3, 4), (3, 4), (3,)),
    "conv1d": (F.conv1d, (2, 2, 5), (3, 2, 3), (3,)),
    "conv2d": (lambda *a: F.conv2d(*a, padding=1, stride=2), (1, 2, 4, 4), (3, 2, 3, 3), (3,)),
    "grouped": (lambda *a: F.conv2d(*a, groups=2, dilation=2), (1, 4, 4, 4), (4, 2, 2, 2), (4,)),
    "depthwise": (lambda *a: F.conv2d(*a, groups=3, padding="same"), (1, 3, 3, 3), (3, 1, 3, 3), (3,)),
    "conv3d": (F.conv3d, (1, 2, 3, 3, 3), (2, 2, 2, 2, 2), (2,)),
    "transposed": (lambda *a: F.conv_transpose2d(*a, stride=2), (1, 2, 3, 3), (2, 3, 2, 2), (3,)),
    "transposed1d": (lambda *a: F.conv_transpose1d(*a, stride=2, groups=2), (1, 4, 3), (4, 2, 3), (4,)),
    "unbatched": (F.conv1d, (2, 5), (3, 2, 3), (3,)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_certain", ["input", "weight", "neither"])
def test_against_samples(name, is_certain):
    """Exact for independent input and weights, tied over positions."""
    function, *shapes = CASES[name]
    x, weight, bias = (uncertain(*shape, seed=i) for i, shape in enumerate(shapes))
    if is_certain == "input":
        x = parts(x).mean
    elif is_certain == "weight":
        weight, bias = parts(weight).mean, parts(bias).mean
    result = exact(function, x, weight, bias, num_samples=50_000)
    assert result.shape == function(*(parts(t).mean for t in (x, weight, bias))).shape


@pytest.mark.parametrize("name", ["tokens", "conv1d", "conv2d", "grouped", "depthwise", "conv3d", "transposed"])
def test_what_positions_share(name):
    """The mean covariance between positions, from weights met everywhere; padding and stride included.

    What is computed counts each position with itself too, hence the excess, of the order of 1 / positions of the rest.
    """
    function, *shapes = CASES[name]
    x, weight, bias = rand(*shapes[0]), uncertain(*shapes[1], seed=1), uncertain(*shapes[2], seed=2)
    result = function(x, weight, bias)
    pooled = sampled(lambda w, b: _over_positions(function(x, w, b), name), weight, bias).variance
    got = _over_positions(result, name)
    ratio = got.variance / pooled
    print(ratio)
    assert ratio.min() > 0.8
    assert ratio.max() < 1.2


def _over_positions(x, name):
    return x.mean(1) if name == "tokens" else x.flatten(2).mean(2)


def test_common_noise_of_the_input_passes_through():
    """Tokens with a common deviation, certain weights: exact."""
    common = rand(2, 1, 4) + 0.1
    x = Moments(rand(2, 5, 4), common + 0.2 * rand(2, 5, 4), common)
    weight = rand(3, 4, seed=3) - 0.5
    near_shared(exact(F.linear, x, weight), sampled(F.linear, x, weight), tolerance=0.05)
    pixels = Moments(rand(1, 2, 4, 4), (rand(1, 2, 1, 1) + 0.1) * torch.ones(4, 4), rand(1, 2, 1, 1) + 0.1)
    kernel = rand(3, 2, 3, 3, seed=3) - 0.3
    result = F.conv2d(pixels, kernel)
    torch.testing.assert_close(result.shared, F.conv2d(pixels.shared, kernel.sum((2, 3), keepdim=True).square()))


@pytest.mark.parametrize("name", ["linear", "tokens", "conv2d", "grouped", "depthwise", "conv3d"])
def test_one_variance_a_unit_needs_no_second_product(name):
    """The cheap sum over squares equals the product with the expanded variances."""
    function, x_shape, w_shape, _ = CASES[name]
    mean, units = rand(*w_shape), rand(w_shape[0], *(1,) * (len(w_shape) - 1), seed=4)
    expanded = units.expand(w_shape)
    x = uncertain(*x_shape)
    cheap, full = (function(x, Moments(mean, v)) for v in (expanded, expanded.contiguous()))
    torch.testing.assert_close(cheap.variance, full.variance)
    assert (cheap.shared is None) == (full.shared is None)
    if cheap.shared is not None:
        torch.testing.assert_close(cheap.shared, full.shared)


def test_nothing_is_shared_where_it_is_not_asked_for():
    function, *shapes = CASES["conv2d"]
    x, weight, bias = (uncertain(*shape, seed=i) for i, shape in enumerate(shapes))
    with bp.moments.settings(covariance="diagonal"):
        assert function(x, weight, bias).shared is None
    assert function(x, weight, bias).shared is not None
    assert F.linear(rand(2, 4), uncertain(3, 4)).shared is None  # no positions


def test_variances_stay_wide_under_autocast():
    x, weight = torch.rand(4, 8), Moments(torch.rand(3, 8), torch.full((3, 8), 1e-9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = F.linear(x, weight)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.variance, x.square().sum(1, keepdim=True).expand(4, 3) * 1e-9)


def test_embedding():
    table, tokens = uncertain(6, 3), torch.tensor([[0, 5], [2, 2]])
    result = F.embedding(tokens, table)
    assert torch.equal(result.mean, F.embedding(tokens, table.mean))
    assert torch.equal(result.variance, F.embedding(tokens, table.variance))


@pytest.mark.parametrize("name", ["tokens", "conv2d", "transposed"])
def test_gradients(name):
    function, *shapes = CASES[name]
    x, weight, bias = (uncertain(*shape, seed=i) for i, shape in enumerate(shapes))
    positions = (shapes[0][0], 1, shapes[0][2]) if name == "tokens" else (*shapes[0][:2], 1, 1)
    inputs = [*parts(x)[:2], rand(*positions), *parts(weight)[:2], *parts(bias)[:2]]

    def flat(*t):
        return tuple(parts(function(Moments(*t[:3]), Moments(*t[3:5]), Moments(*t[5:]))))

    assert torch.autograd.gradcheck(flat, [t.clone().requires_grad_() for t in inputs])
