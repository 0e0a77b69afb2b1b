"""Removes channels from a model, physically: fewer MACs, fewer parameters, less time.

torch-pruning's graph says what must go together, a criterion says what is worth least, and the selection here meets the
target with as little removed as possible: the stock pruner skips a group whose channels all fall under its threshold,
checks caps only between steps, and does not say what it skipped.
"""

import copy
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from bayesprune.errors import InfeasibleTargetError, UnsupportedModelError
from bayesprune.foundation.macs import macs_by_module
from bayesprune.foundation.model import undone_on_error
from bayesprune.foundation.target import Target
from bayesprune.foundation.text import first_names
from bayesprune.laplace.compensation import compensate
from bayesprune.layers import close_auxiliaries, rooms_in, variational_layers, without_auxiliaries
from bayesprune.prune.batch_norm import measured_norms, recalibrate_if_better
from bayesprune.prune.channels import plan
from bayesprune.prune.channels.budget import LatencyBudget
from bayesprune.prune.channels.calibrated import Calibration, logit_posterior, searched_tilt, tilted, unit_costs
from bayesprune.prune.channels.checks import (
    SIZES,
    THRESHOLDS,
    check_model,
    checked_target,
    room_importance,
    target_kind,
)
from bayesprune.prune.channels.config import follow_config
from bayesprune.prune.channels.report import ChannelReport, heads_in, holdings, row_of
from bayesprune.prune.graph.find import groups_in
from bayesprune.prune.graph.group import GRANULARITY, ChannelGroup
from bayesprune.prune.graph.observe import Observed
from bayesprune.prune.graph.prunable_layers import Layers
from bayesprune.prune.graph.removal import (
    SHAPE_ERRORS,
    Selection,
    lost_inputs,
    remove,
    restore_point,
)
from bayesprune.prune.scores.channels import (
    GRADIENTS,
    Criterion,
    Importance,
    Scored,
    SNRImportance,
    has_gradients,
    lowest_units,
    removed_weights,
    scored_once,
    unit_scores,
    weight_scores,
)
from bayesprune.prune.scores.evidence import EvidenceImportance
from bayesprune.prune.scores.unit_snr import UnitSNRImportance

BeforeCut = Callable[[dict[str, list[int]]], object]
_LOGGER = logging.getLogger(__name__)
_BUDGETS = ("macs", "params", "latency", SIZES)  # that calibration data meets by costs of units


