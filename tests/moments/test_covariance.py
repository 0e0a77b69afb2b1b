import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bayesprune as bp
from bayesprune.moments import Moments, parts
from tests.moments.sampled import sampled
from tests.moments.test_linear import CASES, rand, uncertain

NUM_DIRECTIONS = 4


def along(*shape: int, seed: int = 0, residual: float | None = None) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    directions = 0.3 * torch.randn(NUM_DIRECTIONS, *shape, generator=generator, dtype=torch.float64)
    return Moments.along(mean, directions, None if residual is None else torch.full_like(mean, residual))


WEIGHT = torch.randn(5, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
FUNCTIONS = {
    "linear": lambda x: F.linear(x, WEIGHT),
    "conv": lambda x: F.conv1d(x[:, None], WEIGHT[:2, None, :3]),
    "mean": lambda x: x.mean(1),
    "affine": lambda x: 2 * x - WEIGHT[:3],
    "permute": lambda x: x.T.reshape(2, 6).flip(0),
    "cat": lambda x: torch.cat([x, WEIGHT[:2]]),
    "pieces": lambda x: x.chunk(2, 1)[1],
    "select": lambda x: torch.where(WEIGHT[:3] > 0, x, 1.0),
    "batch norm": lambda x: F.batch_norm(x, WEIGHT[0], WEIGHT[1].abs()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_linear_functions_are_exact(name):
    """Directions go through a function as the differences that they are; their outer products are the covariance."""
    x, function = along(3, 4), FUNCTIONS[name]
    result = function(x)
    mean = x.mean.clone()
    differences = torch.stack([function(mean + u) - function(mean) for u in x.directions])
    torch.testing.assert_close(result.directions, differences)
    torch.testing.assert_close(result.variance, differences.square().sum(0))
    torch.testing.assert_close(result.mean + 0, function(mean))


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: a + b,
        lambda a, b: a - b[:1],
        lambda a, b: a * b,
        lambda a, b: torch.where(WEIGHT[:3] > 0, a, b),
        lambda a, b: a @ b.T,
        lambda a, b: F.layer_norm(a, (4,)) + b,
        lambda a, b: F.softmax(a, -1) * b,
    ],
)
def test_functions_of_two_tensors_pass_on_their_derivative(function):
    a, b = along(3, 4), along(3, 4, seed=1)
    result, step = function(a, b), 1e-6
    ma, mb = a.mean + 0, b.mean + 0
    pairs = zip(a.directions, b.directions, strict=True)
    differences = [(function(ma + step * u, mb + step * v) - function(ma - step * u, mb - step * v)) for u, v in pairs]
    torch.testing.assert_close(result.directions, torch.stack(differences) / (2 * step), rtol=1e-5, atol=1e-7)
    assert (result.variance >= result.directions.square().sum(0) - 1e-12).all()


def test_a_difference_of_the_same_noise_is_certain():
    """What independent numbers would get wrong: (x + y) - x has the variance of y."""
    x, y = along(3, 4), along(3, 4, seed=1)
    torch.testing.assert_close(((x + y).relu() * 0 + (x + y) - x).variance, y.variance)


def test_elementwise_functions_keep_the_whole_variance():
    """Directions are scaled by the mean slope, and the residual takes what the slope does not explain."""
    x = along(3, 4, residual=0.1)
    result = F.relu(x)
    independent = F.relu(Moments(x.mean + 0, x.variance))
    torch.testing.assert_close(result.mean + 0, independent.mean + 0)
    torch.testing.assert_close(result.variance, independent.variance)


def test_residual_goes_by_the_rule_for_independent_numbers():
    x = along(3, 4, residual=0.1)
    result = F.linear(x, WEIGHT)
    expected = F.linear(Moments(x.mean + 0, torch.full((3, 4), 0.1)), WEIGHT).variance
    torch.testing.assert_close(result.variance - result.directions.square().sum(0), expected)


@pytest.mark.parametrize("name", ["tokens", "conv2d", "grouped", "transposed"])
def test_directions_of_weights_have_their_covariance(name):
    """Over many draws: the variance of each entry, and what two positions have in common, as by sampled weights."""
    function, *shapes = CASES[name]
    x, weight, bias = rand(*shapes[0]), uncertain(*shapes[1], seed=1), uncertain(*shapes[2], seed=2)
    found = sampled(lambda w, b: function(x, w, b), weight, bias, num_samples=50_000)
    with bp.moments.settings(covariance="low_rank", num_directions=4000):
        result = function(x, weight, bias)
    assert result.directions.shape == (4000, *found.mean.shape)
    ratio = result.variance / found.variance
    print(ratio.min(), ratio.max())
    assert (ratio - 1).abs().max() < 5 * (2 / 4000) ** 0.5 + 0.03
    ends = found.values.flatten(1)[:, [0, -1]]
    expected = (ends - ends.mean(0)).prod(1).mean()
    got = result.directions.flatten(1)[:, [0, -1]].prod(1).sum()
    spread = found.variance.flatten()[[0, -1]].prod().sqrt()
    assert (got - expected).abs() / spread < 5 * (2 / 4000) ** 0.5


def correlated_net() -> nn.Module:
    """Positions that are alike, summed at the end: independent numbers lose nearly all of its variance."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    return bp.to_variational(model.eval(), relative_std=0.1, filter_fn=lambda module, name: name == "0")


def test_against_weight_samples():
    """On a net whose noise adds up: within the spread of the directions, where the diagonal is far off."""
    model, x = correlated_net(), torch.rand(6, 1, 8, 8)
    torch.manual_seed(1)
    sampled = bp.predict(model, x, num_samples=1000).variance
    medians = {}
    for covariance in ("diagonal", "shared", "low_rank"):
        with bp.moments.settings(covariance=covariance, num_directions=256):
            medians[covariance] = (bp.predict(model, x, method="moments").variance / sampled).median().item()
    print(medians)
    assert medians["diagonal"] < 0.6
    assert 0.8 < medians["low_rank"] < 1.25
    assert abs(medians["shared"] - 1) < abs(medians["diagonal"] - 1)


def test_gradients_reach_means_and_stds():
    model, x = correlated_net(), torch.rand(2, 1, 8, 8)
    with bp.sampling(model, "moments"), bp.moments.settings(covariance="low_rank", num_directions=2):
        mean, variance, _ = parts(model(x))
    (mean.sum() + variance.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model[0].weight_log_std.grad.abs().sum() > 0


def test_draws_follow_the_generator():
    model, x = correlated_net(), torch.rand(2, 1, 8, 8)
    with bp.moments.settings(covariance="low_rank"):
        torch.manual_seed(0)
        first, second = (bp.predict(model, x, method="moments").variance for _ in range(2))
        torch.manual_seed(0)
        again = bp.predict(model, x, method="moments").variance
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
