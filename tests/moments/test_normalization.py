"""Normalisations against draws; batch norm's statistics against those of the stock function."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bayesprune as bp
from bayesprune.moments import Moments, parts, settings
from tests.moments.sampled import exact, near, near_shared, sampled


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uncertain(*shape: int, shared: tuple[int, ...] | None = None, seed: int = 0, variance: float = 0.01) -> Moments:
    own = variance * (0.5 + rand(*shape, seed=seed + 50).abs())
    if shared is None:
        return Moments(rand(*shape, seed=seed), own)
    common = variance * (0.5 + rand(*shared, seed=seed + 60).abs())
    return Moments(rand(*shape, seed=seed), own + common, common)


WEIGHT, BIAS = rand(16, seed=7), rand(16, seed=8)
CASES = {
    "layer_norm": (lambda x: F.layer_norm(x, (16,), WEIGHT, BIAS), (2, 16)),
    "layer_norm over two": (lambda x: F.layer_norm(x, (4, 4)), (2, 4, 4)),
    "rms_norm": (lambda x: F.rms_norm(x, (16,), WEIGHT), (2, 16)),
    "group_norm": (lambda x: F.group_norm(x, 2, WEIGHT[:4], BIAS[:4]), (1, 4, 3, 3)),
    "normalize": (lambda x: F.normalize(x, dim=1), (2, 16)),
    "normalize over the first": (lambda x: F.normalize(x, dim=0), (16, 2)),
    "instance_norm": (lambda x: F.instance_norm(x, weight=WEIGHT[:2], bias=BIAS[:2]), (1, 2, 4, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_independent_entries(name):
    function, shape = CASES[name]
    near(function, uncertain(*shape), mean=0.1, variance=0.05, num_samples=30_000)


def test_an_entry_that_is_the_norm():
    """One feature as large as all others together hardly varies: the divisor moves with it."""
    mean = rand(1, 16) * 0.2
    mean[0, 3] = 12.0
    x = Moments(mean, torch.full((1, 16), 0.01, dtype=torch.float64))
    found = sampled(lambda t: F.layer_norm(t, (16,)), x, num_samples=10_000).variance[0]
    got = F.layer_norm(x, (16,)).variance[0]
    assert found[3] < 0.1 * found.mean()
    assert got[3] < 0.1 * got.mean()
    torch.testing.assert_close(got.sum(), found.sum(), rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_tokens_keep_what_they_share(name):
    function, _ = CASES[name]
    x = uncertain(1, 5, 16, shared=(1, 1, 16))
    scaled = Moments(x.mean * torch.tensor([0.5, 1.0, 2.0, 1.0, 4.0]).reshape(1, 5, 1), x.variance, x.shared)
    for given in (x, scaled):
        result = near(function, given, mean=0.15, variance=0.08, num_samples=20_000)
        near_shared(result, sampled(function, given, num_samples=20_000), tolerance=0.1)


@pytest.mark.parametrize("name", ["group_norm", "instance_norm"])
def test_what_all_positions_share_is_taken_out(name):
    """Wholly where each channel is normalised alone, in part where a group is."""
    function, shape = CASES[name]
    x = uncertain(*shape, shared=(*shape[:2], 1, 1))
    result = near(function, x, mean=0.15, variance=0.25, num_samples=20_000)
    found = sampled(function, x, num_samples=20_000)
    ratio = result.variance.sum() / found.variance.sum()
    print(ratio)
    assert 0.95 < ratio < 1.1
    if name == "instance_norm":
        pooled = result.mean((2, 3)).variance
        assert (pooled < 1e-2 * result.variance.mean()).all()


@pytest.mark.parametrize("shared", [None, (2, 4, 1, 1)])
def test_batch_norm_by_running_statistics(shared):
    x = uncertain(2, 4, 2, 3, shared=shared)

    def function(t):
        return F.batch_norm(t, WEIGHT[:4], WEIGHT[4:8].abs(), BIAS[:4], BIAS[4:8])

    result = exact(function, x, num_samples=50_000)
    if shared:
        near_shared(result, sampled(function, x, num_samples=50_000), tolerance=0.03)


def test_batch_norm_of_torch_takes_its_arguments_in_its_own_order():
    x, options = uncertain(2, 4, 3), (False, 0.1, 1e-5, True)
    exact(
        lambda t: torch.batch_norm(t, BIAS[:4], BIAS[4:8], WEIGHT[:4], WEIGHT[4:8].abs(), *options),
        x,
        num_samples=50_000,
    )


def test_batch_norm_by_the_batch():
    """Its own mean takes out what all examples have in common, as weights make it."""
    x, weight = rand(6, 8, 5, 5).abs(), uncertain(2, 8, 3, 3, seed=3)
    options = {"training": True, "eps": 0.1}
    found = sampled(lambda w: F.batch_norm(F.conv2d(x, w), None, None, **options), weight, num_samples=2_000)
    ratios = {}
    for covariance in ("diagonal", "shared"):
        with settings(covariance=covariance):
            result = F.batch_norm(F.conv2d(x, weight), None, None, **options)
        ratios[covariance] = (result.variance.sum() / found.variance.sum()).item()
    print(ratios)
    assert ratios["diagonal"] > 2
    assert 0.9 < ratios["shared"] < 1.35
    torch.testing.assert_close(result.mean + 0, found.mean, atol=0.05, rtol=0)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("covariance", ["diagonal", "shared", "low_rank"])
def test_running_statistics_are_tracked_once(covariance, norm):
    x = torch.randn(8, 3, 5, 5) + 1
    stock = norm(3, track_running_stats=True).train()
    stock(x)
    layer = norm(3, track_running_stats=True).train()
    model = bp.to_variational(nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), layer), relative_std=1e-6)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3)[..., None, None])
    with bp.sampling(model, "moments"), settings(covariance=covariance):
        model(x)
    assert layer.num_batches_tracked == stock.num_batches_tracked
    torch.testing.assert_close(layer.running_mean, stock.running_mean)
    torch.testing.assert_close(layer.running_var, stock.running_var)


def test_running_variance_has_the_variance_of_entries_in_it():
    x = uncertain(4, 2, 3, 3, variance=1.0)
    running = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    F.batch_norm(x, *running, training=True, momentum=1.0)
    found = sampled(lambda t: t.transpose(0, 1).flatten(1).var(1), x, num_samples=2_000)
    torch.testing.assert_close(running[1], found.mean, rtol=0.05, atol=0)


@pytest.mark.parametrize("shared", [None, (4, 2, 1, 1)])
def test_running_variance_of_instances_has_the_variance_of_their_entries_in_it(shared):
    x = uncertain(4, 2, 3, 3, variance=1.0, shared=shared)
    running = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    F.instance_norm(x, *running, momentum=1.0)
    found = sampled(lambda t: t.flatten(2).var(2).mean(0), x, num_samples=2_000)
    torch.testing.assert_close(running[0], x.mean.mean((0, 2, 3)))
    torch.testing.assert_close(running[1], found.mean, rtol=0.05, atol=0)


def test_directions_through_instance_norm_have_their_derivative():
    directions = rand(3, 2, 2, 2, 2, seed=1)

    def variance(mean):
        return F.instance_norm(Moments.along(mean, directions)).variance

    assert torch.autograd.gradcheck(variance, rand(2, 2, 2, 2).requires_grad_())


def test_uncertain_scales():
    x, weight, bias = uncertain(2, 4), uncertain(4, seed=3), uncertain(4, seed=4)
    statistics = WEIGHT[:4], WEIGHT[4:8].abs()
    exact(lambda *a: F.batch_norm(a[0], *statistics, *a[1:]), x, weight, bias, num_samples=50_000)
    exact(lambda *a: F.batch_norm(x.mean + 0, *statistics, *a), weight, bias, num_samples=50_000)
    near(lambda *a: F.layer_norm(a[0], (4,), *a[1:]), x, weight, bias, mean=0.2, variance=0.15, num_samples=20_000)


def test_without_statistics_is_told():
    with pytest.raises(ValueError, match="training=False and no running statistics"):
        F.batch_norm(uncertain(2, 4), None, None)
    with pytest.raises(NotImplementedError, match="expected p=2 and one dimension"):
        F.normalize(uncertain(2, 4), p=1.0)


def test_half_precision():
    x = Moments(torch.randn(2, 16, dtype=torch.bfloat16), torch.full((2, 16), 1e-3))
    result = F.layer_norm(x, (16,))
    assert result.dtype == torch.bfloat16
    assert result.variance.dtype == torch.float32
    torch.testing.assert_close(parts(result).mean.float().var(1, correction=0), torch.ones(2), atol=0.02, rtol=0)