@without_auxiliaries
def prune_channels(
    model: nn.Module,
    example_inputs: Any,
    target: str | Target | Mapping[str, int],
    *,
    importance: Importance | None = None,
    granularity: Collection[str] = GRANULARITY,
    uniform: bool = False,
    round_to: int = 1,
    dry_run: bool = False,
    data: Iterable[Any] | None = None,
    ignored_layers: Layers = (),
    before_cut: BeforeCut | Literal["compensate"] | None = "compensate",
) -> ChannelReport:
    """Removes the channels and heads that are worth least until the target is met, in place; returns what was done.

    Output layers stay whole, and so does what cannot be cut rightly, or is frozen: layers whose weight has
    `requires_grad=False` keep their inputs, too. The report names each with the reason. Stds and masks follow their
    means, `num_heads` and its like the heads. Modes, `requires_grad` and tied weights stay as they were. Parameters are
    new objects afterwards: make the optimizer, and attach to it, after this call.

    Every group keeps at least a tenth of its channels and `round_to`. Channels that can only leave together, those of
    a head or those that a grouped convolution ties, are ranked by their mean score.

    With `data` and no importance, a target of MACs, parameters or latency is met by what its examples say: channels are
    ranked by `UnitSNRImportance` on a Kronecker-factored posterior fitted here, the budget is divided between layers by
    trial of the whole cut model against the dense one, and `laplace.compensate` moves the weights that stay. Sizes are
    met in the same way, without a division. That takes seconds for a small network, minutes for a large one, trains
    nothing and reads no labels. Without `data` channels are ranked by `SNRImportance` over all layers, and nothing
    makes up for them.

    Args:
        model: With variational layers, or any model when `importance` is given. On any device, not wrapped.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        target: "macs=0.5" or "params=0.5", the fraction of the model as it is now that is kept; "latency=0.7": a
            forward on the example inputs takes 0.7 of its time, here and with as many threads as torch uses now, to
            0.04 below and 0.01 above of that, as measured on up to six cut models; "snr=1": remove the
            channels whose root mean square SNR, over all weights that leave with them, is below 1; "evidence=0":
            remove those without which the log evidence is larger by more than 0 nats; "inclusion=0.5": those whose
            gates are open with a probability below 0.5. Gates end with the cut; what is behind closed ones and stays,
            by a floor or another target, gets zero weights, and `data` fits the others to what the gated model gives.
            A mapping says how many channels each group keeps, by its root layer, without a floor; groups that it leaves
            out stay whole. It may be the `sizes` of the report of another model with the same layers.
        importance: A torch-pruning importance; None is the default above. A target of "snr" takes none, "evidence" an
            `EvidenceImportance`, "inclusion" an `InclusionImportance`.
        granularity: What may go: "heads" of attention (where queries share keys and values, with all that share them),
            "mlp", the channels inside residual blocks, and "width", the channels that blocks read from and add to, and
            those of nets without blocks.
        uniform: Remove the same fraction of every group, ranking inside groups alone. The config of a model of
            transformers then follows, where it can say the new sizes.
        round_to: Kept channels are a multiple of this, where the size of the layer allows.
        dry_run: Only report; the model is as before afterwards.
        data: Batches, with labels or without, of which up to 1,024 examples are kept in memory. They rank, compensate
            and recalibrate batch norm where that brings the outputs closer to the dense model's.
        ignored_layers: Layers, or their names, with everything inside them, whose output channels all stay.
        before_cut: Called once the selection stands, right before the cut, with the input channels that each layer
            loses; it may move weights in place, as `condition_on_channels` does. A dry run does not call it.
            "compensate" is `laplace.compensate` where there is `data`; None moves nothing.

    Raises:
        InfeasibleTargetError: the target cannot be reached; nothing was changed.
        UnsupportedModelError: the model is wrapped, cannot be traced, or has no variational layer and no importance.
        ValueError: an option is not one of those named, all layers are frozen, or the importance gives scores that
            cannot be ranked, or none for want of gradients.
    """
    goal = checked_target(target, importance, granularity, uniform, round_to)
    what, value = goal.kind, goal.value
    sizes = target if isinstance(target, Mapping) else None
    check_model(model, importance, what)
    dense = model if data is None or not rooms_in(model) else close_auxiliaries(copy.deepcopy(model))
    calibration = None if data is None else Calibration(dense, data)
    is_calibrated = calibration is not None and calibration.has_predictions and importance is None and what in _BUDGETS
    compensates = before_cut == "compensate" and calibration is not None and any(variational_layers(model))
    if before_cut == "compensate":
        before_cut = (
            partial(compensate, model, calibration.batches, progress=None) if calibration and compensates else None
        )
    before_cut = _folding(model, before_cut)
    observed = Observed(model, example_inputs)
    structure = groups_in(observed, granularity=granularity, ignored_layers=ignored_layers)
    macs = observed.macs
    left_whole = dict(structure.left_whole)
    if importance is None:
        ranks = EvidenceImportance() if what == "evidence" else room_importance(model, what) or SNRImportance()
    else:
        ranks = importance
    score = _rms_snr if what == "snr" else partial(unit_scores, ranks)
    unread: list[str] = []
    if calibration is not None and is_calibrated:
        found, unread = unit_costs(dense, structure.groups, logit_posterior(dense, calibration), calibration)
    else:
        with scored_once():
            found = {group: score(group) for group in structure.groups}
    ranked = {scored.group: scored for scored in found.values() if scored is not None}
    unscored = _no_score(model, importance, what)
    left_whole |= {layer: unscored for group, scored in found.items() if scored is None for layer in group.layers}
    params = _num_parameters(model)
    latency = LatencyBudget(model, example_inputs, value) if what == "latency" else None
    tilt: float | None = None
    while True:
        groups = tuple(ranked)
        costs = plan.cost_model(model, groups, macs, latency.seconds if latency else None)
        choose = partial(
            _choose, model, costs, what, latency.fraction if latency else value, uniform, round_to, left_whole, sizes
        )
        scored = list(ranked.values())
        scores = [its.scores for its in scored]
        if calibration is not None and is_calibrated and not uniform and sizes is None:
            saved = costs.saved(what)
            tilt = searched_tilt(dense, scored, saved, choose, calibration) if tilt is None else tilt
            scores = tilted(scored, saved, tilt)
        counts = (latency.decided if latency else None) or choose(scores)
        selection = [(its.group, lowest_units(*its, count)) for its, count in zip(scored, counts, strict=True)]
        failures, undo, macs_after = _attempt(model, selection, example_inputs)
        if not failures and (latency is None or _is_fast(latency, model, counts, undo)):
            break
        if failures:
            left_whole |= {layer: failures[group] for group in failures for layer in group.layers}
            ranked, tilt = {group: scored for group, scored in ranked.items() if group not in failures}, None
            latency = None if latency is None else LatencyBudget(model, example_inputs, value)
    _compare(macs_after, costs.cost("macs", counts))
    if before_cut is not None and not dry_run:
        undo()
        undo = _cut_after(before_cut, model, selection)
    report = ChannelReport(
        rows=tuple(row_of(group, len(units)) for group, units in selection),
        macs_before=sum(macs.values()),
        macs_after=macs_after,
        params_before=params,
        params_after=_num_parameters(model),
        target=str(goal) if sizes is None else f"the sizes of {len(sizes)} groups",
        left_whole=left_whole,
        removed={g.name: tuple(sorted(c for unit in u for c in unit)) for g, u in selection if u and not g.is_heads},
        removed_heads={name: heads_in(g, units) for g, units in selection if units for name in g.attention},
        latency=latency.achieved if latency else None,
        dry_run=dry_run,
        holdings=holdings(model, costs.parts("macs", counts), sum(macs.values()), costs.layers, left_whole),
        how=_how(
            importance,
            calibration,
            _divided(tilt, uniform=uniform, is_given=sizes is not None),
            unread,
            is_calibrated=is_calibrated,
            compensates=compensates,
        ),
    )
    if dry_run:
        undo()
        return report
    if calibration is not None:
        with undone_on_error(undo):
            is_measured_anew = recalibrate_if_better(model, calibration.batches, calibration.divergence)
        report = replace(report, keeps_statistics=bool(measured_norms(model)) and not is_measured_anew)
    for room in rooms_in(model):
        room.drop(model)
    if uniform:
        report = replace(report, config=follow_config(model, [(g, len(units)) for g, units in selection]))
    return report


