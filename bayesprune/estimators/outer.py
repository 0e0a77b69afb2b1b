"""The noise of outputs whose weights have stds s_o s_i: no second product is needed for its variance.

It is s_o^2 times the energies s_i^2 x_i^2 within the unit's reach, the same for all units of a group. The noise is
drawn again in the backward pass. The plain function is the reference, and what is differentiated where a graph of the
gradients is wanted. Energies and reaches have G channels, one for each group, in place of I and O.
"""

from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from bayesprune.estimators.grouped import Layout, over_channels, over_positions
from bayesprune.estimators.repeatable import (
    Repeatable,
    along,
    differentiated,
    in_float32,
    scaled_noise,
    square_of,
    without_autocast,
)
from bayesprune.estimators.types import Bilinear


class Outer(NamedTuple):
    """What the noise depends on beside tensors that are differentiated.

    Attributes:
        draw: The noise.
        operation: The layer's operation, whose reach it is.
        num_groups: G.
    """

    draw: Repeatable
    operation: Bilinear
    num_groups: int


def outer_noise(options: Outer, x: Tensor, rows: Tensor, columns: Tensor | None, bias_log_std: Tensor | None) -> Tensor:
    """Noise of variance s_o^2 (the sum of s_i^2 x_i^2 within reach) + the bias's."""
    draw, dim = options.draw, options.draw.feature_dim
    squares = in_float32(x).square().unflatten(dim, (options.num_groups, -1))
    if columns is not None:
        squares = squares * along(square_of(columns, squares), dim)
    reach = options.operation.spread(squares.sum(dim))
    variance = (reach.unsqueeze(dim) * along(square_of(rows, reach), dim)).flatten(dim - 1, dim)
    if bias_log_std is not None:
        variance = variance + along(square_of(bias_log_std, reach), dim)
    return scaled_noise(variance, draw)


class OuterNoise(torch.autograd.Function):
    """Adds `outer_noise`; keeps x and what is small."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        options: Outer,
        x: Tensor,
        rows: Tensor,
        columns: Tensor | None,
        bias_log_std: Tensor | None,
    ) -> Tensor:
        """The value."""
        draw, operation, num_groups = ctx.options = options
        values, inputs = in_float32(x), Layout.of(x, draw.feature_dim, num_groups)
        column_squares = None if columns is None else square_of(columns, values).expand(num_groups, -1)
        energy = over_channels(inputs.view(values.square()), column_squares)
        reach = operation.spread(inputs.unview(energy, _with_channels(x, draw.feature_dim, num_groups)))
        outputs = Layout(draw.feature_dim, num_groups, draw.is_last or draw.feature_dim == -1)
        seen, squares = outputs.view(reach), square_of(rows, reach)
        bias_squares = None
        if bias_log_std is not None:
            tiny = torch.finfo(reach.dtype).tiny
            bias_squares = square_of(bias_log_std, reach).clamp_min_(tiny).view(num_groups, -1, 1)
        # Written through a view: FSDP 2 wants no view for a module's output.
        memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}[output.dim()] if draw.is_last else None
        noisy = torch.empty_like(output, dtype=reach.dtype, memory_format=memory_format or torch.contiguous_format)
        deviation = outputs.view(noisy)
        if bias_squares is None:
            torch.mul(_root(seen), squares.sqrt().unsqueeze(-1), out=deviation)
            draw.multiplied(deviation, out=deviation)
        else:
            torch.addcmul(bias_squares, seen, squares.unsqueeze(-1), out=deviation)
            slope = deviation.rsqrt()  # a processor's root takes longer
            deviation.mul_(draw.multiplied(slope, out=slope))
        ctx.layouts = inputs, outputs
        ctx.save_for_backward(x, rows, columns, bias_log_std, reach, column_squares, squares, bias_squares)
        return noisy.add_(output) if noisy.dtype == output.dtype else output + noisy.to(output.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs."""
        x, rows, columns, bias_log_std, reach, column_squares, squares, bias_squares = ctx.saved_tensors
        (gradient,), needed = gradients, ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            parts = (x, rows, columns, bias_log_std)
            return gradient, None, *differentiated(outer_noise, ctx.options, parts, needed, gradient)
        (draw, operation, num_groups), (inputs, outputs) = ctx.options, ctx.layouts
        of_x, of_columns, of_bias = None, None, None
        with without_autocast(x.device):
            seen = outputs.view(reach)
            product = draw.multiplied(outputs.view(gradient).to(reach.dtype).contiguous())
            if bias_squares is None:
                root, stds = _root(seen), squares.sqrt()
                of_rows, twice_of_reach = over_positions(product, root) * stds, over_channels(product, stds) / root
            else:
                product.mul_(torch.addcmul(bias_squares, seen, squares.unsqueeze(-1)).rsqrt_())
                of_rows, twice_of_reach = over_positions(product, seen) * squares, over_channels(product, squares)
                of_bias = (product.sum((0, 3)).unsqueeze(-1) * bias_squares).flatten().to(bias_log_std.dtype)
            if needed[0] or needed[2]:
                shape = _with_channels(x, draw.feature_dim, num_groups)
                twice = inputs.view(operation.gather(outputs.unview(twice_of_reach, reach.shape), shape))
                values = inputs.view(in_float32(x))
                if columns is not None and needed[2]:
                    of_columns = over_positions(values.square(), twice).mul_(column_squares)
                    of_columns = of_columns.sum_to_size(columns.shape).to(columns.dtype)
                if needed[0]:
                    scaled = values * twice if columns is None else (values * twice).mul_(column_squares.unsqueeze(-1))
                    of_x = inputs.unview(scaled, x.shape).to(x.dtype)
        return gradient, None, of_x, of_rows.to(rows.dtype), of_columns, of_bias


def _root(reach: Tensor) -> Tensor:
    """Where nothing is within reach, all that is multiplied by a gradient divided by this is zero."""
    return reach.clamp_min(torch.finfo(reach.dtype).tiny).sqrt()


def _with_channels(x: Tensor, feature_dim: int, num_channels: int) -> Size:
    """The shape of x with so many channels."""
    dim = x.dim() + feature_dim
    return Size((*x.shape[:dim], num_channels, *x.shape[dim + 1 :]))
