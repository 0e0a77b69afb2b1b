"""Smaller versions of one model that share its weights: each keeps the units, or weights, that come first.

Units of a dependency group stand in one order, by what they cost when the others have made up for them
(`prune.UnitSNRImportance`), and one division of the budget between the groups holds for all levels, so that a level is
a place in one sequence. Whatever differs beside that is small: statistics of batch norm, biases, and how far the
weights were moved to make up for what went, rounded.
"""

import copy
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.convert import to_deterministic, to_variational
from bayesprune.elastic.differences import rounded
from bayesprune.elastic.positions import fill_kept, kept_positions, number_entries
from bayesprune.foundation.batches import check_batches
from bayesprune.foundation.model import bare_model
from bayesprune.foundation.sharding import check_whole
from bayesprune.foundation.target import Target
from bayesprune.laplace import KroneckerPosterior, fit_laplace
from bayesprune.laplace.compensation import compensate
from bayesprune.layers import variational_layers
from bayesprune.prune import SNRImportance, SNRScore, prune_channels, prune_weights
from bayesprune.prune.batch_norm import recalibrate_if_better
from bayesprune.prune.channels import plan
from bayesprune.prune.channels.calibrated import Calibration, logit_posterior, searched_tilt, tilted, unit_costs
from bayesprune.prune.graph.find import groups_in
from bayesprune.prune.graph.group import GRANULARITY, ChannelGroup, by_channel
from bayesprune.prune.graph.observe import Observed
from bayesprune.prune.graph.prunable_layers import Layers, layer_names
from bayesprune.prune.scores.channels import Criterion, unit_scores
from bayesprune.prune.scores.weights import snr
from bayesprune.prune.weights.prune import Score
from bayesprune.storage.levels import KINDS, Level, gathered

_TOLERANCE = 0.005

_LOGGER = logging.getLogger(__name__)


@torch.no_grad()
def levels(
    model: nn.Module,
    example_inputs: Any,
    targets: Sequence[str],
    *,
    data: Iterable[Any] | None = None,
    fit: bool = True,
    tolerance: float | None = _TOLERANCE,
    granularity: Collection[str] = GRANULARITY,
    ignored_layers: Layers = (),
) -> list[Level]:
    """Smaller versions of a model for `save(model, directory, levels=...)`; the model is not changed.

    Nothing is trained. The levels are ordinary models, as `prune_channels` and `prune_weights` leave them, and may be
    trained on; but then all their weights are their own, and take space.

    Cost, for channels with data: one posterior and one search for the division between layers, then for each level one
    compensation (`laplace.compensate`) and some ten forwards over the data.

    Args:
        model: An ordinary model, or a variational one, whose stds rank where there are no data; then the levels are of
            `to_deterministic(model)`, which is what to save.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments; None where only
            single weights go.
        targets: What each level keeps: "macs=0.7" or "params=0.7", of channels and heads; "weights=0.1", of single
            weights.
        data: Batches, with labels or without; up to 1,024 examples rank channels, fit the weights that stay, and
            measure batch norm anew. Single weights of an ordinary model need labels: its stds are those of
            `fit_laplace`.
        fit: False leaves the weights that stay as they are, so that a level takes next to no space.
        tolerance: What is moved is rounded, so that it takes few bits in a coded file, as far as the predictions move
            by no more than so many nats, and a tenth of what the cut moves them by. None rounds nothing.
        granularity: What may go, as for `prune_channels`.
        ignored_layers: Layers, or their names, whose output channels all stay.

    Raises:
        ValueError: a target is none of these, or there is nothing to rank by.
        InfeasibleTargetError: a target cannot be reached.
        UnsupportedModelError: as `prune_channels` raises it, or what a cut leaves is no choice of whole positions.

    Examples:
        >>> import copy, tempfile, torch, bayesprune as bp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3))
        >>> x = torch.randn(64, 8)
        >>> smaller = bp.elastic.levels(model, x[:1], ["macs=0.7", "macs=0.4"], data=[x])
        >>> with tempfile.TemporaryDirectory() as out:
        ...     bp.save(model, out, levels=smaller)
        ...     small = bp.load(out, "macs=0.4", model=copy.deepcopy(model))
        >>> small[0].out_features
        16
    """
    check_whole(model, "levels")
    model = bare_model(model)
    if isinstance(targets, str):
        raise ValueError(f"levels got {targets!r}; expected several targets, such as [{targets!r}].")
    goals = [Target.parse(target, KINDS, "levels") for target in targets]
    ranking = model if any(variational_layers(model)) else to_variational(copy.deepcopy(model))
    plain = to_deterministic(copy.deepcopy(model)).eval()
    if data is not None:
        check_batches(data)
    batches = None if data is None else list(data)
    if ranking is not model and not batches:
        raise ValueError(
            f"levels got a {type(model).__name__} without posterior, and no data to rank by. Pass batches of training "
            "data, or a model from to_variational whose stds were trained."
        )
    channels = [goal for goal in goals if goal.kind != "weights"]
    weights = [goal for goal in goals if goal.kind == "weights"]
    found: dict[Target, Level] = {}
    if channels:
        options = {"granularity": granularity, "ignored_layers": layer_names(model, ignored_layers)}
        cutter = _Cutter(ranking, plain, example_inputs, batches, channels, options)
        found |= {goal: cutter.level(goal, fit=fit, tolerance=tolerance) for goal in channels}
    if weights:
        score = snr if ranking is model else SNRScore()
        if ranking is not model:
            ranking = fit_laplace(ranking, batches or [])
        found |= {goal: _with_zeros(ranking, goal, score, batches) for goal in weights}
    return [found[goal] for goal in goals]


