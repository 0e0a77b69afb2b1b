"""Rules for what joins tensors: cat, stack, borders. Exact; no product.

Parts that share along the joined dimension are taken as made by the same weights, so that they share with each other.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesprune.moments.covariance import aligned
from bayesprune.moments.gaussian import std, total
from bayesprune.moments.memory import MomentTensors
from bayesprune.moments.registry import follows_directions, register_rule
from bayesprune.moments.tensor import Moments, parts


@register_rule(torch.cat, torch.concat, torch.concatenate)
def cat(tensors: Sequence[Any], dim: int = 0, **names: Any) -> Moments:
    """Tensors joined along a dimension, certain ones with variance 0."""
    pieces = [parts(x) for x in names.get("tensors", tensors) if not (isinstance(x, Tensor) and x.shape == (0,))]
    dim = names.get("axis", dim)
    mean = torch.cat([piece.mean for piece in pieces], dim)
    variance = torch.cat([zeros(piece.mean) if piece.variance is None else piece.variance for piece in pieces], dim)
    return Moments(mean, variance, _joined(pieces, dim % mean.dim(), mean))


@register_rule(torch.stack)
def stack(tensors: Sequence[Any], dim: int = 0) -> Moments:
    """Tensors joined along a new dimension."""
    return cat([x.unsqueeze(dim) for x in tensors], dim)


@register_rule(torch.hstack)
@follows_directions
def hstack(tensors: Sequence[Any]) -> Any:
    """Tensors side by side: along the second dimension, or the first of vectors."""
    tensors = [torch.atleast_1d(x) for x in tensors]
    return torch.cat(tensors, 0 if tensors[0].dim() == 1 else 1)


@register_rule(torch.vstack, torch.row_stack)
@follows_directions
def vstack(tensors: Sequence[Any]) -> Any:
    """Tensors, or vectors as rows, one upon the other."""
    return torch.cat([torch.atleast_2d(x) for x in tensors], 0)


@register_rule(torch.column_stack)
@follows_directions
def column_stack(tensors: Sequence[Any]) -> Any:
    """Matrices, or vectors as columns, side by side."""
    return torch.cat([x if x.dim() > 1 else x.reshape(-1, 1) for x in tensors], 1)


@register_rule(torch.block_diag)
@follows_directions
def block_diag(*tensors: Any) -> Any:
    """Matrices along the diagonal of one that is zero elsewhere."""
    matrices = [torch.atleast_2d(x) for x in tensors]
    width, start, rows = sum(x.shape[1] for x in matrices), 0, list[Any]()
    for x in matrices:
        rows.append(F.pad(x, (start, width - start - x.shape[1])))
        start += x.shape[1]
    return torch.cat(rows, 0)


@register_rule(torch.broadcast_tensors)
@follows_directions
def broadcast_tensors(*tensors: Any) -> tuple[Any, ...]:
    """Tensors expanded to the shape of all."""
    tensors = tuple(tensors[0]) if len(tensors) == 1 and isinstance(tensors[0], list | tuple) else tensors
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    return tuple(x.expand(shape) for x in tensors)


@register_rule(torch.meshgrid)
@follows_directions
def meshgrid(*tensors: Any, indexing: str = "ij") -> tuple[Any, ...]:
    """Vectors expanded to the grid of all."""
    tensors = tuple(tensors[0]) if len(tensors) == 1 and isinstance(tensors[0], list | tuple) else tensors
    count = len(tensors)
    dims = [1, 0, *range(2, count)] if indexing == "xy" and count > 1 else list(range(count))
    return broadcast_tensors(
        *(x.reshape([-1 if d == dim else 1 for d in range(count)]) for x, dim in zip(tensors, dims, strict=True))
    )


@register_rule(F.pad)
def pad(input: Moments, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Moments:
    """Entries with a border: certain where it is constant, else with the variance of the entries that it repeats.

    Negative widths crop.
    """
    mean, variance, shared = parts(input)
    assert variance is not None, "a rule is for uncertain tensors"
    means, variances = F.pad(mean, pad, mode, value), F.pad(variance, pad, mode)
    if shared is None:
        return Moments(means, variances)
    shared, widths = aligned(shared, mean.dim()), list(pad)
    for i in range(len(pad) // 2):
        dim = mean.dim() - 1 - i
        if shared.shape[dim] == 1 and mean.shape[dim] > 1:
            left = mean.shape[dim] + sum(min(width, 0) for width in widths[2 * i : 2 * i + 2])
            widths[2 * i : 2 * i + 2] = 0, 0
            if mode == "constant" and means.shape[dim] > left:  # a mean over pairs of positions, some certain now
                shared = shared * (_pairs(left) / max(1, _pairs(means.shape[dim])))
    return Moments(means, variances, F.pad(shared, widths, mode) if any(widths) else shared)


@register_rule(torch.constant_pad_nd)
@follows_directions
def constant_pad_nd(input: Any, pad: Sequence[int], value: float = 0.0) -> Any:
    """Entries with a constant border."""
    return F.pad(input, pad, value=value)


def zeros(mean: Tensor) -> Tensor:
    """The variance of a certain tensor."""
    return torch.zeros((), dtype=torch.promote_types(mean.dtype, torch.float32), device=mean.device).expand(mean.shape)


def _pairs(count: int) -> int:
    """Pairs of two different ones."""
    return count * (count - 1)


def _joined(pieces: list[MomentTensors], dim: int, mean: Tensor) -> Tensor | None:
    """What pieces share: side by side along a dimension of units; along positions as if all was made by one weight."""
    if all(piece.shared is None for piece in pieces):
        return None
    shared = [None if piece.shared is None else aligned(piece.shared, mean.dim()) for piece in pieces]
    lengths = [piece.mean.shape[dim] for piece in pieces]
    found = [(s, length) for s, length in zip(shared, lengths, strict=True) if s is not None]
    if all(s.shape[dim] == 1 for s, _ in found) and any(length > 1 for _, length in found):
        roots = [std(s) * (s > 0) * length for s, length in found]
        between = total(roots).square() - total([root.square() for root in roots])
        within = total([s * _pairs(length) for s, length in found])
        return (within + between) / _pairs(mean.shape[dim])
    sizes = [max(s.shape[d] for s, _ in found) for d in range(mean.dim())]
    written = list[Tensor]()
    for piece, s, length in zip(pieces, shared, lengths, strict=True):
        sizes[dim] = length
        written.append(zeros(piece.mean)[(slice(1),) * mean.dim()].expand(sizes) if s is None else s.expand(sizes))
    return torch.cat(written, dim)
