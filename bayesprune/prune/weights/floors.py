"""Which weights stay: exactly so many, the best by score, with a floor under every tensor.

A tensor that loses its last weight cuts the network through (layer collapse; Tanaka et al., 2020, arXiv:2006.05467).
What a floor keeps is paid by the other tensors, so that the total is what was asked for.
"""

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from bayesprune.errors import InfeasibleTargetError
from bayesprune.foundation.device import kth_smallest, numbers_of

_ADVICE = "Ask for a larger fraction, or in Python for no floor (min_kept=0). Nothing was changed."
_ROUNDING = 1e-9  # 0.1 * 30 is a little above 3


def floor_of(total: int, min_kept: float) -> int:
    """Weights that a tensor keeps at least: below 1 a fraction of its weights, rounded up, from 1 on a number."""
    return min(total, math.ceil(min_kept * total - _ROUNDING) if min_kept < 1 else int(min_kept))


def check_min_kept(min_kept: float) -> None:
    """Refuses what is neither a fraction nor a number.

    Raises:
        ValueError: it is neither.
    """
    is_number = isinstance(min_kept, Real)
    if not is_number or not (0 <= min_kept < 1 or (min_kept >= 1 and float(min_kept).is_integer())):
        raise ValueError(f"min_kept is {min_kept!r}; expected a fraction from 0, below 1, or a whole number from 1 on.")


def keep_best(scores: Sequence[Tensor], count: int, floors: Sequence[int]) -> tuple[list[Tensor], list[bool]]:
    """Masks without the lowest `count` of all tensors together, and the tensors in which the floor kept some of those.

    The best of each tensor up to its floor stay, and of all others the best: no choice within the floors keeps a higher
    sum of scores. Ties go by position.

    Args:
        scores: Scores of each tensor's weights, finite; -inf for those that are gone, which count.
        count: How many are gone in the end.
        floors: Weights that each tensor keeps at least, no more than it still has.

    Raises:
        InfeasibleTargetError: the floors leave fewer to remove.
    """
    sizes = [s.numel() for s in scores]
    _check(count, sum(sizes), floors)
    flat = torch.cat([s.flatten().to(scores[0].device) for s in scores])
    pieces, gone = flat.split(sizes), flat == -torch.inf
    is_floored = [False] * len(sizes)
    while True:
        keep = _above(flat, count) & ~gone
        kept = numbers_of([piece.sum() for piece in keep.split(sizes)]) if any(floors) else floors
        short = [index for index, number in enumerate(kept) if number < floors[index]]
        if not short:
            found = zip(keep.split(sizes), scores, strict=True)
            return [piece.view(s.shape).to(s.device) for piece, s in found], is_floored
        for index in short:
            pieces[index][pieces[index].topk(floors[index]).indices] = torch.inf
            is_floored[index] = True


def within_caps(counts: Sequence[int], caps: Sequence[int]) -> list[int]:
    """Numbers to remove from each tensor, capped: what a cap spares, the others lose in proportion to their size.

    Args:
        counts: How many are to leave each tensor; where none is, none does.
        caps: How many can.

    Raises:
        InfeasibleTargetError: the others cannot pay for it.

    Examples:
        >>> within_caps([9, 50, 0], [4, 90, 100])
        [4, 55, 0]
    """
    capped = [min(count, cap) for count, cap in zip(counts, caps, strict=True)]
    excess = sum(counts) - sum(capped)
    left = [cap - count if count else 0 for count, cap in zip(capped, caps, strict=True)]
    if excess > sum(left):
        raise InfeasibleTargetError(
            f"{sum(counts)} weights were to go, and the floors under the tensors let {sum(capped) + sum(left)} of them "
            f"go. {_ADVICE}"
        )
    if not excess:
        return capped
    shares = [excess * its // sum(left) for its in left]
    remainders = [excess * its % sum(left) for its in left]
    by_remainder = sorted(range(len(left)), key=remainders.__getitem__, reverse=True)
    for index in by_remainder[: excess - sum(shares)]:
        shares[index] += 1
    return [count + share for count, share in zip(capped, shares, strict=True)]


def _above(flat: Tensor, count: int) -> Tensor:
    """False for the lowest `count`."""
    if not count:
        return torch.ones_like(flat, dtype=torch.bool)
    threshold = kth_smallest(flat, count)  # many times faster than sorting all
    keep, ties = flat > threshold, flat == threshold
    return keep | (ties & (ties.cumsum(0, dtype=torch.int32) > count - (flat < threshold).sum()))


def _check(count: int, total: int, floors: Sequence[int]) -> None:
    if count > total - sum(floors):
        raise InfeasibleTargetError(
            f"{total - count:,} of {total:,} weights were to stay, and the floors under {len(floors)} tensors keep "
            f"{sum(floors):,}. {_ADVICE}"
        )
