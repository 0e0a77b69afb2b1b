"""The sparsity at each step: a pure function of the share of the training that is done.

Nothing is remembered between steps, so a run that was resumed goes on as if it had never stopped.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import nn

from bayesprune.foundation import defaults
from bayesprune.foundation.target import Target
from bayesprune.prune.scores.weights import snr
from bayesprune.prune.weights.floors import check_min_kept
from bayesprune.prune.weights.prune import Score, WeightReport, prune_weights

_ROUNDING = 1e-9  # 0.3 / 0.1 is a little below 3

Ramp = Literal["cubic", "geometric"]


def cubic(sparsity: float, progress: float) -> float:
    """s (1 - (1 - t)^3), fast while much is superfluous: Eq. 1 of Zhu and Gupta, 2017 (arXiv:1710.01878).

    Args:
        sparsity: The final sparsity s.
        progress: Share t of the removals that is done, 0 to 1.
    """
    return sparsity * (1 - (1 - progress) ** 3)


def geometric(sparsity: float, progress: float) -> float:
    """1 - (1 - s)^t, the same fraction of what is left each time (Frankle and Carbin, 2019, arXiv:1803.03635)."""
    return 1 - (1 - sparsity) ** progress


def shares(target: str, num_rounds: int, *, ramp: Ramp = "cubic") -> tuple[str, ...]:
    """The target of each of so many removals; the last is the one asked for.

    Args:
        target: "weights=0.2", the fraction that is kept in the end.
        num_rounds: In how many removals.
        ramp: "cubic", fast at first and slowly at the end, or "geometric", the same fraction of what is left each time.

    Raises:
        ValueError: a number is out of range, or there is no such ramp.

    Examples:
        >>> shares("weights=0.125", 3, ramp="geometric")
        ('weights=0.5', 'weights=0.25', 'weights=0.125')
    """
    ramps = {"cubic": cubic, "geometric": geometric}
    if ramp not in ramps:
        raise ValueError(f"ramp is {ramp!r}; expected one of {', '.join(ramps)}.")
    goal = Target.parse(target, ("weights",), "shares", is_partial=True)
    if num_rounds < 1:
        raise ValueError(f"the number of rounds is {num_rounds!r}; expected 1 or more.")
    kept = [1 - ramps[ramp](goal.removed, done / num_rounds) for done in range(1, num_rounds)]
    return tuple(map(str, [*(Target("weights", share) for share in kept), goal]))


@dataclass(frozen=True)
class PruneSchedule:
    """A schedule for removing single weights during training; they are zero from then on.

    The sparsity rises by `cubic`, fast while much is superfluous and slowly towards the end; after `end` the weights
    that are left recover.

    Attributes:
        target: "weights=0.2", the fraction of the weights of all variational layers, frozen ones apart, that is kept in
            the end.
        begin: Share of the training before the first removal, while the stds find their size.
        end: Share of the training at which the final sparsity is reached.
        num_updates: In how many removals.
        scope: Whether all weights are ranked together ("global") or each layer's apart ("layer").
        score: Score of a posterior's weights, the lowest going first.
        min_kept: What every weight tensor keeps, as for `prune_weights`.
    """

    target: str | Target
    begin: float = defaults.PRUNE_BEGIN
    end: float = defaults.PRUNE_END
    num_updates: int = defaults.PRUNE_UPDATES
    scope: Literal["global", "layer"] = "global"
    score: Score = snr
    min_kept: float = 1

    def __post_init__(self) -> None:
        Target.parse(self.target, ("weights",), "PruneSchedule", is_partial=True)
        if not 0 <= self.begin <= self.end <= 1:
            raise ValueError(f"begin={self.begin!r}, end={self.end!r}; expected 0 <= begin <= end <= 1.")
        if self.num_updates < 1:
            raise ValueError(f"num_updates is {self.num_updates!r}; expected 1 or more.")
        check_min_kept(self.min_kept)

    @cached_property
    def sparsity(self) -> float:
        """The fraction of the weights that is removed in the end."""
        return Target.parse(self.target, ("weights",), "PruneSchedule").removed

    def sparsity_at(self, progress: float) -> float:
        """Fraction of weights removed once the share `progress` of the training is done."""
        if progress >= self.end - _ROUNDING:
            return self.sparsity
        if progress <= self.begin:
            return 0.0
        done = (progress - self.begin) / (self.end - self.begin)
        done = math.floor(done * self.num_updates + _ROUNDING) / self.num_updates
        return cubic(self.sparsity, done)

    def removal_after(self, step: int, num_steps: int) -> float | None:
        """The sparsity to prune to after this step, counted from 1; None where the step before had it already."""
        target = self.sparsity_at(step / num_steps)
        before = self.sparsity_at((step - 1) / num_steps) if step > 1 else 0.0
        return target if target > before else None

    def remove(self, model: nn.Module, sparsity: float) -> WeightReport:
        """Prunes to this sparsity, with the schedule's own scope, score and floor; in place."""
        return prune_weights(
            model, Target("weights", 1 - sparsity), scope=self.scope, score=self.score, min_kept=self.min_kept
        )
