"""Keeps log stds between a floor and the prior's own std, many tensors at a time."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

from bayesprune.foundation.device import has_cheap_calls
from bayesprune.foundation.foreach import foreach
from bayesprune.foundation.sharding import full_tensor
from bayesprune.train.joined import joined, split_like, spread

MIN_LOG_STD = -20.0
"""exp(-20) = 2e-9: below the resolution of float32 beside any weight."""
_SMALL = 1 << 12  # elements up to which a tensor goes with others on a processor, too

Bounded = tuple[Sequence[Tensor], float]
"""The parts that add up to a log std, as far as they move, and the largest that it may be."""


@torch.no_grad()
def bound_log_stds(stds: Iterable[Bounded]) -> None:
    """Keeps each log std between a floor and its bound; of several parts the first gives way."""
    single: dict[tuple, list[tuple[Tensor, float]]] = defaultdict(list)
    several: dict[tuple, list[Bounded]] = defaultdict(list)
    for parts, largest in stds:
        first, *_ = parts
        is_large = has_cheap_calls(first.device) and first.numel() > _SMALL
        if is_large or any(hasattr(part, "to_local") for part in parts):
            bound_log_std(parts, largest)
        elif len(parts) == 1:
            single[first.device, first.dtype].append((first, largest))
        else:
            several[first.device, first.dtype].append((parts, largest))
    for pairs in single.values():
        log_stds, largest = zip(*pairs, strict=True)
        foreach("clamp_min_", log_stds, MIN_LOG_STD)
        foreach("clamp_max_", log_stds, largest)
    for those in several.values():
        foreach("clamp_min_", [part for parts, _ in those for part in parts], MIN_LOG_STD)
        if finite := [(parts, largest) for parts, largest in those if largest < math.inf]:
            _bound_sums(finite)


def bound_log_std(parts: Sequence[Tensor], largest: float) -> None:
    """The same for one."""
    if len(parts) == 1:
        parts[0].clamp_(MIN_LOG_STD, largest)
        return
    for part in parts:
        part.clamp_(min=MIN_LOG_STD)
    if largest < math.inf:
        of_others = [full_tensor(part).amax() for part in parts[1:]]  # a process may hold nothing of a part
        first = parts[0].to_local() if hasattr(parts[0], "to_local") else parts[0]  # type: ignore[attr-defined]
        first.copy_(torch.minimum(first, largest - reduce(torch.add, of_others)))


def _bound_sums(stds: Sequence[Bounded]) -> None:
    firsts = [parts[0] for parts, _ in stds]
    maxima = torch.stack(foreach("max", [part for parts, _ in stds for part in parts[1:]]))
    device, counts = maxima.device, tuple(len(parts) - 1 for parts, _ in stds)
    if max(counts) > 1:
        maxima = torch.stack([part.sum() for part in maxima.split(counts)])
    sizes = tuple(first.numel() for first in firsts)
    bounds = spread(tuple(largest for _, largest in stds), (1,) * len(stds), device, maxima.dtype) - maxima
    bounds = bounds[spread(tuple(range(len(stds))), sizes, device, torch.int64)]
    foreach("copy_", firsts, split_like(torch.minimum(joined(firsts), bounds), firsts))
