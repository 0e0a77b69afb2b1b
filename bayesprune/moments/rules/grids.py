"""The rule for sampling an image at places of its own, as deformable attention does. No product of matrices.

With weights w of the four pixels around a place, var = sum w^2 (v - s) + (sum w)^2 s, where s is what pixels share; an
uncertain place adds the slope of the image there, squared, times its variance: first order.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesprune.moments.registry import register_rule
from bayesprune.moments.shared import aligned
from bayesprune.moments.tensor import Moments, parts


@register_rule(F.grid_sample)
def grid_sample(
    input: Any, grid: Any, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: bool | None = None
) -> Moments:
    """An image (N, C, H, W) at places (N, P, Q, 2) from -1 to 1: (N, C, P, Q).

    Raises:
        NotImplementedError: the image has three dimensions, or is not interpolated linearly.
    """
    (image, noise, shared), (places, wander, _) = parts(input), parts(grid)
    if image.dim() != 4 or mode not in ("bilinear", "nearest") or padding_mode not in ("zeros", "border"):
        raise NotImplementedError(
            f"moments: grid_sample has no rule for mode={mode!r}, padding_mode={padding_mode!r} of {image.dim() - 2} "
            "dimensions; expected bilinear or nearest, zeros or border, of two."
        )
    mean = F.grid_sample(image, places, mode, padding_mode, align_corners)
    dtype = torch.promote_types(mean.dtype, torch.float32)
    axes = [
        _axis(places[..., i].to(dtype), size, mode, padding_mode, bool(align_corners))
        for i, size in enumerate((image.shape[3], image.shape[2]))
    ]
    (across, along_x, scale_x), (down, along_y, scale_y) = axes
    taps = [
        (row * image.shape[3] + column, wx * wy, dx * wy * scale_x, wx * dy * scale_y)
        for column, wx, dx in zip(across, *along_x, strict=True)
        for row, wy, dy in zip(down, *along_y, strict=True)
    ]
    total = torch.zeros(mean.shape, dtype=dtype, device=mean.device)
    if noise is not None:
        common = _over_pixels(shared, image)
        alone = noise if common is None else (noise - common).clamp_min(0)
        for place, weight, _, _ in taps:
            total = total + weight.square().unsqueeze(1) * _at(alone, place)
        reach = sum(weight for _, weight, _, _ in taps).unsqueeze(1)  # type: ignore[union-attr]
        if common is not None:
            total = total + reach.square() * common
            shared = common * reach.mean((2, 3), keepdim=True).square()
    if wander is not None:
        values = [_at(image.to(dtype), place) for place, *_ in taps]
        for i in (0, 1):
            slope = sum(value * tap[2 + i].unsqueeze(1) for value, tap in zip(values, taps, strict=True))
            total = total + slope.square() * wander[..., i].unsqueeze(1)  # type: ignore[union-attr]
    return Moments(mean, total, shared if noise is not None and _over_pixels(shared, mean) is not None else None)


def _axis(
    place: Tensor, size: int, mode: str, padding_mode: str, align_corners: bool
) -> tuple[list[Tensor], tuple[list[Tensor], list[Tensor]], Tensor]:
    """The pixels at either side of a place, their weights and slopes, and pixels for one unit of the grid."""
    scale = torch.full_like(place, (size - 1) / 2 if align_corners else size / 2)
    pixel = (place + 1) * scale if align_corners else (place + 1) * scale - 0.5
    if padding_mode == "border":
        scale = scale * ((pixel > 0) & (pixel < size - 1))
        pixel = pixel.clamp(0, size - 1)
    if mode == "nearest":
        pixel = pixel.round()
        scale = torch.zeros_like(scale)
    below = pixel.floor()
    share = pixel - below
    numbers, weights, slopes = list[Tensor](), list[Tensor](), list[Tensor]()
    for number, weight, slope in ((below, 1 - share, -1.0), (below + 1, share, 1.0)):
        inside = ((number >= 0) & (number < size)).to(share.dtype)
        numbers.append(number.clamp(0, size - 1).long())
        weights.append(weight * inside)
        slopes.append(slope * inside)
    return numbers, (weights, slopes), scale


def _at(image: Tensor, place: Tensor) -> Tensor:
    """An image (N, C, H, W) at the numbers (N, P, Q) of its pixels: (N, C, P, Q)."""
    index = place.flatten(1).unsqueeze(1).expand(-1, image.shape[1], -1)
    return image.flatten(2).gather(2, index).unflatten(2, place.shape[1:])


def _over_pixels(shared: Tensor | None, image: Tensor) -> Tensor | None:
    """What all pixels of a channel share; None where that is not how it is shared."""
    if shared is None:
        return None
    shared = aligned(shared, image.dim())
    return shared if shared.shape[2:] == (1, 1) else None
