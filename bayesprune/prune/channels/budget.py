"""A latency as the budget of a cut: predicted by the times of layers, corrected by the times of whole models."""

import copy
import logging
import statistics
from collections.abc import Sequence
from typing import Any

from torch import nn

from bayesprune.errors import InfeasibleTargetError
from bayesprune.foundation.latency import seconds_by_module, seconds_in_turn

_BELOW, _ABOVE = 0.04, 0.01  # of the latency asked for, in which a cut is accepted
_MOST_CUTS = 6
_REPEATS = 15

_LOGGER = logging.getLogger(__name__)


class LatencyBudget:
    """Finds how much of the layers' own time a cut may keep for the model to be as fast as was asked.

    The time of a layer is taken to shrink with its channels as its MACs do. Whole models do not follow that: the time
    of activations and of launching kernels stays, and kernels prefer some sizes. So each cut model is timed against the
    dense one, the two taking turns, and the fraction is corrected along the line through what was measured.

    Attributes:
        seconds: Of a forward of the dense model, by module.
        fraction: Of the time of the layers that lose channels, as predicted, that the next cut keeps.
        decided: The numbers of units of the cut to keep, once there is nothing more to try.
        achieved: The share of the dense model's time that the best cut so far takes; 0 where none was fast enough.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, share: float) -> None:
        self.dense, self.example_inputs, self.share = copy.deepcopy(model), example_inputs, share
        self.seconds = seconds_by_module(self.dense, example_inputs)
        self.fraction, self.achieved = share, 0.0
        self.decided: list[int] | None = None
        self._best: list[int] = []
        self._measured: dict[tuple[int, ...], float] = {}
        self._slow, self._fast = (1.0, 1.0), None  # (fraction, share) of the nearest cuts on either side

    def accepts(self, model: nn.Module, counts: Sequence[int]) -> bool:
        """Times a cut model; whether it is the one to keep. If not, `fraction` or `decided` says what to cut next.

        Raises:
            InfeasibleTargetError: no cut that was tried is fast enough.
        """
        if list(counts) == self.decided:
            return True
        is_new = tuple(counts) not in self._measured
        share = (
            self._measured.setdefault(tuple(counts), self._share(model)) if is_new else self._measured[tuple(counts)]
        )
        _LOGGER.info("a cut to %.3f of the layers' time takes %.3f of the model's", self.fraction, share)
        if self.achieved < share <= self.share * (1 + _ABOVE):
            self.achieved, self._best = share, list(counts)
        if not is_new or len(self._measured) == _MOST_CUTS or share == self.achieved >= self.share * (1 - _BELOW):
            self.decided = self._best
            if not self._best:
                raise InfeasibleTargetError(
                    f"the target latency={self.share:g} was not reached: the fastest of {len(self._measured)} cuts "
                    f"takes {min(self._measured.values()):.3f} of the time. What the layers that lose channels do not "
                    "take stays as it is. Ask for a larger fraction, or a larger batch. Nothing was changed."
                )
            return self._best == list(counts)
        if share > self.share:
            self._slow = self.fraction, share
        else:
            self._fast = self.fraction, share
        self.fraction = self._next()
        return False

    def _share(self, model: nn.Module) -> float:
        dense, cut = seconds_in_turn([self.dense, model], self.example_inputs, num_repeats=_REPEATS)
        return statistics.median(one / other for one, other in zip(cut, dense, strict=True))

    def _next(self) -> float:
        """The fraction at which the line through two cuts has the share that was asked for."""
        (x, y), (other_x, other_y) = self._slow, self._fast or (1.0, 1.0)
        if y == other_y:  # no cut was faster than the dense model
            return x / 2
        found = x + (self.share - y) * (other_x - x) / (other_y - y)
        return min(max(found, x / 2 if self._fast is None else 0.0), 1.0)
