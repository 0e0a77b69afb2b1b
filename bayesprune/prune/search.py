"""Self-compression: makes a model as small as a tolerated loss allows, by removing, retraining and looking again.

The loop of Carannante et al. (2021): train, remove what carries nothing, retrain the smaller model, until the accuracy
on validation data falls. Then bisection: between the smallest size that passed and the largest that failed, on a
logarithmic scale, each trial going on from the model that passed. Small cuts with training in between end far below
what one deep cut of the trained model allows (docs/pruning.md has figures).

Bisection takes the score for a function that never rises when more is removed. A measured score is not quite that:
where it is noisy, a size may fail by chance, and nothing below it is tried again, or pass by chance. Whatever happens,
the model that is returned is one that was evaluated, with its own score within the tolerance.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.table import Table
from torch import nn

from bayesprune.errors import InfeasibleTargetError
from bayesprune.foundation.numbers import as_number
from bayesprune.foundation.sharding import check_whole
from bayesprune.foundation.target import Target
from bayesprune.foundation.text import as_text
from bayesprune.layers import removable_weights
from bayesprune.prune.batch_norm import repeatable
from bayesprune.prune.channels.prune import prune_channels
from bayesprune.prune.graph.prunable_layers import layer_names
from bayesprune.prune.weights.prune import prune_weights

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchStep:
    """One model: the fraction kept of MACs or weights, its score, and whether that is within the tolerance."""

    kept: float
    score: float
    accepted: bool


@dataclass(frozen=True)
class Compression:
    """The smallest model that was found within the tolerance, and all that was tried; prints as a table.

    Attributes:
        model: The very model that was evaluated, or a copy of the uncut one where no trial was accepted.
        trials: In the order of the search, the uncut model first.
        by: What was counted, "macs" or "weights".
        reference: The score that the others were compared with.
        tolerance: Largest loss of it that was accepted.
    """

    model: nn.Module
    trials: tuple[SearchStep, ...]
    by: str
    reference: float
    tolerance: float

    @property
    def curve(self) -> tuple[SearchStep, ...]:
        """The trials from the largest model to the smallest."""
        return tuple(sorted(self.trials, key=lambda trial: trial.kept, reverse=True))

    def to_dict(self) -> dict[str, Any]:
        """All but the model, for JSON: the curve under "trials"."""
        options = {"by": self.by, "reference": self.reference, "tolerance": self.tolerance}
        return options | {"trials": [asdict(trial) for trial in self.curve]}

    def __str__(self) -> str:
        """The curve as plain text."""
        smallest = min((trial.kept for trial in self.trials if trial.accepted), default=None)
        found = "nothing within the tolerance" if smallest is None else f"{smallest:.2%} of the {UNITS[self.by]} kept"
        table = Table("kept", "score", "loss", "")
        for trial in self.curve:
            verdict = "smallest" if trial.accepted and trial.kept == smallest else "" if trial.accepted else "too low"
            table.add_row(f"{trial.kept:.2%}", f"{trial.score:.4f}", f"{self.reference - trial.score:.4f}", verdict)
        return as_text(f"{found} (tolerance {self.tolerance:g})", table)


_SMALLEST = 1e-4  # the size that counts as failed before any did


def smallest_within(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    evaluate: Callable[[nn.Module], float],
    tolerance: float,
    fine_tune: Callable[[nn.Module], object] | None = None,
    by: Literal["macs", "weights"] = "macs",
    reference: float | None = None,
    step: float = 0.3,
    min_step: float = 0.05,
    data: Iterable[Any] | None = None,
    **options: Any,
) -> Compression:
    """The smallest model whose score stays within `tolerance`, by MACs or by single weights, and the whole curve.

    Each trial cuts a copy of the smallest model that passed, fine-tunes and evaluates it. The first cuts remove the
    fraction `step`; once a size has failed, sizes above it are tried. Sizes are fractions: of the MACs of `model`, or
    of all its weights that can go, biases apart. The stds stay as they are, unless `fine_tune` trains them.

    Args:
        model: A variational model, with trained posteriors unless there is `data`; it is not changed.
        example_inputs: Inputs of the model's forward, for counting and tracing; single weights need none.
        evaluate: Score of a model on validation data, higher is better, in evaluation mode. Never the test split.
        tolerance: Largest loss of that score that is accepted, in its own unit.
        fine_tune: Trains a model in place after each cut, with an optimizer of its own.
        by: What is counted: "macs", and channels are removed, or "weights", and single weights are.
        reference: The score that is compared with; None is that of `model`.
        step: Fraction of what is there that one cut removes at most, between 0 and 1. Without `fine_tune` cuts may be
            larger, since nothing is learned between them.
        min_step: The search ends when a size that failed is no further than this fraction below the one that passed.
        data: Batches for each cut, as for `prune_channels` or `prune_weights`: they recalibrate batch norm, and of
            channels rank, unless `importance` is given, and fit the weights that stay.
        **options: Further options of `prune_channels` (`importance`, `granularity`, `uniform`, ...) or of
            `prune_weights` (`score`, `scope`, `min_kept`).

    Raises:
        TypeError: `evaluate` returned no number.
        ValueError: an option is not one of those named, or out of range, the score of the uncut model is NaN, or the
            importance is of one model alone, as `UnitSNRImportance` and `MeasuredImportance` are.
        UnsupportedModelError: the model is sharded over processes.
    """
    check_whole(model, "smallest_within")
    if not tolerance >= 0:  # nor NaN
        raise ValueError(f"tolerance is {tolerance!r}; expected the largest accepted loss of the score, 0 or more.")
    if by not in UNITS:
        raise ValueError(f"by is {by!r}; expected one of {', '.join(UNITS)}.")
    if by == "macs" and example_inputs is None:
        raise ValueError(
            "smallest_within needs example_inputs to remove channels; they are counted and traced with them."
        )
    if not 0 < min_step <= step < 1:
        raise ValueError(f"step={step!r}, min_step={min_step!r}; expected 0 < min_step <= step < 1.")
    if getattr(importance := options.get("importance"), "is_of_one_model", False):
        raise ValueError(
            f"smallest_within cuts several times, and {type(importance).__name__} scores the channels of one model "
            "alone; leave importance out and pass data=, by which each cut ranks anew, or take one that scores any "
            "model, such as SNRImportance()."
        )
    if "ignored_layers" in options:  # of the model, where copies of it are cut
        options["ignored_layers"] = layer_names(model, options["ignored_layers"])
    data, score = repeatable(data), as_number(evaluate(model), "evaluate")
    reference = score if reference is None else reference
    if math.isnan(reference):
        raise ValueError("the score to compare with is nan; expected a number. Check evaluate on the uncut model.")
    kept = 1.0 if by == "macs" else _share_of_weights(model)
    smallest, trials = model, [SearchStep(kept, score, score >= reference - tolerance)]
    passed, failed, failed_sizes = kept, _SMALLEST, set[float]()
    while passed * (1 - min_step) > failed:
        fraction = max(math.sqrt(failed * passed), 0 if fine_tune is None else passed * (1 - step))
        candidate = copy.deepcopy(smallest)
        try:
            size = _cut(candidate, example_inputs, by, kept, fraction, data=data, **options)
        except InfeasibleTargetError as error:
            _LOGGER.info("smallest_within: %s", error)
            failed = fraction
            continue
        if size in failed_sizes:  # the same cut of the same model
            failed = fraction
            continue
        if fine_tune is not None:
            fine_tune(candidate)
        score = as_number(evaluate(candidate), "evaluate")
        trials.append(SearchStep(size, score, score >= reference - tolerance))
        verdict = "kept" if trials[-1].accepted else "undone"
        _LOGGER.info("smallest_within: %.2f%% of the %s, score %.4f, %s", 100 * size, UNITS[by], score, verdict)
        if trials[-1].accepted:
            smallest, kept, passed = candidate, size, min(size, fraction)
            failed_sizes.clear()
        else:
            failed = fraction
            failed_sizes.add(size)
    if not any(trial.accepted for trial in trials):
        _LOGGER.warning(
            "smallest_within found no model within %g of the score %.4f; the uncut one has %.4f and is returned.",
            tolerance,
            reference,
            trials[0].score,
        )
    found = copy.deepcopy(model) if smallest is model else smallest
    return Compression(found, tuple(trials), by, reference, tolerance)


def _cut(model: nn.Module, example_inputs: Any, by: str, kept: float, fraction: float, **options: Any) -> float:
    """The size of the model after a cut from `kept` down to `fraction`."""
    if by == "weights":
        weights = prune_weights(model, Target("weights", fraction), **options).removable
        return weights.kept / weights.total
    channels = prune_channels(model, example_inputs, Target("macs", fraction / kept), **options)
    return kept * channels.macs_after / channels.macs_before


def _share_of_weights(model: nn.Module) -> float:
    """The fraction of the weights that can go that no mask has removed."""
    masks = [(posterior.mask, posterior.mean.numel()) for posterior in removable_weights(model)]
    kept = sum(total if mask is None else int(mask.sum()) for mask, total in masks)
    return kept / sum(total for _, total in masks)


UNITS = {"macs": "MACs", "weights": "weights"}
"""What is counted where these are removed."""
