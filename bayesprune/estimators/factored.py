"""The noise of outputs whose weights have stds s_o s_i: no second product is needed for its variance.

It is s_o^2 times the energies s_i^2 x_i^2 within the unit's reach, the same for all units of a group. The plain
function serves convolutions, whose reach is a convolution of one channel for each group. Linear layers draw the noise
again in the backward pass; the plain function is their reference, and differentiated where a graph of the gradients is
wanted.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesprune.estimators.seeded import (
    SeededNoise,
    along,
    differentiated,
    in_float32,
    scaled_noise,
    square_of,
    without_autocast,
)
from bayesprune.estimators.types import Bilinear
from bayesprune.foundation.device import has_cheap_calls


class FactoredNoise(NamedTuple):
    """What the noise depends on beside tensors that are differentiated.

    Attributes:
        draw: The noise.
        operation: The layer's operation, whose reach it is.
        kernel_size: K, of the weight.
    """

    draw: SeededNoise
    operation: Bilinear
    kernel_size: tuple[int, ...]


def factored_noise(
    options: FactoredNoise, x: Tensor, rows: Tensor, columns: Tensor | None, bias_log_std: Tensor | None
) -> Tensor:
    """Noise of variance s_o^2 (the sum of s_i^2 x_i^2 within reach) + the bias's."""
    draw, dim = options.draw, options.draw.feature_dim
    squares = in_float32(x).square().unflatten(dim, (options.operation.kind.num_groups, -1))
    if columns is not None:
        squares = squares * along(square_of(columns, squares), dim)
    reach = squares.sum(dim)
    if dim != -1:
        reach = options.operation.receptive_field_sum(reach, options.kernel_size)
    row_squares = along(square_of(rows, reach), dim)
    if bias_log_std is None:  # a root for each position, in place of one for each output
        stds = (_root(reach).unsqueeze(dim) * row_squares.sqrt()).flatten(dim - 1, dim)
        return stds * draw.normal(stds.shape, stds)
    variance = (reach.unsqueeze(dim) * row_squares).flatten(dim - 1, dim)
    return scaled_noise(variance + along(square_of(bias_log_std, reach), dim), draw)


class LinearNoise(torch.autograd.Function):
    """Adds the `factored_noise` of a linear layer; keeps x and what is small."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        options: FactoredNoise,
        x: Tensor,
        rows: Tensor,
        columns: Tensor | None,
        bias_log_std: Tensor | None,
    ) -> Tensor:
        """The value, of inputs (..., I), rows (1, O) and columns (1, I)."""
        draw, ctx.options = options.draw, options
        values = _rows_of(in_float32(x))
        column_squares = None if columns is None else square_of(columns, values).view(-1)
        energy = values.square()
        energy = energy.sum(1) if column_squares is None else torch.mv(energy, column_squares)
        squares, bias_squares = square_of(rows, energy).view(-1), None
        # Written through a view: FSDP 2 wants no view for a module's output.
        noisy = torch.empty_like(output, dtype=energy.dtype, memory_format=torch.contiguous_format)
        deviation = noisy.view(-1, len(squares))
        is_cheap = has_cheap_calls(x.device)
        if bias_log_std is None:
            torch.outer(_root(energy), squares.sqrt(), out=deviation)
        else:
            bias_squares = square_of(bias_log_std, energy).clamp_min_(torch.finfo(energy.dtype).tiny)
            torch.addcmul(bias_squares, energy.unsqueeze(1), squares, out=deviation)
        if not is_cheap:
            deviation = deviation if bias_log_std is None else deviation.sqrt_()
            eps = draw.normal(deviation.shape, deviation)
        elif bias_log_std is None:
            draw.multiplied(deviation, out=deviation)
            eps = deviation.new_ones(())
        else:  # the variance times eps over its root: a processor's root takes longer
            slope = deviation.rsqrt()
            eps = draw.multiplied(slope, out=slope)
        if noisy.dtype == output.dtype:
            torch.addcmul(output.reshape(deviation.shape), deviation, eps, out=deviation)
        else:
            noisy = output + deviation.mul_(eps).view(output.shape).to(output.dtype)
        ctx.save_for_backward(x, rows, columns, bias_log_std, energy, column_squares, squares, bias_squares)
        return noisy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs."""
        x, rows, columns, bias_log_std, energy, column_squares, squares, bias_squares = ctx.saved_tensors
        (gradient,), needed, draw = gradients, ctx.needs_input_grad[2:], ctx.options.draw
        if torch.is_grad_enabled():
            parts = (x, rows, columns, bias_log_std)
            return gradient, None, *differentiated(factored_noise, ctx.options, parts, needed, gradient)
        of_x, of_columns, of_bias = None, None, None
        with without_autocast(x.device):
            product = draw.multiplied(_rows_of(gradient).to(energy.dtype).contiguous())
            if bias_squares is None:
                root, stds = _root(energy), squares.sqrt()
                of_rows, twice = torch.mv(product.t(), root) * stds, torch.mv(product, stds) / root
            else:
                product.mul_(torch.addcmul(bias_squares, energy.unsqueeze(1), squares).rsqrt_())
                of_rows, twice = torch.mv(product.t(), energy) * squares, torch.mv(product, squares)
                of_bias = (product.sum(0) * bias_squares).to(bias_log_std.dtype)
            values = _rows_of(in_float32(x))
            if columns is not None and needed[2]:
                of_columns = (torch.mv(values.square().t(), twice) * column_squares).view_as(columns).to(columns.dtype)
            if needed[0]:
                scaled = values * twice.unsqueeze(1)
                of_x = (scaled if columns is None else scaled.mul_(column_squares)).view(x.shape).to(x.dtype)
        return gradient, None, of_x, of_rows.view_as(rows).to(rows.dtype), of_columns, of_bias


def _rows_of(tensor: Tensor) -> Tensor:
    """(..., I) as (N, I)."""
    return tensor.reshape(-1, tensor.shape[-1])


def _root(reach: Tensor) -> Tensor:
    """Where nothing is within reach, all that is multiplied by a gradient divided by this is zero."""
    return reach.clamp_min(torch.finfo(reach.dtype).tiny).sqrt()
