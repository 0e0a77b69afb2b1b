"""Images at places of their own, against samples."""

import pytest
import torch
import torch.nn.functional as F

from bayesprune.moments import Moments
from tests.moments.sampled import exact, near

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
