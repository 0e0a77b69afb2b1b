"""What a cut does with calibration data: it divides the budget between groups, makes up for what goes, and checks.

Costs of units in different groups compare by the second-order loss only as long as little goes (`unit_snr`). What a
group costs in the end depends on how many layers behind it can still make up for it. So the costs of the groups are
multiplied by exp(t d), d being a group's depth from 0 to 1, and t is the one with which the whole model, cut and
compensated, is closest to the dense one. That is the search over coefficients of SPDY (Frantar & Alistarh, 2022), along
the one direction that matters here.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.foundation import defaults
from bayesprune.foundation.batches import split, with_examples
from bayesprune.foundation.model import eval_mode, same_random_numbers
from bayesprune.foundation.progress import progress_bar
from bayesprune.laplace.calibration import as_predictions, output_metric, predictions, total_divergence
from bayesprune.laplace.compensation import compensate
from bayesprune.laplace.kronecker import KroneckerPosterior, fit_kronecker
from bayesprune.prune.batch_norm import MAX_BATCHES
from bayesprune.prune.graph.group import ChannelGroup
from bayesprune.prune.graph.removal import lost_inputs
from bayesprune.prune.graph.trials import silence_inputs
from bayesprune.prune.scores.channels import Scored, SNRImportance, lowest_units, unit_scores
from bayesprune.prune.scores.scale_snr import ScaleSNRImportance
from bayesprune.prune.scores.unit_snr import UnitSNRImportance

MAX_TILT = 3.0
_SEARCH_EXAMPLES = 256  # to compensate in the search; as many others judge
_DAMPING = 0.01  # of compensation in the search, which then takes a third of the time
_POSITIONS = 128  # for each input or output of a layer, to fit its posterior
_MAX_LOGITS = 2**21  # of a batch that are kept

_LOGGER = logging.getLogger(__name__)


class Calibration:
    """Batches for one cut of a model, and what the dense model makes of them.

    Attributes:
        batches: On the model's device, of up to 1,024 examples.
        num_examples: How many they are.

    Raises:
        ValueError: there is no batch.
    """

    def __init__(self, model: nn.Module, data: Iterable[Any]) -> None:
        self.batches: list[Any] = []
        self.num_examples = 0
        for batch in with_examples(model, data, MAX_BATCHES):
            self.batches.append(batch)
            self.num_examples += split(model, batch).num_examples
            if self.num_examples >= defaults.CALIBRATION_EXAMPLES:
                break
        if not self.batches:
            raise ValueError("data has no batch; expected an iterable of input batches.")
        self._dense = [_predictions(model, batch) for batch in self.batches]

    @property
    def has_predictions(self) -> bool:
        """Whether the model puts out a vector for each example or token, so that divergences are known."""
        return all(dense is not None for dense in self._dense)

    def divergence(self, model: nn.Module, batches: slice = slice(None)) -> float:
        """KL(dense || model) of predicted classes in nats, or half the squared error of a single output; the mean.

        NaN where the model makes no predictions.
        """
        total, number = 0.0, 0
        for batch, dense in zip(self.batches[batches], self._dense[batches], strict=True):
            now = _predictions(model, batch)
            if dense is None or now is None:
                return math.nan
            total += total_divergence(dense, now)
            number += len(dense)
        return total / number

    def parts(self) -> tuple[slice, slice]:
        """Batches that compensate in a search, and others that judge; both are all of them where there is but one."""
        number = math.ceil(_SEARCH_EXAMPLES * len(self.batches) / self.num_examples)
        number = min(number, len(self.batches) // 2)
        return (slice(number), slice(number, 2 * number)) if number else (slice(None), slice(None))


def unit_costs(
    model: nn.Module, groups: Sequence[ChannelGroup], posterior: KroneckerPosterior, calibration: Calibration
) -> tuple[dict[ChannelGroup, Scored | None], list[str]]:
    """Each group's units with what they cost, and the names of the groups that no layer of the posterior reads.

    The cost is the unit SNR. Where no reader of a group is in the posterior, as of the hidden units of experts, it is
    the scale SNR.
    """
    importance = UnitSNRImportance(model, posterior)
    found = {group: unit_scores(importance, group) for group in progress_bar(groups, "Rank units", "group")}
    others = [group for group, scored in found.items() if scored is None and unit_scores(SNRImportance(), group)]
    if others:
        importance = ScaleSNRImportance(model, calibration.batches)
        found |= {group: unit_scores(importance, group) for group in others}
    return found, [group.name for group in others if found[group]]


def logit_posterior(model: nn.Module, calibration: Calibration) -> KroneckerPosterior:
    """The posterior whose metric is that of the logits; the same for the same model and batches."""
    with same_random_numbers(model):
        return fit_kronecker(model, calibration.batches, loss=output_metric, num_positions=_POSITIONS)


Choose = Callable[[list[list[float]]], list[int]]
"""How many units leave each group, for scores of each group's units."""


