"""Rules for what writes into a tensor: assignment, copies, and writing or adding by an index. Exact; no product.

An index, or a mask, says where: it is certain, and where a model makes it of uncertain numbers (the experts that a
router chooses) it is that of the means. What is added at one place is taken as independent. What positions had in
common is given up, but by a copy of a whole tensor. Each with its form that writes in place (see `memory`).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from bayesprune.moments.elementwise import in_place
from bayesprune.moments.memory import LazyMoments, overwritten
from bayesprune.moments.registry import follows_directions, register_rule
from bayesprune.moments.tensor import Moments, known, parts, plain


def written(into: Any, what: Any, write: Callable[[Tensor, Tensor], Any]) -> Moments:
    """A tensor with another one, or a number, written into it."""
    if not isinstance(what, Tensor):
        what = torch.tensor(what, dtype=into.dtype, device=into.device)
    return Moments.of(LazyMoments(overwritten(known(into), known(what), write)))


def index_add(input: Any, dim: int, index: Any, source: Any, *, alpha: Any = 1) -> Moments:
    """The slices of a source added to those with these numbers."""
    source = source if alpha == 1 else source * alpha
    return written(input, source, lambda into, what: into.index_add_(dim, index, what.to(into.dtype)))


def index_copy(input: Any, dim: int, index: Any, source: Any) -> Moments:
    """The slices of a source in place of those with these numbers."""
    return written(input, source, lambda into, what: into.index_copy_(dim, index, what.to(into.dtype)))


def index_fill(input: Any, dim: int, index: Any, value: Any) -> Moments:
    """A number in place of the slices with these numbers."""
    return written(input, value, lambda into, what: into.index_fill_(dim, index, what.to(into.dtype)))


def index_put(input: Any, indices: Any, values: Any, accumulate: bool = False) -> Moments:
    """Values put, or added, where lists of indices say."""
    indices = tree_map(lambda leaf: plain(leaf) if isinstance(leaf, Tensor) else leaf, tuple(indices))
    return written(input, values, lambda into, what: into.index_put_(indices, what.to(into.dtype), accumulate))


def scatter(input: Any, dim: int, index: Any, src: Any = None, value: Any = None, *, reduce: Any = None) -> Moments:
    """Entries of a source, or a number, in place of those with these numbers along a dimension."""
    if reduce is not None:
        raise NotImplementedError(
            f"moments: scatter with reduce={reduce!r} has no rule; use scatter_add or scatter_reduce."
        )
    src = value if src is None else src
    return written(input, src, lambda into, what: into.scatter_(dim, index, _over(what, index, into)))


def scatter_add(input: Any, dim: int, index: Any, src: Any) -> Moments:
    """Entries of a source added to those with these numbers along a dimension."""
    return written(input, src, lambda into, what: into.scatter_add_(dim, index, _over(what, index, into)))


def scatter_reduce(input: Any, dim: int, index: Tensor, src: Any, reduce: str, *, include_self: bool = True) -> Any:
    """The sum, mean, largest or smallest of what an index sends to one place; extremes by the means' largest."""
    if reduce in ("sum", "mean"):
        ones = torch.ones(index.shape, dtype=plain(input).dtype, device=index.device)
        count = torch.zeros(input.shape, dtype=ones.dtype, device=index.device).scatter_add(dim, index, ones)
        start = input if include_self else torch.where(count > 0, torch.zeros_like(count), input)
        found = scatter_add(start, dim, index, src)
        return found if reduce == "sum" else found / (count + float(include_self)).clamp_min(1)
    if reduce not in ("amax", "amin"):
        raise NotImplementedError(
            f"moments: scatter_reduce with reduce={reduce!r} has no rule; expected sum, mean, amax or amin."
        )
    (mean, variance, _), (new, alone, _) = parts(input), parts(src)
    value = mean.scatter_reduce(dim, index, new, reduce, include_self=include_self)
    used = tuple(map(slice, index.shape))
    winners = new[used] == value.gather(dim, index)
    dtype = torch.promote_types(mean.dtype, torch.float32)
    total = (mean == value) * (torch.zeros_like(mean, dtype=dtype) if variance is None else variance)
    if alone is not None:
        total = total.scatter_reduce(dim, index, winners * alone[used], "amax")
    return Moments(value, total)


