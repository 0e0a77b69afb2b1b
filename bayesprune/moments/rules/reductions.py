"""Rules for what runs over dimensions: sums, means, variances, norms, and cumulative sums, products and differences.

Over positions the shared part s stays while the rest averages away: var(mean) = (v - s) / n + s. Over units both do.
Exact, but for covariance that is not shared. Variances, stds and norms are taken to first order, their means with the
variance of the entries in them.

A fixed linear map along one dimension, so that var = sum w^2 (v - s) + (sum w)^2 s, where s is what its entries share:
exact but for what two entries of the result have in common, as for pooling. No product.
"""

import math
from collections.abc import Callable
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from bayesprune.moments.covariance import aligned, products_of_pairs
from bayesprune.moments.elementwise import in_place
from bayesprune.moments.gaussian import std as root
from bayesprune.moments.registry import follows_directions, register_rule
from bayesprune.moments.rules.pooling import over_positions
from bayesprune.moments.tensor import Moments, parts


@register_rule(torch.sum, Tensor.sum)
def total(
    input: Moments,
    dim: Any = None,
    keepdim: bool = False,
    *,
    axis: Any = None,
    keepdims: bool = False,
    dtype: Any = None,
) -> Moments:
    """Sum over dimensions."""
    return _reduced(input, dim if axis is None else axis, keepdim or keepdims, is_mean=False, dtype=dtype)


@register_rule(torch.mean, Tensor.mean)
def mean(
    input: Moments,
    dim: Any = None,
    keepdim: bool = False,
    *,
    axis: Any = None,
    keepdims: bool = False,
    dtype: Any = None,
) -> Moments:
    """Mean over dimensions."""
    return _reduced(input, dim if axis is None else axis, keepdim or keepdims, is_mean=True, dtype=dtype)


def of_value(value: Tensor, input: Moments, slope: Tensor, dims: tuple[int, ...], keepdim: bool) -> Moments:
    """A function of all entries along dimensions, to first order: its value, and its slope by each of the entries."""
    _, variance, shared = parts(input)
    assert variance is not None, "a rule is for uncertain tensors"
    slope = slope.to(variance.dtype)
    if shared is None:
        return Moments(value, (slope.square() * variance).sum(dims, keepdim))
    shared = aligned(shared, variance.dim())
    positions = [d for d in range(variance.dim()) if shared.shape[d] == 1 and variance.shape[d] > 1]
    slopes = slope.sum(along, keepdim=True) if (along := [d for d in positions if d in dims]) else slope
    alone = (variance - shared) if along else variance
    total = (slope.square() * alone).sum(dims, keepdim)
    if along:
        total = total + (slopes.square() * shared).sum(dims, keepdim)
    if len(along) == len(positions):
        return Moments(value, total.clamp_min(0))
    pairs = products_of_pairs(slopes, [1 if d in positions else size for d, size in enumerate(slopes.shape)])
    return Moments(value, total.clamp_min(0), (pairs * shared).sum(dims, keepdim))


@register_rule(torch.var, Tensor.var)
def var(
    input: Moments, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: int | None = None
) -> Moments:
    """The variance over dimensions, as `var_mean` gives it."""
    return var_mean(input, dim, unbiased, keepdim, correction=correction)[0]


@register_rule(torch.var_mean)
def var_mean(
    input: Moments, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: int | None = None
) -> tuple[Moments, Moments]:
    """Variance and mean over dimensions: the spread of the means, and the mean variance less that of their mean."""
    if isinstance(dim, bool):  # var(unbiased)
        dim, unbiased = None, dim
    x, variance, _ = parts(input)
    assert variance is not None, "a rule is for uncertain tensors"
    dims, centre = dims_of(dim, x.dim()), input.mean(dim, keepdim)
    count = torch.Size(x.shape[d] for d in dims).numel()
    divisor = count - (int(unbiased) if correction is None else correction)
    deviation = (x - x.mean(dims, keepdim=True)).to(variance.dtype)
    noise = variance.mean(dims, keepdim) - parts(centre).variance  # type: ignore[operator]
    value = (deviation.square().mean(dims, keepdim) + noise.clamp_min(0)) * (count / divisor)
    return of_value(value.to(x.dtype), input, deviation * (2 / divisor), dims, keepdim), centre


