"""Rules for what sorts and chooses: the order is that of the means, as for maxima.

So routers, beam searches and detectors take the entries of the largest means, each with its own variance: first order,
right where the chosen stand out. No product.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesprune.moments.registry import follows_directions, register_rule
from bayesprune.moments.tensor import plain


class Ordered(NamedTuple):
    """What `torch.topk` and `torch.sort` return."""

    values: Any
    indices: Tensor


@register_rule(torch.topk, Tensor.topk)
@follows_directions
def topk(input: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Ordered:
    """The k largest or smallest along a dimension."""
    return _at(input, dim, torch.topk(plain(input), k, dim, largest, sorted).indices)


@register_rule(torch.sort, Tensor.sort)
@follows_directions
def sort(input: Any, *args: Any, dim: int = -1, descending: bool = False, stable: bool | None = None) -> Ordered:
    """All along a dimension, in order."""
    options: Any = dict(zip(("dim", "descending"), args, strict=False))
    options = {"dim": dim, "descending": descending, "stable": bool(stable), **options}
    return _at(input, options["dim"], torch.sort(plain(input), **options).indices)


@register_rule(torch.msort, Tensor.msort)
@follows_directions
def msort(input: Any) -> Any:
    """All along the first dimension, in ascending order."""
    return sort(input, 0).values


@register_rule(torch.kthvalue, Tensor.kthvalue)
@follows_directions
def kthvalue(input: Any, k: int, dim: int = -1, keepdim: bool = False) -> Ordered:
    """The k-th smallest along a dimension."""
    return _one(input, dim, keepdim, torch.kthvalue(plain(input), k, dim, True).indices)


@register_rule(torch.median, Tensor.median)
@follows_directions
def median(input: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    """The one in the middle, of all or along a dimension."""
    if dim is None:
        return median(input.reshape(-1), 0).values
    return _one(input, dim, keepdim, torch.median(plain(input), dim, True).indices)


@register_rule(torch.cummax, Tensor.cummax)
@follows_directions
def cummax(input: Any, dim: int) -> Ordered:
    """The largest so far along a dimension."""
    return _at(input, dim, torch.cummax(plain(input), dim).indices)


@register_rule(torch.cummin, Tensor.cummin)
@follows_directions
def cummin(input: Any, dim: int) -> Ordered:
    """The smallest so far along a dimension."""
    return _at(input, dim, torch.cummin(plain(input), dim).indices)


@register_rule(torch.aminmax, Tensor.aminmax)
@follows_directions
def aminmax(input: Any, *, dim: Any = None, keepdim: bool = False) -> tuple[Any, Any]:
    """The smallest and the largest, of all or along a dimension."""
    dims = () if dim is None else dim
    return input.amin(dims, keepdim), input.amax(dims, keepdim)


def _at(x: Any, dim: int, indices: Tensor) -> Ordered:
    return Ordered(x.gather(dim, indices), indices)


def _one(x: Any, dim: int, keepdim: bool, indices: Tensor) -> Ordered:
    found = _at(x, dim, indices)
    return found if keepdim else Ordered(found.values.squeeze(dim), indices.squeeze(dim))
