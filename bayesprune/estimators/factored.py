"""The noise of outputs whose weights have stds s_o s_i: no second product is needed for its variance.

It is s_o^2 times the energies s_i^2 x_i^2 within the unit's reach, the same for all units of a group. The plain
function `factored_noise` is the reference, and is differentiated where a graph of the gradients is wanted. All takes
squares of stds, or on a processor log stds, and computes in float32 or better. A linear layer draws the noise again in
the backward pass, or keeps its slope, half the noise over its std, where that is small and kernels are launched.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesprune.estimators.seeded import (
    SeededNoise,
    along,
    differentiated,
    in_float32,
    scaled_noise,
    without_autocast,
)
from bayesprune.estimators.squares import bounded, square_of
from bayesprune.estimators.types import Bilinear
from bayesprune.foundation.device import has_cheap_calls

_KEPT_AT_MOST = 1 << 18  # numbers of a slope


class FactoredNoise(NamedTuple):
    """What the noise depends on beside tensors that are differentiated.

    Attributes:
        draw: The noise.
        operation: The layer's operation, whose reach it is.
        kernel_size: K, of the weight.
        is_of_logs: Whether rows, columns and the bias's are given as log stds, not as squares of stds.
    """

    draw: SeededNoise
    operation: Bilinear
    kernel_size: tuple[int, ...]
    is_of_logs: bool = False

    @property
    def factor(self) -> float:
        """What a std is multiplied by for its slope, so that gradients by what is given need no factor of their own."""
        return 1.0 if self.is_of_logs else 2.0

    def squares(self, dtype: torch.dtype, *parts: Tensor | None) -> Any:
        """The squares of stds in this dtype."""
        if not self.is_of_logs:
            return tuple(None if part is None else part.to(dtype) for part in parts)
        *others, bias = [None if part is None else square_of(part, dtype) for part in parts]
        return *others, bias if bias is None else bounded(bias)

    def gradient(self, of_square: Tensor, square: Tensor, like: Tensor) -> Tensor:
        """The gradient of what is given, of that of its square where it is one, of twice that of a log std's square."""
        given = of_square.mul_(square) if self.is_of_logs else of_square
        return given.view(like.shape).to(like.dtype)


