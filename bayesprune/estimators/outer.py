"""The noise of outputs whose weights have stds s_o s_i: no second product is needed for its variance.

It is s_o^2 times the energies s_i^2 x_i^2 within the unit's reach, the same for all units of a group. The noise is
drawn again in the backward pass. The plain functions are the reference, and what is differentiated where a graph of the
gradients is wanted. Energies and reaches have G channels, one for each group, in place of I and O.
"""

from typing import Any

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


def energy(options: tuple[int, int], x: Tensor, columns: Tensor | None) -> Tensor:
    """Sum of s_i^2 x_i^2 over the channels of each group."""
    groups, feature_dim = options
    squares = in_float32(x).square().unflatten(feature_dim, (groups, -1))
    if columns is not None:
        squares = squares * along(square_of(columns, squares), feature_dim)
    return squares.sum(feature_dim)


def outer_noise(draw: Repeatable, reach: Tensor, rows: Tensor, bias_log_std: Tensor | None) -> Tensor:
    """Noise of variance s_o^2 reach + the bias's."""
    feature_dim = draw.feature_dim
    variance = reach.unsqueeze(feature_dim) * along(square_of(rows, reach), feature_dim)
    variance = variance.flatten(feature_dim - 1, feature_dim)
    if bias_log_std is not None:
        variance = variance + along(square_of(bias_log_std, reach), feature_dim)
    return scaled_noise(variance, draw)


class Energy(torch.autograd.Function):
    """`energy`; keeps x."""

    @staticmethod
    def forward(ctx: Any, options: tuple[int, int], x: Tensor, columns: Tensor | None) -> Tensor:
        """The value."""
        groups, feature_dim = ctx.options = options
        ctx.save_for_backward(x, columns)
        layout = Layout.of(x, feature_dim, groups)
        squares = layout.view(in_float32(x).square())
        dim = x.dim() + feature_dim
        shape = Size((*x.shape[:dim], groups, *x.shape[dim + 1 :]))
        return layout.unview(over_channels(squares, _column_squares(columns, squares)), shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs."""
        x, columns = ctx.saved_tensors
        (gradient,), needed = gradients, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return None, *differentiated(energy, ctx.options, (x, columns), needed, gradient)
        groups, feature_dim = ctx.options
        layout = Layout.of(x, feature_dim, groups)
        values, gradient = layout.view(in_float32(x)), layout.view(gradient)
        stds = _column_squares(columns, values)
        of_x, of_columns = None, None
        if needed[0]:
            product = (values * gradient).mul_(2 * stds.unsqueeze(-1))
            of_x = layout.unview(product, x.shape).to(x.dtype)
        if columns is not None and needed[1]:
            with without_autocast(x.device):
                summed = over_positions(values.square(), gradient).mul_(2 * stds)
            of_columns = summed.sum_to_size(columns.shape).to(columns.dtype)
        return None, of_x, of_columns


class OuterNoise(torch.autograd.Function):
    """Adds `outer_noise`; keeps the reach, which is small, and draws the noise again."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, draw: Repeatable, reach: Tensor, rows: Tensor, bias_log_std: Tensor | None
    ) -> Tensor:
        """The value."""
        ctx.draw = draw
        layout = _layout(draw, rows)
        seen = layout.view(reach)
        if bias_log_std is None:
            std = seen.clamp_min(torch.finfo(reach.dtype).tiny).sqrt() * square_of(rows, reach).sqrt().unsqueeze(-1)
        else:
            std = _variance_with_bias(layout, seen, rows, bias_log_std).sqrt_()
        eps = layout.view(draw.normal(output.shape, reach))
        ctx.save_for_backward(reach, rows, bias_log_std, eps if draw.is_kept else None)
        # Written through a view: FSDP 2 wants no view for a module's output.
        memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}[output.dim()] if draw.is_last else None
        noisy = torch.empty_like(output, memory_format=memory_format or torch.contiguous_format)
        torch.add(layout.view(output), std.mul_(eps).to(output.dtype), out=layout.view(noisy))
        return noisy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs."""
        reach, rows, bias_log_std, kept = ctx.saved_tensors
        (gradient,), needed, draw = gradients, ctx.needs_input_grad[2:], ctx.draw
        if torch.is_grad_enabled():
            return gradient, None, *differentiated(outer_noise, draw, (reach, rows, bias_log_std), needed, gradient)
        layout = _layout(draw, rows)
        seen, squares = layout.view(reach), square_of(rows, reach)
        of_output = layout.view(gradient)
        if kept is None:
            product = layout.view(draw.normal(gradient.shape, reach)).mul_(of_output)
        else:
            product = kept * of_output
        of_bias = None
        with without_autocast(reach.device):
            if bias_log_std is None:
                tiny = torch.finfo(reach.dtype).tiny
                roots, stds = seen.clamp_min(tiny).sqrt(), squares.sqrt()
                of_reach = over_channels(product, stds).div_(2 * roots).masked_fill_(seen < tiny, 0)
                of_rows = over_positions(product, roots).mul_(stds)
            else:
                product.mul_(_variance_with_bias(layout, seen, rows, bias_log_std).rsqrt_())
                of_reach = over_channels(product, squares).div_(2)
                of_rows = over_positions(product, seen).mul_(squares)
                of_bias = product.sum((0, 3)).flatten().mul_(square_of(bias_log_std, reach)).to(bias_log_std.dtype)
        return gradient, None, layout.unview(of_reach, reach.shape), of_rows.to(rows.dtype), of_bias


def _layout(draw: Repeatable, rows: Tensor) -> Layout:
    return Layout(draw.feature_dim, len(rows), draw.is_last or draw.feature_dim == -1)


def _variance_with_bias(layout: Layout, reach: Tensor, rows: Tensor, bias_log_std: Tensor) -> Tensor:
    bias_variance = square_of(bias_log_std, reach).clamp_min(torch.finfo(reach.dtype).tiny)
    return (reach * square_of(rows, reach).unsqueeze(-1)).add_(bias_variance.view(*rows.shape, 1))


def _column_squares(columns: Tensor | None, values: Tensor) -> Tensor:
    """s_i^2 of the inputs of each group, (G, I / G)."""
    shape = values.shape[1:3]
    return values.new_ones(shape) if columns is None else square_of(columns, values).expand(shape)
