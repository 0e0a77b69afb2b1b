"""The KL's temperature and the sparsity at each step: pure functions of the share of the training that is done.

Nothing is remembered between steps, so a run that was resumed goes on as if it had never stopped. The sparsity follows
the cubic ramp of Zhu and Gupta, 2017 (arXiv:1710.01878), Eq. 1.
"""

import math
from dataclasses import dataclass
from typing import Literal

from bayesprune.prune.scores import snr
from bayesprune.prune.weights import Score

_ROUNDING = 1e-9  # 0.3 / 0.1 is a little below 3


def ramp(progress: float, warmup: float) -> float:
    """Rises linearly from 0 to 1 over the share `warmup` of the training, and stays there.

    Args:
        progress: Share of the training that is done after this step, above 0 to 1.
        warmup: Share of the training over which it rises; 0 is no ramp.
    """
    return min(1.0, progress / warmup) if warmup else 1.0


@dataclass(frozen=True)
class PruneSchedule:
    """When how many single weights are removed during training; zeros from then on.

    The sparsity rises as sparsity * (1 - (1 - t)^3), fast while much is superfluous and slowly towards the end; after
    `end` the weights that are left recover.

    Attributes:
        sparsity: Fraction of the weights of all variational layers that is removed in the end.
        begin: Share of the training before the first removal, while the stds find their size.
        end: Share of the training at which the final sparsity is reached.
        num_updates: In how many removals.
        scope: Whether all weights are ranked together ("global") or each layer's apart ("layer").
        score: Score of a posterior's weights, the lowest going first.
    """

    sparsity: float
    begin: float = 0.25
    end: float = 0.75
    num_updates: int = 50
    scope: Literal["global", "layer"] = "global"
    score: Score = snr

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity is {self.sparsity!r}; expected a fraction of weights between 0 and 1.")
        if not 0 <= self.begin <= self.end <= 1:
            raise ValueError(f"begin={self.begin!r}, end={self.end!r}; expected 0 <= begin <= end <= 1.")
        if self.num_updates < 1:
            raise ValueError(f"num_updates is {self.num_updates!r}; expected 1 or more.")

    def sparsity_at(self, progress: float) -> float:
        """Fraction of weights removed once the share `progress` of the training is done."""
        if progress >= self.end - _ROUNDING:
            return self.sparsity
        if progress <= self.begin:
            return 0.0
        done = (progress - self.begin) / (self.end - self.begin)
        done = math.floor(done * self.num_updates + _ROUNDING) / self.num_updates
        return self.sparsity * (1 - (1 - done) ** 3)

    def removal_after(self, step: int, num_steps: int) -> float | None:
        """The sparsity to prune to after this step, counted from 1; None where the step before had it already."""
        target = self.sparsity_at(step / num_steps)
        before = self.sparsity_at((step - 1) / num_steps) if step > 1 else 0.0
        return target if target > before else None