@register_rule(torch.std, Tensor.std)
def std(
    input: Moments, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: int | None = None
) -> Any:
    """The square root of `var`."""
    return var(input, dim, unbiased, keepdim, correction=correction).sqrt()


@register_rule(torch.linalg.vector_norm)
def vector_norm(x: Moments, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Moments:
    """The Euclidean norm over dimensions, the root of the expected square; others as sums of powers, or the largest."""
    if ord not in (2, "fro", None):
        return _of_order(x if dtype is None else x.to(dtype), ord, dim, keepdim)
    m, variance, _ = parts(x)
    assert variance is not None, "a rule is for uncertain tensors"
    dims = dims_of(dim, m.dim())
    square = (m.to(variance.dtype).square() + variance).sum(dims, keepdim=True)
    whole = root(square)
    value = root(square if keepdim else square.squeeze(dims))
    return of_value(value.to(dtype or m.dtype), x, m / whole, dims, keepdim)


@register_rule(torch.norm, Tensor.norm)
def norm(
    input: Moments, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: None = None, dtype: Any = None
) -> Moments:
    """The Euclidean norm over dimensions."""
    return vector_norm(input, p, dim, keepdim, dtype=dtype)


@register_rule(torch.linalg.norm)
@follows_directions
def linalg_norm(input: Moments, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """The Euclidean norm of vectors, the Frobenius norm of matrices; of all entries where no dimension is named."""
    return torch.linalg.vector_norm(input, _order(input, ord, dim), dim, keepdim, dtype=dtype)


@register_rule(torch.linalg.matrix_norm)
@follows_directions
def matrix_norm(
    input: Moments, ord: Any = "fro", dim: Any = (-2, -1), keepdim: bool = False, *, dtype: Any = None
) -> Any:
    """The Frobenius norm of matrices."""
    return torch.linalg.vector_norm(input, _order(input, ord, dim), dim, keepdim, dtype=dtype)


def dims_of(dim: Any, num_dims: int) -> tuple[int, ...]:
    """The dimensions, counted from the front, that an argument `dim` names: all where it is None or empty."""
    if dim is None or (not isinstance(dim, int) and not len(dim)):
        return tuple(range(num_dims))
    return tuple(sorted({d % num_dims for d in ((dim,) if isinstance(dim, int) else dim)}))


def _of_order(x: Any, ord: Any, dim: Any, keepdim: bool) -> Any:
    if isinstance(ord, str) or ord <= 0:
        raise NotImplementedError(f"moments: a norm of order {ord!r} has no rule; expected a positive number or 'fro'.")
    size, dims = x.abs(), dims_of(dim, x.dim())
    if ord == math.inf:
        return size.amax(dims, keepdim)
    return size.sum(dims, keepdim) if ord == 1 else size.pow(ord).sum(dims, keepdim).pow(1 / ord)


def _order(x: Moments, ord: Any, dim: Any) -> Any:
    """The order of the norm of all numbers that is the same."""
    is_matrix = x.dim() == 2 if dim is None else not isinstance(dim, int) and len(dim) == 2
    if is_matrix and ord not in (None, "fro"):
        raise NotImplementedError(f"moments: a norm of order {ord!r} of matrices has no rule; only Frobenius' has.")
    return 2 if ord in (None, "fro") else ord


def _reduced(x: Moments, dim: Any, keepdim: bool, *, is_mean: bool, dtype: Any) -> Moments:
    mean_, variance, shared = parts(x)
    assert variance is not None, "a rule is for uncertain tensors"
    num_dims = mean_.dim()
    dims = dims_of(dim, num_dims)
    if not dims:  # a single number
        return x
    reduced = mean_.mean(dims, keepdim, dtype=dtype) if is_mean else mean_.sum(dims, keepdim, dtype=dtype)
    factor = torch.Size(mean_.shape[d] for d in dims).numel() ** -2 if is_mean else 1
    if shared is None:
        return Moments(reduced, variance.sum(dims, keepdim) * factor)
    shared = aligned(shared, num_dims)
    along = [d for d in dims if shared.shape[d] == 1 and mean_.shape[d] > 1]
    if not along:
        return Moments(reduced, variance.sum(dims, keepdim) * factor, shared.sum(dims, keepdim) * factor)
    positions = torch.Size(mean_.shape[d] for d in along).numel()
    alone = (variance - shared).sum(dims, keepdim)
    common = shared.sum(dims, keepdim) * positions**2
    return Moments(reduced, (alone + common).clamp_min(0) * factor, common * factor)


def along(x: Any, dim: int, function: Callable[[Tensor], Tensor], matrix: Tensor) -> Any:
    """A linear map along a dimension.

    Args:
        x: Its input.
        dim: The dimension.
        function: The map along the last dimension.
        matrix: The map (O, I).
    """
    moved: Any = x.movedim(dim, -1)
    variance = parts(moved).variance
    assert variance is not None, "a rule is for uncertain tensors"
    matrix = matrix.to(variance.dtype)
    found = over_positions(moved, function(parts(moved).mean), [matrix], lambda part: part @ matrix.square().T)
    return found.movedim(-1, dim)


@register_rule(torch.cumsum, Tensor.cumsum)
def cumsum(input: Any, dim: int, *, dtype: Any = None) -> Any:
    """Sums of the entries so far."""
    x = input if dtype is None else input.to(dtype)
    return along(x, dim, lambda part: part.cumsum(-1), _ones(x, dim).tril())


@register_rule(torch.diff, Tensor.diff)
def diff(input: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    """Differences of neighbours."""
    pieces = [piece for piece in (prepend, input, append) if piece is not None]
    x = torch.cat(pieces, dim) if len(pieces) > 1 else input
    for _ in range(n):
        ones = _ones(x, dim)
        x = along(x, dim, lambda part: part.diff(dim=-1), (ones.tril(1).triu(1) - ones.tril().triu())[:-1])
    return x


@register_rule(torch.cumprod, Tensor.cumprod)
@follows_directions
def cumprod(input: Any, dim: int, *, dtype: Any = None) -> Any:
    """Products of the entries so far, taken as independent."""
    x = input if dtype is None else input.to(dtype)
    return torch.stack(list(accumulate(x.unbind(dim), mul)), dim)


@register_rule(torch.prod, Tensor.prod)
@follows_directions
def prod(input: Any, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """The product of all entries, or of those along a dimension, taken as independent."""
    if dim is None:
        return prod(input.reshape(-1), 0, dtype=dtype)
    x = input if dtype is None else input.to(dtype)
    *_, last = accumulate(x.unbind(dim), mul)
    return last.unsqueeze(dim) if keepdim else last


@register_rule(torch.tril, Tensor.tril)
@follows_directions
def tril(input: Any, diagonal: int = 0) -> Any:
    """Matrices with zeros above a diagonal."""
    return input * torch.ones(input.shape[-2:], dtype=input.dtype, device=input.device).tril(diagonal)


@register_rule(torch.triu, Tensor.triu)
@follows_directions
def triu(input: Any, diagonal: int = 0) -> Any:
    """Matrices with zeros below a diagonal."""
    return input * torch.ones(input.shape[-2:], dtype=input.dtype, device=input.device).triu(diagonal)


@register_rule(torch.trace, Tensor.trace)
@follows_directions
def trace(input: Any) -> Any:
    """The sum of a diagonal."""
    return input.diagonal().sum()


def _ones(x: Any, dim: int) -> Tensor:
    size = x.shape[dim]
    return torch.ones(size, size, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


for _rule in (cumsum, cumprod, tril, triu):
    register_rule(getattr(Tensor, f"{_rule.__name__}_"))(in_place(_rule, getattr(Tensor, _rule.__name__)))
