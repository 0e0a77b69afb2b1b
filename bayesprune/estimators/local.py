"""The noise of local reparameterization, with as little kept for the backward pass as it needs.

The variance of an output is f(x^2, std^2). With a std for every weight that is a second product, and the derivative of
the noise by it, one number an output, is kept; where the std is an outer product, see `factored`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor

from bayesprune.estimators.factored import ConvNoise, FactoredNoise, LinearNoise, factored_noise
from bayesprune.estimators.seeded import (
    SeededNoise,
    differentiated,
    in_float32,
    scaled_noise,
    without_autocast,
)
from bayesprune.estimators.squares import square_of, squares_of
from bayesprune.estimators.types import Bilinear, LogGaussian
from bayesprune.foundation.device import has_cheap_calls


def with_local_noise(
    output: Tensor, operation: Bilinear, x: Tensor, weight: LogGaussian, bias: LogGaussian | None, feature_dim: int
) -> Tensor:
    """The output with noise of variance f(x^2, std^2), computed in float32 or better."""
    bias_log_std = None if bias is None else bias.log_stds[0]
    draw, factors = SeededNoise.of(output, feature_dim), operation.std_factors(weight.log_stds)
    with without_autocast(x.device):
        if factors is None:
            options = draw, operation, weight.mean.shape
            if draw.seed is not None:
                return _FullNoise.apply(output, options, x, bias_log_std, *weight.log_stds)
            return output + full_noise(options, x, bias_log_std, *weight.log_stds).to(output.dtype)
        of_bias, is_cheap = bias_log_std, has_cheap_calls(x.device)
        if not is_cheap:
            squares = tuple(squares_of(*weight.log_stds, *(() if bias is None else bias.log_stds)))
            factors = operation.std_factors(squares[: len(weight.log_stds)])
            of_bias = None if bias is None else squares[-1]
            assert factors is not None, "squares are laid out as what they are squares of"
        options = FactoredNoise(draw, operation, tuple(weight.mean.shape[2:]), is_cheap)
        is_plain_better = feature_dim != -1 and (is_cheap or x.dim() < 1 - feature_dim)
        if draw.seed is None or is_plain_better:
            return output + factored_noise(options, x, factors.rows, factors.columns, of_bias).to(output.dtype)
        function = LinearNoise if feature_dim == -1 else ConvNoise
        return function.apply(output, options, x, factors.rows, factors.columns, of_bias)


def add_noise(output: Tensor, variance: Tensor, feature_dim: int) -> Tensor:
    """The output with independent noise of that variance."""
    return output + scaled_noise(variance, SeededNoise.of(output, feature_dim)).to(output.dtype)


def full_noise(
    options: tuple[SeededNoise, Bilinear, Size], x: Tensor, bias_log_std: Tensor | None, *log_stds: Tensor
) -> Tensor:
    """Noise of variance f(x^2, std^2), for a weight of this shape."""
    draw, operation, shape = options
    return scaled_noise(_variance(operation, shape, x, bias_log_std, log_stds), draw)


class _FullNoise(torch.autograd.Function):
    """Adds `full_noise`; keeps x and the noise's derivative by the variance."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, options: Any, x: Tensor, bias_log_std: Any, *log_stds: Tensor) -> Tensor:
        draw, operation, shape = ctx.options = options
        variance = _variance(operation, shape, x, bias_log_std, log_stds)
        variance.clamp_min_(torch.finfo(variance.dtype).tiny)  # where it is zero, so is all that the slope meets
        slope = variance.rsqrt()  # times noise it is twice the derivative by the variance
        in_memory = slope.movedim(draw.feature_dim, -1) if draw.is_last else slope
        if in_memory.is_contiguous():
            draw.multiplied(in_memory, out=in_memory)
        else:
            slope.mul_(draw.normal(slope.shape, slope))
        if output.dtype == variance.dtype:
            noisy = torch.addcmul(output, variance, slope)
        else:
            noisy = output + variance.mul_(slope).to(output.dtype)
        ctx.save_for_backward(slope, x, bias_log_std, *log_stds)
        return noisy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slope, x, bias_log_std, *log_stds = ctx.saved_tensors
        gradient, needed = gradients[0], ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            return (
                gradient,
                None,
                *differentiated(full_noise, ctx.options, (x, bias_log_std, *log_stds), needed, gradient),
            )
        draw, operation, shape = ctx.options
        with without_autocast(x.device):
            twice = slope * gradient
            of_bias = None
            if bias_log_std is not None and needed[1]:
                other = [dim for dim in range(twice.dim()) if dim != twice.dim() + draw.feature_dim]
                summed = twice.sum(other) if other else twice
                of_bias = (summed * square_of(bias_log_std, summed.dtype)).to(bias_log_std.dtype)
            of_x, of_stds = None, [None for _ in log_stds]
            if needed[0] or any(needed[2:]):
                precise, variance = in_float32(x), _weight_variance(log_stds, shape, twice)
                wanted = (needed[0], any(needed[2:]))
                of_square, of_std = operation.pullback(twice, precise.square(), variance, wanted)
                of_x = None if of_square is None else of_square.mul_(precise).to(x.dtype)
                if of_std is not None:
                    of_std = of_std.mul_(variance)
                    of_stds = [
                        of_std.sum_to_size(part.shape).to(part.dtype) if need else None
                        for part, need in zip(log_stds, needed[2:], strict=True)
                    ]
        return gradient, None, of_x, of_bias, *of_stds


def _variance(
    operation: Bilinear, shape: Size, x: Tensor, bias_log_std: Tensor | None, log_stds: Sequence[Tensor]
) -> Tensor:
    squares = in_float32(x).square()
    bias_variance = None if bias_log_std is None else square_of(bias_log_std, squares.dtype)
    return operation(squares, _weight_variance(log_stds, shape, squares), bias_variance)


def _weight_variance(log_stds: Sequence[Tensor], shape: Size, like: Tensor) -> Tensor:
    return square_of(sum(log_stds[1:], start=log_stds[0]), like.dtype).expand(shape)