def factored_noise(
    options: FactoredNoise, x: Tensor, rows: Tensor, columns: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Noise of variance s_o^2 (the sum of s_i^2 x_i^2 within reach) + the bias's."""
    draw, dim = options.draw, options.draw.feature_dim
    squares = in_float32(x).square()
    rows, columns, bias = options.squares(squares.dtype, rows, columns, bias)
    squares = squares.unflatten(dim, (options.operation.kind.num_groups, -1))
    if columns is not None:
        squares = squares * along(columns, dim)
    reach = squares.sum(dim)
    if dim != -1:
        reach = options.operation.receptive_field_sum(reach, options.kernel_size)
    if bias is None:  # a root for each position, in place of one for each output
        stds = (_root(reach).unsqueeze(dim) * along(rows.sqrt(), dim)).flatten(dim - 1, dim)
        return stds * draw.normal(stds.shape, stds)
    variance = (reach.unsqueeze(dim) * along(rows, dim)).flatten(dim - 1, dim)
    return scaled_noise(variance + along(bias, dim), draw)


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
        bias: Tensor | None,
    ) -> Tensor:
        """The value, of inputs (..., I), rows (1, O), columns (1, I) and the bias's (O)."""
        draw, dtype, ctx.options = options.draw, torch.promote_types(x.dtype, torch.float32), options
        squares = of_rows, of_columns, of_bias = options.squares(dtype, rows.view(-1), columns, bias)
        if of_columns is not None:
            energy = torch.mv(_rows_of(in_float32(x)).square(), of_columns.view(-1))
        else:
            energy = torch.linalg.vector_norm(_rows_of(x), dim=1, dtype=dtype).square_()
        # Written through a view: FSDP 2 wants no view for a module's output.
        noisy = torch.empty_like(output, dtype=dtype, memory_format=torch.contiguous_format)
        slope, deviation, is_cheap = None, noisy.view(-1, len(of_rows)), has_cheap_calls(x.device)
        if is_cheap and of_bias is None:  # a processor's roots take longer
            torch.outer(_root(energy), of_rows.sqrt(), out=deviation)
            draw.multiplied(deviation, out=deviation).add_(_rows_of(output))
        else:
            variance, slope = _slope(options, energy, of_rows, of_bias)
            torch.addcmul(_rows_of(output).to(dtype), variance, slope, value=1 / options.factor, out=deviation)
        is_kept = slope is not None and not is_cheap and slope.numel() <= _KEPT_AT_MOST
        ctx.save_for_backward(x, rows, columns, bias, energy, slope if is_kept else None, *squares)
        return noisy.to(output.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs."""
        x, rows, columns, bias, energy, slope, row_squares, column_squares, bias_squares = ctx.saved_tensors
        (gradient,), needed, draw = gradients, ctx.needs_input_grad[2:], ctx.options.draw
        if torch.is_grad_enabled():
            parts = (x, rows, columns, bias)
            return gradient, None, *differentiated(factored_noise, ctx.options, parts, needed, gradient)
        of_x, of_columns, of_bias, options = None, None, None, ctx.options
        with without_autocast(x.device):
            given = _rows_of(gradient)
            if slope is None and bias is None and has_cheap_calls(x.device):
                product = draw.multiplied(given.to(energy.dtype).contiguous())
                root, stds = _root(energy), row_squares.sqrt()
                twice = torch.mv(product, stds).div_(root)
                of_rows = torch.mv(product.t(), root).mul_(stds).view_as(rows).to(rows.dtype)
            else:
                if slope is None:
                    product = _slope(options, energy, row_squares, bias_squares)[1].mul_(given)
                else:
                    product = slope * given
                of_rows = options.gradient(torch.mv(product.t(), energy), row_squares, rows)
                of_bias = None if bias is None else options.gradient(product.sum(0), bias_squares, bias)
                is_needed, alpha = needed[0] or needed[2], options.factor
                twice = torch.addmv(energy, product, row_squares, beta=0, alpha=alpha) if is_needed else energy
            if needed[2] and columns is not None:
                values = _rows_of(in_float32(x))
                of_columns = torch.addmv(
                    column_squares.view(-1), values.square().t(), twice, beta=0, alpha=1 / options.factor
                )
                of_columns = options.gradient(of_columns, column_squares.view(-1), columns)
            if needed[0]:
                scaled = _rows_of(in_float32(x)) * twice.unsqueeze(1)
                scaled = scaled if column_squares is None else scaled.mul_(column_squares)
                of_x = scaled.view(x.shape).to(x.dtype)
        return gradient, None, of_x, of_rows, of_columns, of_bias


class ConvNoise(torch.autograd.Function):
    """Adds the `factored_noise` of a convolution of N examples, where kernels are launched; keeps x and the slope.

    A processor is faster with the plain function, which sums energies over channels first.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        options: FactoredNoise,
        x: Tensor,
        rows: Tensor,
        columns: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """The value, of inputs (N, I, *spatial), rows (G, O / G), columns (G or 1, I / G) and the bias's (O)."""
        draw, dim, ctx.options = options.draw, options.draw.feature_dim, options
        squares = in_float32(x).square()
        stds = of_rows, of_columns, of_bias = options.squares(squares.dtype, rows, columns, bias)
        reach = options.operation(squares, _reach_weight(options, squares, of_columns), None)
        value = options.factor**2
        start = _tiny(reach.device, reach.dtype) if of_bias is None else along(value * of_bias.view(rows.shape), dim)
        variance = torch.addcmul(start, reach.unsqueeze(dim), along(of_rows, dim), value=value).flatten(dim - 1, dim)
        slope = variance.rsqrt()
        in_memory = slope.movedim(dim, -1) if draw.is_last else slope
        if in_memory.is_contiguous():
            draw.multiplied(in_memory, out=in_memory)
        else:
            slope.mul_(draw.normal(slope.shape, slope))
        ctx.save_for_backward(x, rows, columns, bias, reach, slope, *stds)
        if output.dtype == variance.dtype:
            return torch.addcmul(output, variance, slope, value=1 / options.factor)
        return output.add(variance.mul_(slope).to(output.dtype), alpha=1 / options.factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs."""
        x, rows, columns, bias, reach, slope, row_squares, column_squares, bias_squares = ctx.saved_tensors
        (gradient,), needed, options = gradients, ctx.needs_input_grad[2:], ctx.options
        if torch.is_grad_enabled():
            parts = (x, rows, columns, bias)
            return gradient, None, *differentiated(factored_noise, options, parts, needed, gradient)
        dim, of_x, of_columns, of_bias = options.draw.feature_dim, None, None, None
        with without_autocast(x.device):
            of_variance = slope * gradient
            if bias is not None:
                others = [own for own in range(x.dim()) if own != x.dim() + dim]
                of_bias = options.gradient(of_variance.sum(others), bias_squares, bias)
            by_group = of_variance.unflatten(dim, (len(rows), -1)).flatten(3)  # (N, G, O / G, positions)
            of_rows = torch.matmul(by_group, reach.flatten(2).unsqueeze(3)).sum(0).view(rows.shape)
            if needed[0] or needed[2]:
                twice = torch.matmul(options.factor * row_squares.unsqueeze(1), by_group).view(reach.shape)
                of_x, of_columns = _reach_gradients(options, twice, in_float32(x), column_squares)
                of_x = of_x.to(x.dtype) if needed[0] else None
                of_columns = None if of_columns is None else options.gradient(of_columns, column_squares, columns)
            of_rows = options.gradient(of_rows, row_squares, rows)
        return gradient, None, of_x, of_rows, of_columns, of_bias


def _slope(options: FactoredNoise, energy: Tensor, rows: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The variance times the squared factor, (N, O), and the noise over its root."""
    start, value = _tiny(energy.device, energy.dtype) if bias is None else bias, options.factor**2
    variance = torch.addr(start, energy, rows, beta=value, alpha=value)
    slope = variance.rsqrt()
    return variance, options.draw.multiplied(slope, out=slope)


def _reach_weight(options: FactoredNoise, squares: Tensor, columns: Tensor | None) -> Tensor:
    """The weight with which the layer's operation makes sums within reach: the squares of the columns at each tap."""
    kind, kernel_size = options.operation.kind, options.kernel_size
    groups = kind.num_groups
    inputs = squares.shape[options.draw.feature_dim] // groups
    shape = (groups * inputs, 1) if kind.is_transposed else (groups, inputs)
    if columns is None:
        return _ones((*shape, *kernel_size), squares.device, squares.dtype)
    weight = columns.expand(groups, inputs).reshape(*shape, *[1] * len(kernel_size))
    return weight.expand(*shape, *kernel_size).contiguous()


def _reach_gradients(
    options: FactoredNoise, twice: Tensor, x: Tensor, columns: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of the squares of columns, of twice the gradient of the reach."""
    squares = x if columns is None else x.square()
    weight = _reach_weight(options, squares, columns)
    of_squares, of_weight = options.operation.pullback(twice, squares, weight, (True, columns is not None))
    assert of_squares is not None, "it was asked for"
    of_columns = None
    if columns is not None and of_weight is not None:
        by_input = of_weight.flatten(2).sum(2).view(options.operation.kind.num_groups, -1)
        of_columns = by_input.sum_to_size(columns.shape).div_(options.factor)
    return of_squares.mul_(x), of_columns


def _rows_of(tensor: Tensor) -> Tensor:
    """(..., I) as (N, I)."""
    return tensor.reshape(-1, tensor.shape[-1])


def _root(energy: Tensor) -> Tensor:
    """Where nothing is within reach, all that is multiplied by a gradient divided by this is zero."""
    return energy.clamp_min(torch.finfo(energy.dtype).tiny).sqrt()


@lru_cache(16)
def _tiny(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Added to a variance, it keeps its root from zero."""
    with torch.inference_mode(False):
        return torch.full((), torch.finfo(dtype).tiny, device=device, dtype=dtype)


@lru_cache(64)
def _ones(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(shape, device=device, dtype=dtype)
