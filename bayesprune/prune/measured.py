"""Divides a budget between layers by what cutting each of them costs, measured on calibration data.

A score orders the weights or channels inside one layer; whether its scale compares between layers is another matter.
Here each layer alone is cut to several levels and the loss measured, forward passes only. The increases, as a function
of how much is gone, are replaced by their lower convex hull, whose slopes say what the next piece of each layer costs:
the division with the smallest sum of increases takes the pieces in the order of their slopes (Shoham & Gersho, 1988).
The sum leaves out that cuts in several layers add up to more than their parts.
"""

import itertools
import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch_pruning.dependency import Group

from bayesprune.foundation.model import eval_mode
from bayesprune.foundation.numbers import as_number
from bayesprune.foundation.progress import progress_bar
from bayesprune.foundation.target import Target
from bayesprune.layers import Posterior, removable_weights
from bayesprune.prune.channels import plan
from bayesprune.prune.graph.find import groups_in
from bayesprune.prune.graph.group import GRANULARITY, ChannelGroup, by_channel
from bayesprune.prune.graph.observe import Observed
from bayesprune.prune.graph.prunable_layers import Layers
from bayesprune.prune.graph.removal import snapshot
from bayesprune.prune.graph.trials import silence
from bayesprune.prune.scores.channels import Criterion, Importance, SNRImportance, lowest_units, unit_scores
from bayesprune.prune.scores.weights import snr
from bayesprune.prune.weights.prune import Score

CHANNEL_LEVELS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WEIGHT_LEVELS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
_BEYOND = 10.0  # what a piece past the last level costs, relative to the piece before it

Loss = Callable[[nn.Module], float]


