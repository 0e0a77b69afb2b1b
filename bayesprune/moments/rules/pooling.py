"""Rules for weighted sums over positions: average pooling, interpolation, sliding blocks, sampling at places.

With weights w of an output position, var = sum w^2 (v - s) + (sum w)^2 s, where s is what the positions share: exact,
as s is the same for all pairs of them. What overlapping windows, or copies of a pixel, have in common beyond it is not
followed: the variance of a global mean behind one is too small by the order of (v - s) / number of positions.
No product, but for one small product per dimension behind linear and cubic interpolation.

With weights w of the four pixels around a place, var = sum w^2 (v - s) + (sum w)^2 s, where s is what pixels share; an
uncertain place adds the slope of the image there, squared, times its variance: first order.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesprune.moments.covariance import aligned, is_tracked
from bayesprune.moments.registry import register_rule
from bayesprune.moments.tensor import Moments, parts


def over_positions(x: Moments, mean: Tensor, maps: Sequence[Tensor], squared: Callable[[Tensor], Tensor]) -> Moments:
    """The result of a linear map over the last dimensions that acts on each of them alone.

    Args:
        x: (..., *spatial).
        mean: The map of its mean.
        maps: The map's matrix (O, I) for each of the dimensions.
        squared: The map with squared weights.
    """
    before, variance, shared = parts(x)
    assert variance is not None, "a rule is for uncertain tensors"
    if shared is None:
        return Moments(mean, squared(variance))
    shared = aligned(shared, before.dim())
    common, alone = shared, variance - shared
    for dim, weights in zip(range(-len(maps), 0), maps, strict=True):
        if shared.shape[dim] == 1:
            sums = weights.sum(1)
            common = common * sums.square().reshape(-1, *(1,) * (-dim - 1))
            shared = shared * sums.mean().square()
        else:
            common, shared = (_along(part, weights.square(), dim) for part in (common, shared))
    return Moments(mean, (squared(alone) + common).clamp_min(0), shared)


def average(
    x: Moments, pool: Callable[[Tensor], Tensor], windows: list[Callable[[Tensor, int], list[Tensor]]]
) -> Moments:
    """Average pooling over the last dimensions.

    Args:
        x: (..., *spatial).
        pool: The torch function with its options.
        windows: For each dimension, what maps the numbers 0 ... O - 1 and the input's size I to the starts, ends and
            divisors of its windows.
    """
    before, variance, _ = parts(x)
    assert variance is not None, "a rule is for uncertain tensors"
    mean, num_spatial = pool(before), len(windows)
    maps, divisor = list[Tensor](), torch.ones((), dtype=variance.dtype, device=mean.device)
    for dim, window in zip(range(-num_spatial, 0), windows, strict=True):
        start, stop, count = window(torch.arange(mean.shape[dim], device=mean.device), before.shape[dim])
        entries = torch.arange(before.shape[dim], device=mean.device)
        inside = (entries >= start[:, None]) & (entries < stop[:, None])
        maps.append(inside.to(variance.dtype) / count[:, None])
        divisor = divisor * count.reshape(-1, *(1,) * (-dim - 1))
    return over_positions(x, mean, maps, lambda part: pool(part) / divisor)


@register_rule(F.interpolate)
def interpolate(
    input: Moments,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Moments:
    """To another size. Copies of a single position share all that it has."""
    before, variance, shared = parts(input)
    assert variance is not None, "a rule is for uncertain tensors"
    num_spatial = before.dim() - 2
    scale = _each(scale_factor, num_spatial)
    options = {"mode": mode, "align_corners": align_corners, "recompute_scale_factor": recompute_scale_factor}
    options["antialias"] = antialias
    mean = F.interpolate(before, size, scale_factor, **options)
    if all(length == 1 for length in before.shape[2:]) and is_tracked():
        return Moments(mean, variance.expand(mean.shape), variance)
    if mode == "area":
        return _adaptive_average(input, partial(F.interpolate, size=mean.shape[2:], mode="area"), num_spatial)
    if mode.startswith("nearest"):

        def copied(part: Tensor) -> Tensor:
            return F.interpolate(part, size, scale_factor, **options)

        if shared is not None:
            shared = aligned(shared, before.dim())
            kept = [1 if shared.shape[d] == 1 else mean.shape[d] for d in range(before.dim())]
            shared = copied(shared.expand(before.shape))[tuple(slice(length) for length in kept)]
        return Moments(mean, copied(variance), shared)
    maps = []
    for i, length in enumerate(before.shape[2:]):
        # Other dimensions have size 2 and keep it: with 1 the smoothed modes give a wrong result (torch 2.15, CPU).
        shape, own_size, own_scale = ([2] * num_spatial for _ in range(3))
        shape[i], own_size[i], own_scale = length, mean.shape[2 + i], [1.0] * num_spatial
        eye = torch.eye(length, dtype=variance.dtype, device=mean.device)
        eye = eye.reshape(length, 1, *(length if d == i else 1 for d in range(num_spatial))).expand(-1, -1, *shape)
        if scale is not None:
            own_scale[i] = scale[i]
        weights = F.interpolate(
            eye.contiguous(), *((own_size, None) if scale is None else (None, own_scale)), **options
        )
        maps.append(weights.movedim(2 + i, 1).flatten(2)[..., 0].T)

    def squared(part: Tensor) -> Tensor:
        for dim, weights in zip(range(-num_spatial, 0), maps, strict=True):
            part = _along(part, weights.square(), dim)
        return part

    return over_positions(input, mean, maps, squared)


@register_rule(F.unfold)
def unfold(input: Moments, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Moments:
    """Windows (N, C K, L) of an image (N, C, H, W), tap by tap: the taps of a channel are taken as different units."""
    before, variance, shared = parts(input)
    assert variance is not None, "a rule is for uncertain tensors"

    def windows(part: Tensor) -> Tensor:
        return F.unfold(part, kernel_size, dilation, padding, stride)

    mean, variance = windows(before), windows(variance)
    if shared is None:
        return Moments(mean, variance)
    shared = aligned(shared, before.dim())
    if shared.shape[-2:] != (1, 1):
        return Moments(mean, variance, windows(shared.expand(before.shape)))
    reach = windows(variance.new_ones(1, 1, *before.shape[2:])).mean(-1, keepdim=True).square()
    spread = shared.flatten(2).expand(-1, before.shape[1], -1).unsqueeze(2) * reach
    return Moments(mean, variance, spread.flatten(1, 2))


@register_rule(F.fold)
def fold(
    input: Moments, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Moments:
    """Sums (N, C, H, W) of overlapping windows (N, C K, L), whose taps are taken as different units."""
    before, variance, shared = parts(input)
    assert variance is not None, "a rule is for uncertain tensors"

    def summed(part: Tensor) -> Tensor:
        return F.fold(part, output_size, kernel_size, dilation, padding, stride)

    mean, variance = summed(before), summed(variance)
    if shared is None:
        return Moments(mean, variance)
    shared = aligned(shared, before.dim())
    if shared.shape[-1] != 1:
        return Moments(mean, variance, summed(shared.expand(before.shape)))
    taps = before.shape[1] // mean.shape[1]
    eye = torch.eye(taps, dtype=variance.dtype, device=mean.device).unsqueeze(-1).expand(-1, -1, before.shape[-1])
    reach = summed(eye.contiguous()).mean((1, 2, 3)).square()
    shared = shared.expand(-1, before.shape[1], -1).unflatten(1, (-1, taps)).squeeze(-1) @ reach
    return Moments(mean, variance, shared[..., None, None])


def _along(x: Tensor, weights: Tensor, dim: int) -> Tensor:
    """A matrix (O, I) applied along a dimension."""
    with torch.autocast(x.device.type, enabled=False):
        return (x.movedim(dim, -1) @ weights.T).movedim(-1, dim)


def _each(option: Any, count: int) -> list[Any] | None:
    if option is None:
        return None
    return [option] * count if isinstance(option, int | float) else list(option) * (count // len(option))


def _adaptive_average(x: Moments, pool: Callable[[Tensor], Tensor], num_spatial: int) -> Moments:
    lengths = pool(parts(x).mean).shape[-num_spatial:]

    def window(length: int) -> Callable[[Tensor, int], list[Tensor]]:
        def cut(number: Tensor, size: int) -> list[Tensor]:
            start, stop = number * size // length, -((-(number + 1) * size) // length)
            return [start, stop, stop - start]

        return cut

    return average(x, pool, [window(length) for length in lengths])


def _register_average(num_spatial: int) -> None:
    name = f"avg_pool{num_spatial}d"
    stock, stock_adaptive = getattr(F, name), getattr(F, f"adaptive_{name}")

    def rule(
        input: Moments,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Moments:
        stride = kernel_size if stride is None or stride == [] else stride
        geometry = [_each(option, num_spatial) or [] for option in (kernel_size, stride, padding)]
        divisor = {} if divisor_override is None else {"divisor_override": divisor_override}

        def window(kernel: int, step: int, border: int, fixed: int | None) -> Callable[[Tensor, int], list[Tensor]]:
            def cut(number: Tensor, size: int) -> list[Tensor]:
                start = number * step - border
                stop = (start + kernel).clamp_max(size + border)
                count = stop - start if count_include_pad else stop.clamp_max(size) - start.clamp_min(0)
                return [start, stop, count if fixed is None else torch.full_like(count, fixed)]

            return cut

        fixed = [divisor_override, *[None if divisor_override is None else 1] * (num_spatial - 1)]
        windows = [window(*sizes) for sizes in zip(*geometry, fixed, strict=True)]
        return average(
            input, lambda x: stock(x, kernel_size, stride, padding, ceil_mode, count_include_pad, **divisor), windows
        )

    def adaptive_rule(input: Moments, output_size: Any) -> Moments:
        return _adaptive_average(input, lambda x: stock_adaptive(x, output_size), num_spatial)

    register_rule(stock)(rule)
    register_rule(stock_adaptive)(adaptive_rule)


for _num_spatial in (1, 2, 3):
    _register_average(_num_spatial)


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
