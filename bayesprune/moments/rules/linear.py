"""Rules for what multiplies an input by weights and adds: linear layers, convolutions and embeddings.

For independent input and weights, var = f(v, M^2) + f(m^2 + v, S) with f the operation, m, v the input's moments and
M, S the weights' (Wu et al., 2019); exact but for the covariance of the inputs, which is neglected. Cost: two products
for a certain input or certain weights, three for both uncertain, two where stds are per channel.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesprune.moments.covariance import (
    aligned,
    collapse,
    is_tracked,
    linearised,
    mean_over,
    products_of_pairs,
    through_weights,
)
from bayesprune.moments.memory import MomentTensors
from bayesprune.moments.registry import follows_directions, register_rule
from bayesprune.moments.settings import is_low_rank
from bayesprune.moments.tensor import Moments, known, parts

Product = Callable[[Tensor, Tensor], Tensor]


@register_rule(F.linear)
@follows_directions
def linear(input: Any, weight: Any, bias: Any = None) -> Moments:
    """Input (N, ..., I), weight (O, I), bias (O)."""
    if known(weight).directions is not None:
        return linearised(F.linear, linear)(input, weight, bias)
    x, w, b = parts(input), parts(weight), parts(bias)
    mean = F.linear(x.mean, w.mean, b.mean)
    if is_low_rank() or known(input).directions is not None:
        return through_weights(F.linear, known(input), w, b, mean, -1)

    def energy(squares: Tensor, variance: Tensor) -> Tensor:
        if collapse(variance).shape[-1] == 1:
            return squares.sum(-1, keepdim=True) * variance[:, 0]
        return F.linear(squares, variance)

    variance = _variance(F.linear, energy, x, w, b.variance)
    if x.mean.dim() < 3:
        return Moments(mean, variance)
    pooled = (x.mean.shape[0], *(1,) * (x.mean.dim() - 2), x.mean.shape[-1])
    return Moments(mean, variance, _shared(F.linear, x, pooled, w.mean, w.variance, b.variance))


def convolution(
    function: Callable[..., Tensor], channels_dim: int, x: Any, weight: Any, bias: Any, options: dict[str, Any]
) -> Moments:
    """A convolution or transposed one: input (N, I, *spatial), weight (O, I / groups, *K) or (I, O / groups, *K)."""
    source, w, b = known(x), parts(weight), parts(bias)
    x, num_spatial, groups = source.parts, w.mean.dim() - 2, options.get("groups", 1)
    ones = (1,) * num_spatial
    mean = function(x.mean, w.mean, b.mean, **options)
    bias_variance = None if b.variance is None else b.variance.reshape(-1, *ones)
    is_batched = x.mean.dim() == num_spatial + 2

    def product(x_: Tensor, weight_: Tensor) -> Tensor:
        if x_.dim() <= num_spatial + 2:
            return function(x_, weight_, None, **options)
        return function(x_.flatten(0, 1), weight_, None, **options).unflatten(0, x_.shape[:2])

    if is_low_rank() or source.directions is not None:
        return through_weights(product, source, w, b, mean, -num_spatial - 1)

    def energy(squares: Tensor, variance: Tensor) -> Tensor:
        per_channel = collapse(variance)
        if channels_dim or not is_batched or per_channel[0].numel() > 1:
            return product(squares, variance)
        sums = squares.unflatten(1, (groups, -1)).sum(2)
        box = squares.new_ones(groups, 1, *variance.shape[2:])
        sums = function(sums, box, None, **options)
        return sums.repeat_interleave(len(variance) // groups, dim=1) * per_channel.reshape(-1, *ones)

    variance = _variance(product, energy, x, w, bias_variance)
    if not is_tracked() or not is_batched:
        return Moments(mean, variance)
    coverage = _coverage(x.mean.shape[2:], w.mean.shape[2:], options, is_transposed=bool(channels_dim))
    coverage = torch.tensor(coverage, dtype=torch.promote_types(mean.dtype, torch.float32), device=mean.device)
    with torch.autocast(mean.device.type, enabled=False):
        taps = _over_taps(w.mean.to(coverage.dtype), coverage)
        noise = None if w.variance is None else _over_taps(w.variance, coverage.square())

    def pointwise(x_: Tensor, weight_: Tensor) -> Tensor:
        grouped, matrices = x_.reshape(len(x_), groups, -1), weight_.unflatten(0, (groups, -1))
        output = torch.einsum("ngi,gio->ngo" if channels_dim else "ngi,goi->ngo", grouped, matrices)
        return output.reshape(len(x_), -1, *ones)

    return Moments(mean, variance, _shared(pointwise, x, (*x.mean.shape[:2], *ones), taps, noise, bias_variance))


@register_rule(F.embedding)
def embedding(input: Tensor, weight: Moments, *args: Any, **kwargs: Any) -> Moments:
    """Rows of an uncertain table (V, D) by their numbers; tokens are taken as different, so they share nothing."""
    mean, variance, _ = parts(weight)
    assert variance is not None, "a rule is for uncertain tensors"
    return Moments(F.embedding(input, mean, *args, **kwargs), F.embedding(input, variance.contiguous()))


def _variance(product: Product, energy: Product, x: MomentTensors, w: MomentTensors, bias: Tensor | None) -> Tensor:
    """f(v, M^2) + f(m^2 + v, S) + bias, in float32 or better: small variances vanish in half precision."""
    terms = [] if bias is None else [bias]
    with torch.autocast(x.mean.device.type, enabled=False):
        if x.variance is not None:
            terms.append(product(x.variance, w.mean.to(x.variance.dtype).square()))
        if w.variance is not None:
            squares = x.mean.to(w.variance.dtype).square()
            terms.append(energy(squares if x.variance is None else squares + x.variance, w.variance))
    return sum(terms[1:], start=terms[0])


def _shared(
    product: Product,
    x: MomentTensors,
    shape: tuple[int, ...],
    weight: Tensor,
    noise: Tensor | None,
    bias: Tensor | None,
) -> Tensor | None:
    """The covariance of two positions: the variance rule on what the positions have in common."""
    if not is_tracked():
        return None
    common = None if x.shared is None else mean_over(aligned(x.shared, x.mean.dim()), shape).expand(shape)
    if common is None and noise is None:
        return None if bias is None else bias.expand(product(mean_over(x.mean, shape), weight).shape)
    terms = [] if bias is None else [bias]
    with torch.autocast(x.mean.device.type, enabled=False):
        if common is not None:
            terms.append(product(common, weight.to(common.dtype).square()))
        if noise is not None:
            pairs = products_of_pairs(x.mean.to(noise.dtype), shape)
            terms.append(product(pairs if common is None else pairs + common, noise))
    return sum(terms[1:], start=terms[0])


def _over_taps(weight: Tensor, by_tap: Tensor) -> Tensor:
    """A weight (O, I, *K) summed over its taps with these factors (K): (O, I), in one pass and no copy."""
    stored = collapse(weight)
    if stored[0, 0].numel() == 1:
        return (stored.flatten(1) * by_tap.sum()).expand(weight.shape[:2])
    return weight.flatten(2) @ by_tap


def _coverage(
    size: Sequence[int], kernel: Sequence[int], options: dict[str, Any], *, is_transposed: bool
) -> list[float]:
    """The fraction of output positions at which each tap of the kernel (K) meets an input, not padding."""
    dims = []
    for dim, (width, num_taps) in enumerate(zip(size, kernel, strict=True)):
        stride, dilation = (_at(options.get(name, 1), dim) for name in ("stride", "dilation"))
        reach, padding = dilation * (num_taps - 1), options.get("padding", 0)
        if isinstance(padding, str):
            before, after = (reach // 2, reach - reach // 2) if padding == "same" else (0, 0)
        else:
            before = after = _at(padding, dim)
        if is_transposed:
            extra = _at(options.get("output_padding", 0), dim)
            num_outputs = (width - 1) * stride - before - after + reach + 1 + extra
            given, limit = width, num_outputs
        else:
            num_outputs = (width + before + after - reach - 1) // stride + 1
            given, limit = num_outputs, width
        hits = [[0 <= i * stride - before + tap * dilation < limit for i in range(given)] for tap in range(num_taps)]
        dims.append([sum(hit) / num_outputs for hit in hits])
    return [math.prod(fractions) for fractions in itertools.product(*dims)]


def _at(value: Any, dim: int) -> int:
    return value if isinstance(value, int) else value[dim] if len(value) > 1 else value[0]


_CONV_OPTIONS = ("stride", "padding", "dilation", "groups")
_TRANSPOSED_OPTIONS = ("stride", "padding", "output_padding", "groups", "dilation")


def _register(function: Callable[..., Tensor], names: tuple[str, ...], channels_dim: int) -> None:
    @follows_directions
    def rule(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Moments:
        if known(weight).directions is not None:
            return linearised(function, rule)(input, weight, bias, *args, **kwargs)
        options = dict(zip(names, args, strict=False)) | kwargs
        return convolution(function, channels_dim, input, weight, bias, options)

    register_rule(function)(rule)


for _function in (F.conv1d, F.conv2d, F.conv3d):
    _register(_function, _CONV_OPTIONS, 0)
for _function in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
    _register(_function, _TRANSPOSED_OPTIONS, 1)
