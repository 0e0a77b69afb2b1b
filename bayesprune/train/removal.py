"""Removal of single weights on the way: when a schedule says so, after an optimizer's step."""

from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from bayesprune.train.optimizers import StepCount, forget_removed


class RemovalSchedule(Protocol):
    """When how much of a model is removed: `prune.PruneSchedule`, or an object of your own."""

    def sparsity_at(self, progress: float) -> float:
        """Fraction of weights removed once the share `progress` of the training is done; it never falls."""
        ...

    def remove(self, model: nn.Module, sparsity: float) -> Any:
        """Removes weights up to this sparsity, those included that were removed before; in place."""
        ...


class Removal:
    """A schedule that runs with a training.

    Attributes:
        sparsity: The fraction that the schedule has removed so far.
    """

    def __init__(self, schedule: RemovalSchedule, num_steps: int, model: nn.Module) -> None:
        """`num_steps` are those of the whole training."""
        self._schedule, self._num_steps, self._model = schedule, num_steps, model
        self.sparsity = 0.0

    def resume(self, step: int) -> None:
        """Goes on after this step, with a model from which everything up to here was removed."""
        self.sparsity = self._at(step)

    def update(self, steps: StepCount, optimizer: Optimizer) -> None:
        """Removes what is due after the steps taken, and what the optimizer remembers of it."""
        if self._at(steps.at_most) <= self.sparsity:  # then the device need not be asked for the number of steps
            return
        sparsity = self._at(steps.value)
        if sparsity > self.sparsity:
            self._schedule.remove(self._model, sparsity)
            forget_removed(optimizer, self._model)
            self.sparsity = sparsity

    def _at(self, step: int) -> float:
        return self._schedule.sparsity_at(step / self._num_steps) if step else 0.0
