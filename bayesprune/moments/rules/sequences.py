"""Rules for what runs along a dimension and keeps it: cumulative sums and products, differences, triangles.

A fixed linear map along one dimension, so that var = sum w^2 (v - s) + (sum w)^2 s, where s is what its entries share:
exact but for what two entries of the result have in common, as for pooling (see `pooling`). No product.
"""

from collections.abc import Callable
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor

from bayesprune.moments.elementwise import in_place
from bayesprune.moments.registry import follows_directions, register_rule
from bayesprune.moments.rules.pooling import over_positions
from bayesprune.moments.tensor import parts


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
