"""Weighted sums over positions, and images sampled at places, against samples."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from bayesprune.moments import Moments, parts, settings
from tests.moments.sampled import exact, near, near_shared, sampled


def uncertain(*shape, shared=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    own = 0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)
    if shared is None:
        return Moments(mean, own)
    common = 0.5 + torch.rand(shared, generator=generator, dtype=torch.float64)
    return Moments(mean, own + common, common)


CASES = {
    "1d": (lambda x: F.avg_pool1d(x, 3, 2, 1), (1, 2, 7)),
    "1d, stride 1": (lambda x: F.avg_pool1d(x, 3, stride=1, padding=1, count_include_pad=False), (1, 2, 7)),
    "2d": (lambda x: F.avg_pool2d(x, 2), (1, 2, 4, 4)),
    "2d, padded": (lambda x: F.avg_pool2d(x, 3, 2, 1), (1, 2, 5, 4)),
    "2d, valid counts": (lambda x: F.avg_pool2d(x, 3, 2, 1, False, False), (1, 2, 5, 4)),
    "2d, ceil": (lambda x: F.avg_pool2d(x, (3, 2), 2, ceil_mode=True), (1, 2, 4, 5)),
    "2d, ceil and padded": (lambda x: F.avg_pool2d(x, 3, 2, 1, True), (1, 1, 4, 5)),
    "2d, divisor": (lambda x: F.avg_pool2d(x, 2, 2, divisor_override=3), (1, 2, 4, 4)),
    "2d, without examples": (lambda x: F.avg_pool2d(x, 2), (2, 4, 4)),
    "3d": (lambda x: F.avg_pool3d(x, (2, 1, 2)), (1, 1, 4, 2, 4)),
    "adaptive to one": (lambda x: F.adaptive_avg_pool2d(x, 1), (1, 2, 4, 4)),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, (3, None)), (1, 1, 5, 3)),
    "adaptive 1d": (lambda x: F.adaptive_avg_pool1d(x, 4), (1, 2, 6)),
    "adaptive 3d": (lambda x: F.adaptive_avg_pool3d(x, (1, 2, 2)), (1, 1, 2, 3, 3)),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), (1, 2, 2, 3)),
    "nearest to a size": (lambda x: F.interpolate(x, (3, 5)), (1, 2, 2, 3)),
    "area": (lambda x: F.interpolate(x, (2, 2), mode="area"), (1, 2, 3, 4)),
    "linear": (lambda x: F.interpolate(x, 7, mode="linear"), (1, 2, 4)),
    "bilinear": (lambda x: F.interpolate(x, (5, 4), mode="bilinear"), (1, 1, 3, 3)),
    "bilinear, aligned": (
        lambda x: F.interpolate(x, scale_factor=(2, 1.5), mode="bilinear", align_corners=True),
        (1, 1, 3, 2),
    ),
    "bilinear, smoothed": (lambda x: F.interpolate(x, (2, 3), mode="bilinear", antialias=True), (1, 1, 5, 4)),
    "bicubic": (lambda x: F.interpolate(x, (5, 3), mode="bicubic"), (1, 1, 3, 4)),
    "trilinear": (lambda x: F.interpolate(x, scale_factor=1.5, mode="trilinear"), (1, 1, 2, 2, 2)),
    "unfold": (lambda x: F.unfold(x, 2, padding=1, stride=2), (1, 2, 3, 3)),
    "fold": (lambda x: F.fold(x, (4, 3), 2, padding=1, stride=1), (1, 8, 20)),
}


@pytest.mark.parametrize("name", CASES)
def test_independent_positions(name):
    function, shape = CASES[name]
    exact(function, uncertain(*shape), num_samples=30_000)


@pytest.mark.parametrize("name", [name for name in CASES if name != "fold"])
def test_positions_that_share(name):
    function, shape = CASES[name]
    num_spatial = {"2d, without examples": 2}.get(name, len(shape) - 2)
    x = uncertain(*shape, shared=(*shape[: len(shape) - num_spatial], *(1,) * num_spatial))
    exact(function, x, num_samples=30_000)


@pytest.mark.parametrize("name", ["1d", "2d", "2d, padded", "adaptive", "nearest", "bilinear", "bicubic"])
def test_what_is_shared_is_what_positions_have_in_common(name):
    function, shape = CASES[name]
    x = uncertain(*shape, shared=(*shape[:2], *(1,) * (len(shape) - 2)))
    variance, shared = parts(x)[1:]
    x = Moments(parts(x).mean, shared + 0.05 * (variance - shared), shared)
    near_shared(function(x), sampled(function, x), tolerance=0.03)


def test_blocks_that_share_fold_to_images_that_share():
    x = uncertain(1, 8, 4, shared=(1, 8, 1))
    function = lambda x: F.fold(x, (4, 4), 2, stride=2)  # noqa: E731
    result = exact(function, x)
    assert parts(result).shared.shape == (1, 2, 1, 1)
    near_shared(result, sampled(function, x), tolerance=0.03)
    x = uncertain(1, 1, 8, 8, shared=(1, 1, 1, 1))
    function = CASES["unfold"][0]
    near_shared(function(x), sampled(function, x, num_samples=10_000), tolerance=0.06)


def test_a_dimension_of_units_among_those_pooled():
    """Tokens pooled as an image of one channel: (N, 1, L, D), features share over tokens."""
    x = uncertain(1, 1, 6, 3, shared=(1, 1, 1, 3))
    for kernel in ((2, 1), (2, 3)):
        result = exact(lambda x, kernel=kernel: F.avg_pool2d(x, kernel), x)
        near_shared(result, sampled(lambda x, kernel=kernel: F.avg_pool2d(x, kernel), x), tolerance=0.03)
    exact(lambda x: F.interpolate(x, (3, 2), mode="bilinear"), x)
    result = exact(lambda x: F.interpolate(x, scale_factor=2), x)
    assert parts(result).shared.shape == (1, 1, 1, 6)


def test_copies_of_one_pixel_share_all():
    x = uncertain(1, 2, 1, 1)
    result = exact(lambda x: F.interpolate(x, (3, 2), mode="bilinear"), x)
    near_shared(result, sampled(lambda x: F.interpolate(x, (3, 2)), x), tolerance=0.01)
    exact(lambda x: F.interpolate(x, (3, 2), mode="bilinear").mean((-1, -2)), x)


def test_a_global_mean_keeps_what_is_shared():
    x = uncertain(1, 3, 4, 4, shared=(1, 3, 1, 1))
    pooled, mean = F.adaptive_avg_pool2d(x, 1).flatten(1), x.mean((-1, -2))
    for found, expected in zip(parts(pooled)[:2], parts(mean)[:2], strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_without_variance_the_mean_is_torchs_bit_for_bit(name):
    function, shape = CASES[name]
    mean = torch.randn(shape)
    with settings(covariance="diagonal"):
        result = function(Moments(mean, torch.zeros(shape)))
    assert torch.equal(torch.Tensor(result.mean), function(mean))
    assert (result.variance == 0).all()
    assert parts(result).shared is None


@pytest.mark.parametrize("name", ["2d, padded", "2d, valid counts", "adaptive", "bilinear", "unfold", "fold"])
def test_gradients(name):
    function, shape = CASES[name]
    shared = (*shape[:2], *(1,) * (len(shape) - 2))
    given = [part.detach().requires_grad_() for part in parts(uncertain(*shape, shared=shared))]
    assert gradcheck(lambda *given: tuple(parts(function(Moments(*given)))), given)


def test_half_precision():
    x = Moments(torch.randn(1, 2, 4, 4, dtype=torch.bfloat16), torch.full((1, 2, 4, 4), 1e-8))
    for function in (lambda x: F.avg_pool2d(x, 2), lambda x: F.interpolate(x, (6, 6), mode="bilinear")):
        stock = F.interpolate(x, (6, 6), mode="nearest-exact")
        assert stock.variance.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = function(x)
        assert result.dtype == torch.bfloat16
        assert result.variance.dtype == torch.float32
        assert (result.variance > 0).all()


def test_along_directions_of_a_low_rank_covariance():
    torch.manual_seed(0)
    mean, directions = torch.randn(1, 2, 4, 4), torch.randn(8, 1, 2, 4, 4)
    for name in ("2d, padded", "adaptive to one", "nearest", "bilinear", "unfold"):
        function = CASES[name][0]
        result = function(Moments.along(mean, directions))
        torch.testing.assert_close(result.directions[3], function(directions[3]))


GRID = torch.rand(2, 2, 3, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2.6 - 1.3


def image(shared: tuple[int, ...] | None = None) -> Moments:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 2, 4, 5, generator=generator, dtype=torch.float64)
    own = torch.rand(2, 2, 4, 5, generator=generator, dtype=torch.float64) + 0.1
    common = None if shared is None else torch.rand(shared, generator=generator, dtype=torch.float64) + 0.1
    return Moments(mean, own if common is None else own + common, common)


@pytest.mark.parametrize("shared", [None, (2, 2, 1, 1)])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_uncertain_pixels(mode, corners, padding, shared):
    result = exact(lambda x: F.grid_sample(x, GRID, mode, padding, corners), image(shared))
    assert (result.shared is None) == (shared is None)


@pytest.mark.parametrize("corners", [False, True])
def test_uncertain_places(corners):
    between = torch.tensor([0.2, 0.1], dtype=torch.float64) + 0.03 * GRID  # pixels, where the image has no kinks
    inside = Moments(between, torch.full(GRID.shape, 1e-6, dtype=torch.float64))
    certain = image().mean + 0
    near(lambda g: F.grid_sample(certain, g, align_corners=corners), inside, mean=0.1, variance=0.05)
    near(lambda x, g: F.grid_sample(x, g, align_corners=corners), image(), inside, mean=0.01, variance=0.02)


def test_what_has_no_rule_is_named():
    with pytest.raises(NotImplementedError, match="mode='bicubic', padding_mode='zeros' of 2 dimensions"):
        F.grid_sample(image(), GRID, mode="bicubic", align_corners=False)