def _is_fast(latency: LatencyBudget, model: nn.Module, counts: list[int], undo: Callable[[], None]) -> bool:
    """Whether the cut model is the one to keep; otherwise the cut is undone."""
    with undone_on_error(undo):
        is_fast = latency.accepts(model, counts)
    if not is_fast:
        undo()
    return is_fast


def _how(
    importance: Importance | None,
    calibration: Calibration | None,
    divided: str,
    unread: Collection[str],
    *,
    is_calibrated: bool,
    compensates: bool,
) -> str:
    """One line on what decided and what made up for it."""
    default = UnitSNRImportance if is_calibrated else SNRImportance
    name = default.__name__ if importance is None else type(importance).__name__
    if unread:
        name += f" ({first_names(unread)} by ScaleSNRImportance, since no layer of the posterior reads them)"
    parts = [f"channels ranked by {name}", divided]
    if compensates and calibration is not None:
        parts.append(f"weights fitted to the dense model on {calibration.num_examples:,} examples")
    elif calibration is None:
        parts.append("nothing compensated, since there is no data")
    return "; ".join(parts)


def _divided(tilt: float | None, *, uniform: bool, is_given: bool) -> str:
    """How many leave each group, in words."""
    if uniform:
        return "the same share from every group"
    if is_given:
        return "as many kept of every group as were given"
    if tilt is not None:
        return f"the budget divided by trial of the whole cut model (costs times exp({tilt:g} depth))"
    return "the budget divided by the scores themselves"


def _compare(counted: int, planned: int) -> None:
    """Says where a forward after the cut costs something else than planned."""
    if counted > 1.01 * planned:
        _LOGGER.warning(
            "the forward after the cut runs %d MACs, and %d were planned: it does more than before, as detectors do, "
            "whose number of boxes depends on the weights. The MACs of the report are those of that forward.",
            counted,
            planned,
        )
    elif counted != planned:
        _LOGGER.info("counted %d MACs after the cut, planned %d", counted, planned)


def _folding(model: nn.Module, before_cut: BeforeCut | None) -> BeforeCut | None:
    """What to call right before a cut, so that what auxiliary modules decide on the kept channels stays in force."""
    rooms = rooms_in(model)
    if not rooms:
        return before_cut

    def fold(lost: dict[str, list[int]]) -> None:
        for room in rooms:
            room.fold(model, lost)
        if before_cut is not None:
            before_cut(lost)

    return fold