def slopes(removed: Sequence[int], increases: Sequence[float], total: int) -> Tensor:
    """Costs of removing the next one, (total,): slopes of the lower convex hull through (0, 0) and these points.

    Args:
        removed: How many are gone at each level, rising, the last below `total`.
        increases: By how much the loss is larger then.
        total: How many there are; past the last level each costs `_BEYOND` times as much as before.
    """
    hull: list[tuple[int, float]] = []
    for point in [(0, 0.0), *zip(removed, increases, strict=True)]:
        while len(hull) > 1 and _slope(hull[-1], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    found = torch.empty(total, dtype=torch.double)
    for before, after in itertools.pairwise(hull):
        found[before[0] : after[0]] = _slope(before, after)
    found[hull[-1][0] :] = _BEYOND * max(found[hull[-1][0] - 1].item(), torch.finfo(torch.float32).tiny)
    return found


class MeasuredImportance(Criterion):
    """A torch-pruning importance: channels ranked by another one inside each group, by measured losses between groups.

    The score of a channel is the increase of the loss that its place in the group's order costs, for each MAC that it
    takes along (or each channel), so that `prune_channels(importance=...)` removes what costs least for what it saves.
    Everything is measured when it is made: number of groups times levels evaluations of the loss. The model is as
    before afterwards. Of a ResNet cut to 40 % of its MACs it was better than the scores' own scale, at half level or
    worse, see the benchmark of the criterion.

    Args:
        model: The model that will be cut.
        example_inputs: As for `prune_channels`.
        loss: Mean loss of a model on calibration data; called in evaluation mode, without gradients.
        importance: What ranks inside a group; None is `SNRImportance()`.
        levels: Fractions of a group's channels that are cut for measuring, rising.
        per: "macs", or "channels": what the increase is divided by.
        granularity: As for `prune_channels`.
        ignored_layers: As for `prune_channels`.

    Raises:
        ValueError: an option is not one of those named, or the loss is not a number, or the scores cannot be ranked.
    """

    is_of_one_model = True

    def __init__(
        self,
        model: nn.Module,
        example_inputs: object,
        loss: Loss,
        *,
        importance: Importance | None = None,
        levels: Sequence[float] = CHANNEL_LEVELS,
        per: str = "macs",
        granularity: Collection[str] = GRANULARITY,
        ignored_layers: Layers = (),
    ) -> None:
        _check_levels(levels)
        if per not in ("macs", "channels"):
            raise ValueError(f'per is {per!r}; expected "macs" or "channels".')
        observed = Observed(model, example_inputs)
        structure = groups_in(observed, granularity=granularity, ignored_layers=ignored_layers)
        saved: Sequence[float] = [1.0] * len(structure.groups)
        if per == "macs":
            saved = plan.cost_model(model, structure.groups, observed.macs).saved("macs")
        importance = importance or SNRImportance()
        self._scores: dict[str, Tensor] = {}
        self._names = {id(module): name for name, module in model.named_modules()}
        with eval_mode(model), torch.no_grad():
            base = _measured(loss, model)
            for index, group in enumerate(progress_bar(structure.groups, "Measure losses", "group")):
                scored = unit_scores(importance, group)
                if scored is None:
                    continue
                self._scores[group.name] = _unit_costs(model, *scored, loss, base, levels) / saved[index]

    def of_group(self, group: ChannelGroup) -> Tensor | None:
        """Scores (C,) of the root channels of a group, of the model or of a copy; None where it was not measured."""
        return self._scores.get(group.name)

    def scores(self, group: Group) -> Tensor | None:
        """Scores (C,) of the root channels of a group; None where it was not measured."""
        scores = self._scores.get(self._names.get(id(group[0].dep.layer), ""))
        return None if scores is None else scores[torch.as_tensor(group[0].root_idxs)]


@torch.no_grad()
def layer_shares(
    model: nn.Module,
    target: str | Target,
    loss: Loss,
    *,
    score: Score = snr,
    levels: Sequence[float] = WEIGHT_LEVELS,
) -> dict[str, float]:
    """The fraction that each layer keeps, by its weight's name, with which the measured losses add up to least.

    A target for `prune_weights`. Number of layers times levels evaluations of the loss; the model is as
    before afterwards.

    Args:
        model: A variational model.
        target: "weights=0.2", the fraction of all weights that can go which is kept.
        loss: Mean loss of a model on calibration data; called in evaluation mode, without gradients.
        score: Score of a posterior's weights, the lowest going first.
        levels: Fractions of a layer's weights that are removed for measuring, rising.

    Raises:
        ValueError: the target or a level is out of range, or the loss is not a number.
    """
    goal = Target.parse(target, ("weights",), "layer_shares")
    _check_levels(levels)
    posteriors = removable_weights(model)
    with eval_mode(model):
        base = _measured(loss, model)
        costs = [
            _weight_costs(model, posterior, score, loss, base, levels)
            for posterior in progress_bar(posteriors, "Measure losses", "layer")
        ]
    flat = torch.cat(costs)
    gone = torch.zeros(len(flat), dtype=torch.bool)
    gone[flat.argsort(stable=True)[: round(goal.removed * len(flat))]] = True
    pieces = gone.split([len(cost) for cost in costs])
    return {p.name: 1 - float(piece.float().mean()) for p, piece in zip(posteriors, pieces, strict=True)}


def _unit_costs(
    model: nn.Module, group: ChannelGroup, scores: list[float], loss: Loss, base: float, levels: Sequence[float]
) -> Tensor:
    """By root channel, what its unit's place in the order costs."""
    order = lowest_units(group, scores, len(scores))
    removed, increases = [], []
    for count in _counts(len(order), levels):
        undo = snapshot(model)
        try:
            silence(model, group, order[:count])
            increases.append(_measured(loss, model) - base)
        finally:
            undo()
        removed.append(count)
    return by_channel(order, slopes(removed, increases, len(order)).tolist())


def _weight_costs(
    model: nn.Module, posterior: Posterior, score: Score, loss: Loss, base: float, levels: Sequence[float]
) -> Tensor:
    mean = posterior.mean
    order, before = score(posterior).flatten().argsort(), mean.detach().clone()
    removed, increases = _counts(mean.numel(), levels), []
    try:
        for count in removed:
            gone = torch.zeros(mean.numel(), dtype=torch.bool, device=mean.device)
            gone[order[:count]] = True
            mean.masked_fill_(gone.view(mean.shape), 0)
            increases.append(_measured(loss, model) - base)
    finally:
        mean.copy_(before)
    return slopes(removed, increases, mean.numel())


def _counts(total: int, levels: Sequence[float]) -> list[int]:
    return sorted({count for level in levels if 0 < (count := round(level * total)) < total})


def _measured(loss: Loss, model: nn.Module) -> float:
    value = as_number(loss(model), "loss")
    if not math.isfinite(value):
        raise ValueError(f"the loss is {value}; expected a number. Check the calibration data and the model.")
    return value


def _slope(before: tuple[int, float], after: tuple[int, float]) -> float:
    return (after[1] - before[1]) / (after[0] - before[0])


def _check_levels(levels: Sequence[float]) -> None:
    if not levels or not all(0 < level < 1 for level in levels) or list(levels) != sorted(set(levels)):
        raise ValueError(f"levels are {tuple(levels)!r}; expected rising fractions between 0 and 1.")
