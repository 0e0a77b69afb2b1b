"""Rules for what joins tensors or writes into one: cat, stack, borders, assignment. Exact; no product.

Parts that share along the joined dimension are taken as made by the same weights, so that they share with each other.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesprune.moments.elementwise import in_place
from bayesprune.moments.gaussian import std, total
from bayesprune.moments.registry import follows_directions, register_rule
from bayesprune.moments.shared import aligned
from bayesprune.moments.tensor import Moments, Parts, known, parts


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


@register_rule(F.pad, torch.constant_pad_nd)
def pad(input: Moments, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Moments:
    """Entries with a border: certain where it is constant, else with the variance of the entries that it repeats."""
    mean, variance, shared = parts(input)
    assert variance is not None, "a rule is for uncertain tensors"
    means, variances = F.pad(mean, pad, mode, value), F.pad(variance, pad, mode)
    if shared is None:
        return Moments(means, variances)
    shared, widths = aligned(shared, mean.dim()), list(pad)
    for i in range(len(pad) // 2):
        dim = mean.dim() - 1 - i
        if shared.shape[dim] == 1 and mean.shape[dim] > 1:
            widths[2 * i : 2 * i + 2] = 0, 0
            if mode == "constant":  # a mean over pairs of positions, of which some are certain now
                shared = shared * (_pairs(mean.shape[dim]) / _pairs(means.shape[dim]))
    return Moments(means, variances, F.pad(shared, widths, mode) if any(widths) else shared)


@register_rule(Tensor.__setitem__)
@follows_directions
def set_item(x: Any, index: Any, value: Any) -> None:
    """Writes entries; what positions had in common is given up."""
    in_place(_assigned)(x, index, value)


def zeros(mean: Tensor) -> Tensor:
    """The variance of a certain tensor."""
    return torch.zeros((), dtype=torch.promote_types(mean.dtype, torch.float32), device=mean.device).expand(mean.shape)


def _assigned(x: Moments, index: Any, value: Any) -> Moments:
    old, new = known(x), known(value)

    def written(into: Tensor, what: Any) -> Tensor:
        into = into.clone()
        into[index] = what
        return into

    mean, none = written(old.parts.mean, new.parts.mean), zeros(old.parts.mean)
    sets = [d for d in (old.directions, new.directions) if d is not None]
    if not sets:
        before, after = (0 if p.variance is None else p.variance for p in (old.parts, new.parts))
        return Moments(mean, written(none + before, after))
    each = [[0] * len(sets[0]) if d is None else d for d in (old.directions, new.directions)]
    directions = torch.stack([written(none + before, after) for before, after in zip(*each, strict=True)])
    before, after = (0 if k.residual is None else k.residual for k in (old, new))
    return Moments.along(mean, directions, written(none + before, after))


def _pairs(count: int) -> int:
    """Pairs of two different ones."""
    return count * (count - 1)


def _joined(pieces: list[Parts], dim: int, mean: Tensor) -> Tensor | None:
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