class _Cutter:
    """Makes levels of channels out of one ranking."""

    def __init__(
        self,
        ranking: nn.Module,
        plain: nn.Module,
        example_inputs: Any,
        batches: list[Any] | None,
        goals: Sequence[Target],
        options: dict[str, Any],
    ) -> None:
        self._start, self._plain, self._inputs = copy.deepcopy(ranking).eval(), plain, example_inputs
        self._options = options
        self._calibration = None if batches is None else Calibration(self._start, batches)
        self._posterior: KroneckerPosterior = {}
        self._importance = self._ranked(goals)

    def level(self, goal: Target, *, fit: bool, tolerance: float | None) -> Level:
        """The level of a target."""
        cut, fitted, moved = copy.deepcopy(self._plain), self._start, {}
        shapes: dict[str, tuple[int, ...]] = {}
        lost: dict[str, list[int]] = {}

        def before_cut(inputs: dict[str, list[int]]) -> None:
            lost.update(inputs)
            shapes.update(number_entries(cut))

        prune_channels(cut, self._inputs, goal, importance=self._importance, before_cut=before_cut, **self._options)
        kept = kept_positions(cut, shapes)
        calibration = self._calibration
        if fit and calibration is not None:
            fitted = compensate(copy.deepcopy(self._start), calibration.batches, lost, progress=None)
            if tolerance is not None and calibration.has_predictions:
                divergence = partial(calibration.divergence, batches=calibration.parts()[1])
                fitted, moved = rounded(self._start, fitted, lost, self._posterior, divergence, tolerance)
        values = to_deterministic(copy.deepcopy(fitted)).state_dict()
        fill_kept(cut, kept, values)
        if calibration is not None:
            distance = calibration.divergence if calibration.has_predictions else None
            recalibrate_if_better(cut, calibration.batches, distance)
        moved = {name: gathered(value, kept.get(name, ())) for name, value in moved.items()}
        _LOGGER.info("level %s: %d tensors cut, %d moved by rounded differences", goal, len(kept), len(moved))
        return Level(str(goal), cut, kept, moved)

    def _ranked(self, goals: Sequence[Target]) -> "_Ranked":
        """Scores of the channels in which the division between groups is settled, for all levels alike."""
        observed = Observed(self._start, self._inputs)
        groups = groups_in(observed, **self._options).groups
        calibration = self._calibration
        if calibration is None:
            found = {group: unit_scores(SNRImportance(), group) for group in groups}
        else:
            self._posterior = logit_posterior(self._start, calibration)
            found, _ = unit_costs(self._start, groups, self._posterior, calibration)
        scored = [its for its in found.values() if its is not None]
        if calibration is None or not calibration.has_predictions:
            return _Ranked({its.group.name: by_channel(its.group.units, its.scores) for its in scored})
        costs = plan.cost_model(self._start, tuple(its.group for its in scored), observed.macs)
        middle = sorted(goals, key=lambda goal: goal.value)[len(goals) // 2]
        saved = costs.saved(middle.kind)
        choose = _choice(costs, middle)
        tilt = searched_tilt(self._start, scored, saved, choose, calibration)
        scores = tilted(scored, saved, tilt)
        pairs = zip(scored, scores, strict=True)
        return _Ranked({its.group.name: by_channel(its.group.units, each) for its, each in pairs})


@dataclass(frozen=True)
class _Ranked(Criterion):
    """An importance that knows the score of every channel, by the name of its group."""

    by_name: Mapping[str, Tensor]

    def of_group(self, group: ChannelGroup) -> Tensor | None:
        """Scores (C,) of the root channels; None where none is known."""
        return self.by_name.get(group.name)


def _choice(costs: plan.CostModel, goal: Target) -> Callable[[list[list[float]]], list[int]]:
    dense = costs.cost(goal.kind, [0] * len(costs.groups))

    def choose(scores: list[list[float]]) -> list[int]:
        order = plan.order(costs.groups, scores, uniform=False, round_to=1)
        return plan.smallest_counts(costs, order, goal.kind, goal.value * dense, gives_back=True)

    return choose


def _with_zeros(ranking: nn.Module, goal: Target, score: Score, batches: list[Any] | None) -> Level:
    """The level that keeps a fraction of the single weights."""
    smaller = copy.deepcopy(ranking).eval()
    prune_weights(smaller, goal, score=score, data=batches)
    return Level(str(goal), to_deterministic(smaller).eval())
