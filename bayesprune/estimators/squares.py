"""Squares of stds as one node of the graph: those of a layer, or of many layers, made at the start of a forward.

Nothing of them is random, so that whoever asks in a forward may be given what was made ahead of it.
"""

import math
import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayesprune.estimators.seeded import LOG2_E
from bayesprune.estimators.types import runs_once
from bayesprune.foundation import noise
from bayesprune.foundation.device import has_cheap_calls


def squares_of(*log_stds: Tensor) -> Sequence[Tensor]:
    """exp(2 log_std) of each, not below the smallest normal number of its dtype; differentiable."""
    if not noise.can_repeat(log_stds[0].device):
        return [bounded(square_of(part, part.dtype)) for part in log_stds]
    return _AHEAD.take(log_stds) or _joint(log_stds)


def square_of(log_std: Tensor, dtype: torch.dtype) -> Tensor:
    """Variance of a log std, in this dtype."""
    if has_cheap_calls(log_std.device):
        return (log_std * (2 * LOG2_E)).exp2_().to(dtype)
    return torch.pow(math.e**2, log_std).to(dtype)


def bounded(squares: Tensor) -> Tensor:
    """Squares that may be divided by."""
    return squares.clamp_min(torch.finfo(squares.dtype).tiny)


def make_ahead(log_stds: Sequence[Tensor]) -> None:
    """Makes the squares of these, which `squares_of` gives out until `end_ahead`."""
    _AHEAD.begin(log_stds)


def end_ahead() -> list[Tensor]:
    """Forgets what was made ahead; returns the log stds that `squares_of` was asked for since, each once."""
    return _AHEAD.end()


class _Squares(torch.autograd.Function):
    """All of them in one tensor on the way; may be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, *log_stds: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        flat = torch.cat([part.reshape(-1) for part in log_stds])
        squares = bounded(square_of(flat, flat.dtype))
        ctx.save_for_backward(squares, *log_stds)
        return tuple(_split(squares, log_stds))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        squares, *log_stds = ctx.saved_tensors
        pairs = list(zip(gradients, log_stds, strict=True))
        if torch.is_grad_enabled():  # a graph of their own
            return tuple(None if given is None else 2 * given * square_of(part, part.dtype) for given, part in pairs)
        given = [torch.zeros_like(part) if gradient is None else gradient for gradient, part in pairs]
        flat = torch.cat([gradient.reshape(-1) for gradient in given]).mul_(squares).mul_(2)
        split = zip(_split(flat, log_stds), pairs, strict=True)
        return tuple(None if gradient is None else own.to(part.dtype) for own, (gradient, part) in split)


class _Ahead(threading.local):
    """What was made at the start of the forward that runs in this thread, and what was asked for in it."""

    def __init__(self) -> None:
        self._is_on = False
        self._asked: dict[int, Tensor] = {}
        self._made: dict[int, tuple[Tensor, int]] = {}

    def begin(self, log_stds: Sequence[Tensor]) -> None:
        self._is_on, self._asked, self._made = True, {}, {}
        by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
        for part in log_stds:
            by_device[part.device].append(part)
        for parts in by_device.values():
            squares = zip(parts, _joint(parts), strict=True)
            self._made.update((id(part), (square, part._version)) for part, square in squares)

    def end(self) -> list[Tensor]:
        asked, self._is_on, self._asked, self._made = list(self._asked.values()), False, {}, {}
        return asked

    def take(self, log_stds: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """The squares of these where all were made ahead and are still what they were."""
        if not self._is_on or not runs_once():
            return None
        self._asked.update((id(part), part) for part in log_stds)
        found = [self._made.get(id(part), (None, 0)) for part in log_stds]
        squares = [square for square, _ in found if square is not None]
        is_valid = all(part._version == version for part, (_, version) in zip(log_stds, found, strict=True))
        return squares if len(squares) == len(found) and is_valid else None


_AHEAD = _Ahead()


def _joint(log_stds: Sequence[Tensor]) -> Sequence[Tensor]:
    squares: Sequence[Tensor] = _Squares.apply(*log_stds)  # type: ignore[assignment]
    return squares


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    split = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(split, like, strict=True)]