def _no_score(model: nn.Module, importance: Importance | None, what: str) -> str:
    """Why a group that could be cut has no score."""
    if importance is None or isinstance(importance, SNRImportance) or target_kind(importance):
        return f"nothing in its group has a score (no {'gate' if what == 'inclusion' else 'variational layer'})"
    needs_gradients = not isinstance(importance, Criterion) and not has_gradients(model.modules())
    hint = f"; the weights have no gradients. {GRADIENTS}" if needs_gradients else ""
    return f"{type(importance).__name__} gives its group no score{hint}"


@torch.no_grad()
def _rms_snr(group: ChannelGroup) -> Scored | None:
    removed = removed_weights(group.group, partial(weight_scores, power=2))
    if removed is None:
        return None
    score, count = (values.double().cpu() for values in removed)
    group = group.by_rank(score / count.clamp(min=1))
    return Scored(
        group, [float((score[list(u)].sum() / count[list(u)].sum().clamp(min=1)).sqrt()) for u in group.units]
    )


def _choose(
    model: nn.Module,
    costs: plan.CostModel,
    what: str,
    value: float,
    uniform: bool,
    round_to: int,
    left_whole: dict[str, str],
    sizes: Mapping[str, int] | None,
    scores: list[list[float]],
) -> list[int]:
    """Units that leave each group; none is an answer where the target is a threshold."""
    if sizes is not None:
        return plan.counts_for(costs.groups, sizes, left_whole)
    if what in THRESHOLDS:
        return plan.count_below(costs.groups, scores, -value if what == "evidence" else value, round_to)
    order = plan.order(costs.groups, scores, uniform=uniform, round_to=round_to)
    dense = costs.cost(what, [0] * len(scores))
    counts = plan.smallest_counts(costs, order, what, value * dense, gives_back=not uniform)
    if (reached := costs.cost(what, counts)) <= value * dense or what == "latency":  # which is measured afterwards
        return counts
    held = holdings(model, costs.parts(what, counts), dense, costs.layers, left_whole)
    rounded = f", and a multiple of round_to={round_to}" if round_to > 1 else ""
    raise InfeasibleTargetError(
        f"the target {what}={value:g} cannot be reached: at least {reached / dense:.4f} of the {what} stay. Each of "
        f"the {len(scores)} groups of channels keeps a tenth{rounded}. What stays is in "
        f"{'; '.join(map(str, held[:4]))}. Ask for a larger fraction. Nothing was changed."
    )


def _attempt(
    model: nn.Module, selection: Selection, example_inputs: Any
) -> tuple[dict[ChannelGroup, str], Callable[[], None], int]:
    """Cuts the model and counts its MACs; where that fails, leaves it as it was and says which groups are at fault."""
    try:
        return {}, *_cut_and_count(model, selection, example_inputs)
    except SHAPE_ERRORS as error:
        failures = {}
        for group, units in selection:
            try:
                undo, _ = _cut_and_count(model, [(group, units)], example_inputs)
                undo()
            except SHAPE_ERRORS as fault:
                failures[group] = (
                    f"the model does not run without some of its channels ({_first_line(fault)}): a size in its "
                    "forward or attributes does not follow; take it from the tensor's shape"
                )
        if failures:
            return failures, lambda: None, 0
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run after the cut ({_first_line(error)}), though it does after the cut "
            "of any one group; nothing was changed. In Python, name layers that "
            "should stay whole in ignored_layers, or remove single weights."
        ) from error


def _cut_and_count(model: nn.Module, selection: Selection, example_inputs: Any) -> tuple[Callable[[], None], int]:
    undo = remove(model, selection)
    with undone_on_error(undo):
        return undo, sum(macs_by_module(model, example_inputs).values())


def _cut_after(before_cut: BeforeCut, model: nn.Module, selection: Selection) -> Callable[[], None]:
    """Cuts once `before_cut` has moved the weights; what it returns undoes both."""
    undo = restore_point(model)
    with undone_on_error(undo):
        before_cut(lost_inputs(selection))
        remove(model, selection)
    return undo


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _num_parameters(model: nn.Module) -> int:
    return sum({id(p): p.numel() for _, p in plan.stock_parameters(model)}.values())