def masked_scatter(input: Any, mask: Tensor, source: Any) -> Moments:
    """The entries of a source, in their order, where the mask is true."""
    return written(input, source, lambda into, what: into.masked_scatter_(mask, what.to(into.dtype)))


def select_scatter(input: Any, src: Any, dim: int, index: int) -> Moments:
    """Another tensor in place of one slice."""
    return written(input, src, lambda into, what: into.select(dim, index).copy_(what))


def slice_scatter(input: Any, src: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Moments:
    """Another tensor in place of the slices from a start to an end."""
    return written(input, src, lambda into, what: into.movedim(dim, 0)[start:end:step].copy_(what.movedim(dim, 0)))


def diagonal_scatter(input: Any, src: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Moments:
    """Another tensor in place of a diagonal."""
    return written(input, src, lambda into, what: into.diagonal(offset, dim1, dim2).copy_(what))


def copy(input: Any, src: Any, non_blocking: bool = False) -> Moments:
    """Another tensor in place of all."""
    src = src.to(input.device, input.dtype)
    return src if src.shape == input.shape else src.expand(input.shape)


def fill(input: Any, value: Any) -> Any:
    """A number in place of all."""
    return written(input, value, lambda into, what: into.copy_(what))


def zero(input: Any) -> Tensor:
    """Zeros in place of all."""
    return torch.zeros_like(plain(input))


@register_rule(Tensor.__setitem__)
@follows_directions
def set_item(x: Any, index: Any, value: Any) -> None:
    """Writes entries."""
    _set_item(x, tree_map(lambda leaf: plain(leaf) if isinstance(leaf, Tensor) else leaf, index), value)


def _assigned(x: Any, index: Any, value: Any) -> Moments:
    return written(x, value, lambda into, what: into.__setitem__(index, what.to(into.dtype)))


def _erased(memory: Tensor, index: Any, _: Any) -> None:
    memory[index] = math.nan


def _over(what: Tensor, index: Tensor, into: Tensor) -> Tensor:
    return (what if what.dim() else what.expand(index.shape)).to(into.dtype)


_set_item = in_place(follows_directions(_assigned), Tensor.__setitem__, _erased)
for _rule in (index_add, index_copy, index_fill, index_put, scatter, scatter_add, scatter_reduce, masked_scatter):
    for _owner in (torch, Tensor):
        if hasattr(_owner, _rule.__name__):
            register_rule(getattr(_owner, _rule.__name__))(_rule)
    register_rule(getattr(Tensor, f"{_rule.__name__}_"))(in_place(_rule, getattr(Tensor, _rule.__name__)))
    if _rule is not scatter_reduce:
        follows_directions(_rule)
for _rule in (select_scatter, slice_scatter, diagonal_scatter):
    register_rule(getattr(torch, _rule.__name__), getattr(Tensor, _rule.__name__))(follows_directions(_rule))
for _rule in (copy, fill, zero):
    register_rule(getattr(Tensor, f"{_rule.__name__}_"))(in_place(follows_directions(_rule), _rule))


def _register_changes_of_shape(*names: str) -> None:
    for name in names:

        def rule(x: Moments, *args: Any, _view: str = name.removesuffix("_"), **kwargs: Any) -> Moments:
            return x.replace(getattr(x, _view)(*args, **kwargs))

        register_rule(getattr(Tensor, name))(follows_directions(rule))


def _register_draws(*names: str) -> None:
    for name in names:

        def rule(x: Moments, *args: Any, _draw: str = name, **kwargs: Any) -> Moments:
            return x.copy_from(Moments(getattr(torch.empty_like(plain(x)), _draw)(*args, **kwargs)))

        register_rule(getattr(Tensor, name))(follows_directions(rule))


_register_changes_of_shape("squeeze_", "unsqueeze_", "transpose_", "swapaxes_", "swapdims_", "t_", "detach_")
_register_draws("normal_", "uniform_", "exponential_", "log_normal_", "cauchy_", "geometric_", "random_")
