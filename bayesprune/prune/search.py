"""Self-compression: makes a model as small as a tolerated loss allows, by removing, retraining and looking again.

The loop of Carannante et al. (2021): train, remove what carries nothing, retrain the smaller model, until the accuracy
on validation data falls. A cut that costs too much is taken back and tried again at half its size.
"""

import copy
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from bayesprune.errors import InfeasibleTargetError
from bayesprune.prune.channels import prune_channels

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One cut: MACs kept, as a fraction of the model at the start, the score after it, and whether it was kept."""

    macs: float
    score: float
    accepted: bool


@dataclass(frozen=True)
class Compression:
    """The smallest model within the tolerance, and the trials that led to it, the uncut model first."""

    model: nn.Module
    trials: tuple[Trial, ...]


def compress(
    model: nn.Module,
    example_inputs: Any,
    *,
    evaluate: Callable[[nn.Module], float],
    tolerance: float,
    fine_tune: Callable[[nn.Module], object] | None = None,
    reference: float | None = None,
    step: float = 0.3,
    min_step: float = 0.05,
    data: Iterable[Any] | None = None,
    importance: Any = None,
    **options: Any,
) -> Compression:
    """The smallest model whose score stays within `tolerance`, found by cutting channels step by step.

    Each step removes the fraction `step` of the present MACs from a copy, fine-tunes and evaluates it. A copy within
    the tolerance replaces the model; otherwise the step is halved, until it is below `min_step`.

    Args:
        model: A variational model with trained posteriors; it is not changed.
        example_inputs: Inputs of the model's forward, for counting and tracing.
        evaluate: Score of a model on validation data, higher is better, in evaluation mode. Never the test split.
        tolerance: Largest loss of that score that is accepted, in its own unit.
        fine_tune: Trains a model in place after each cut, with an optimizer of its own.
        reference: The score that is compared with; None is that of `model`.
        step: Fraction of the MACs that the first cuts remove, between 0 and 1.
        min_step: The search ends when the step falls below this.
        data: Batches for recalibrating batch norm after each cut.
        importance: The criterion, as for `prune_channels`.
        **options: Further options of `prune_channels` (`granularity`, `uniform`, `round_to`, `ignored_layers`).

    Raises:
        ValueError: the tolerance is negative or the steps are not fractions.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance is {tolerance!r}; expected the largest accepted loss of the score, 0 or more.")
    if not 0 < min_step <= step < 1:
        raise ValueError(f"step={step!r}, min_step={min_step!r}; expected 0 < min_step <= step < 1.")
    score = evaluate(model)
    reference = score if reference is None else reference
    smallest, kept, trials = model, 1.0, [Trial(1.0, score, True)]
    while step >= min_step:
        candidate = copy.deepcopy(smallest)
        try:
            report = prune_channels(
                candidate, example_inputs, target={"macs": 1 - step}, importance=importance, data=data, **options
            )
        except InfeasibleTargetError as error:
            _LOGGER.info("compress: %s", error)
            step /= 2
            continue
        if fine_tune is not None:
            fine_tune(candidate)
        score, macs = evaluate(candidate), kept * report.macs_after / report.macs_before
        accepted = score >= reference - tolerance
        trials.append(Trial(macs, score, accepted))
        _LOGGER.info(
            "compress: %.1f%% of the MACs, score %.4f, %s", 100 * macs, score, "kept" if accepted else "undone"
        )
        if accepted:
            smallest, kept = candidate, macs
        else:
            step /= 2
    return Compression(copy.deepcopy(model) if smallest is model else smallest, tuple(trials))