def searched_tilt(
    model: nn.Module,
    scored: Sequence[Scored],
    saved: Sequence[int],
    choose: Choose,
    calibration: Calibration,
) -> float:
    """The tilt that divides the budget best between the groups.

    Cost: a compensation with 256 examples for each of four to seven tilts. The model is as before afterwards.

    Args:
        model: The dense model.
        scored: Groups in the model's order, and the costs of their units.
        saved: What a unit of each group saves, in the unit of the budget.
        choose: What the scores decide.
        calibration: Data, of which one part compensates and another judges.
    """
    fits, judges = calibration.parts()
    tried: dict[tuple[int, ...], float] = {}
    bar = progress_bar(None, "Divide between layers", "try")

    def divergence(tilt: float) -> float:
        counts = tuple(choose(tilted(scored, saved, tilt)))
        if counts not in tried:
            selection = [
                (its.group, lowest_units(its.group, its.scores, n)) for its, n in zip(scored, counts, strict=True)
            ]
            trial, lost = copy.deepcopy(model), lost_inputs(selection)
            for name, positions in lost.items():
                silence_inputs(trial.get_submodule(name), positions)
            compensate(trial, calibration.batches[fits], lost, dense=model, damping=_DAMPING)
            tried[counts] = calibration.divergence(trial, judges)
            _LOGGER.info("tilt %g: divergence %.4f nats", tilt, tried[counts])
            bar.update()
        return tried[counts]

    with bar:
        return best_tilt(divergence)


def tilted(scored: Sequence[Scored], saved: Sequence[int], tilt: float) -> list[list[float]]:
    """Costs of each group's units for what a unit saves, times exp(tilt depth)."""
    factors = depth_factors(len(scored), tilt)
    return [
        [cost * factor / max(each, 1.0) for cost in its.scores]
        for its, factor, each in zip(scored, factors, saved, strict=True)
    ]


def best_tilt(loss: Callable[[float], float]) -> float:
    """The tilt with the smallest loss of 0, 1, 2 and 3; where that is 0, of -1, -2 and -3 as well, while it falls.

    Upwards, layers behind make up for earlier ones. Downwards, little of what the last layers compute is read, as in a
    transformer whose classifier reads the first token alone.
    """
    losses = {tilt: loss(tilt) for tilt in (0.0, 1.0, 2.0, MAX_TILT)}
    best = min(losses, key=losses.__getitem__)
    while -MAX_TILT < best <= 0 and (found := loss(best - 1)) < losses[best]:
        best -= 1
        losses[best] = found
    return best


def depth_factors(number: int, tilt: float) -> list[float]:
    """exp(t d) of so many groups in the model's order, d being their depth from 0 to 1."""
    return [math.exp(tilt * depth / max(1, number - 1)) for depth in range(number)]


def _predictions(model: nn.Module, batch: Any) -> Tensor | None:
    """As many of the model's predictions as fit, as `total_divergence` compares them; None without any."""
    with torch.no_grad(), eval_mode(model):
        try:
            logits = predictions(model, split(model, batch))
        except (TypeError, ValueError):
            return None
    if not logits.is_floating_point() or not logits.numel():
        return None
    return as_predictions(logits[:: math.ceil(logits.numel() / _MAX_LOGITS)].float())
