"""Removes single weights: unstructured to a sparsity or an SNR threshold, or in N:M patterns.

Removed weights are zeros and stay zeros through further training. Zeros make a compressed file smaller; they do not
make the model faster on ordinary hardware (removed channels do, see `prune_channels`).
"""

import logging
import reprlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from bayesprune.convert import FROZEN, reasons_to_leave
from bayesprune.estimators import as_gaussian
from bayesprune.foundation.device import numbers_of
from bayesprune.foundation.kinds import EMBEDDING, kind_of
from bayesprune.foundation.model import eval_mode, undone_on_error
from bayesprune.foundation.sharding import check_module, full_tensor, whole_mask
from bayesprune.foundation.target import PATTERN, Target
from bayesprune.foundation.text import as_text, first_names
from bayesprune.layers import Posterior, holders_of, named_auxiliaries, named_posteriors, removable_weights
from bayesprune.prune.batch_norm import recalibrate_batch_norm
from bayesprune.prune.graph.removal import restore_point
from bayesprune.prune.scores.weights import snr
from bayesprune.prune.weights.floors import check_min_kept, floor_of, keep_best, within_caps
from bayesprune.train.attach import is_attached
from bayesprune.train.averages import warn_of_averages

_LOGGER = logging.getLogger(__name__)

Score = Callable[[Posterior], Tensor]


@dataclass(frozen=True)
class WeightRow:
    """One weight tensor: its name, how many weights it has and keeps, and whether it was passed over or held back.

    A weight behind a closed gate is kept, for the gate may open; the note says how many there are.
    """

    name: str
    total: int
    kept: int
    note: str = ""


@dataclass(frozen=True)
class WeightReport:
    """The report of `prune_weights`; prints as a table.

    Attributes:
        rows: The weights that could go, of which a sparsity is a fraction: those of variational layers that train.
        untouched: All other weights of the model, and why they stay: parameters of two dimensions or more, the stds
            apart. Embeddings and recurrent layers are such, and what is frozen.
    """

    rows: tuple[WeightRow, ...]
    untouched: tuple[WeightRow, ...] = ()

    @property
    def removable(self) -> "WeightReport":
        """The same of the weights that could go alone; its `sparsity` is the one that is asked for."""
        return WeightReport(self.rows)

    @property
    def total(self) -> int:
        """Number of weights, biases apart."""
        return sum(row.total for row in (*self.rows, *self.untouched))

    @property
    def kept(self) -> int:
        """Number of weights that are kept."""
        return sum(row.kept for row in (*self.rows, *self.untouched))

    @property
    def sparsity(self) -> float:
        """The fraction of them that is removed, by this call and those before."""
        return 1 - self.kept / self.total

    def summary(self) -> str:
        """One line: how many weights are kept, of all and of those that could go."""
        of_all = f"{self.kept:,} of {self.total:,} weights kept (sparsity {self.sparsity:.2%})"
        if not self.untouched:
            return of_all
        return f"{of_all}; of the {self.removable.total:,} that could go {self.removable.sparsity:.2%} are removed"

    def __str__(self) -> str:
        """The table as plain text."""
        table = Table("weight", "total", "kept", "sparsity", "note")
        for row in self.rows:
            table.add_row(row.name, f"{row.total:,}", f"{row.kept:,}", f"{1 - row.kept / row.total:.1%}", row.note)
        alike: dict[str, list[WeightRow]] = defaultdict(list)
        for row in self.untouched:
            alike[row.note].append(row)
        notes = [
            f"untouched: {first_names(row.name for row in rows)} ({sum(row.total for row in rows):,} weights): {reason}"
            for reason, rows in alike.items()
        ]
        return as_text(self.summary(), table, *notes)


@torch.no_grad()
def prune_weights(
    model: nn.Module,
    target: str | Target | Mapping[str, float],
    *,
    scope: str = "global",
    score: Score = snr,
    min_kept: float = 1,
    data: Iterable[Any] | None = None,
) -> WeightReport:
    """Removes single weights of the variational layers, biases apart, until the target is met; in place.

    Frozen weights (`requires_grad=False`) stay, whatever the score; call `requires_grad_(True)` on what may go.
    What was removed before stays removed and counts. Removed weights are zeros, draw no noise, do not count in the KL,
    and stay zeros through further training with any torch optimizer: an attachment sets them to zero again after the
    steps of its optimizer, and for layers that none trains a hook does so after the steps of every optimizer in the
    process. Where something moves weights outside a step, they are zeros in evaluation and wherever the model's state
    is written. With FSDP 2 every process calls it, has all scores for a moment, and keeps the masks whole.

    Args:
        model: A variational model.
        target: "weights=0.2", the fraction that is kept of all weights that can go; "snr=1": keep the weights whose
            SNR is at least 1, which are more signal than noise; "2:4": keep the best 2 of every 4 consecutive inputs
            of each output, where layers whose number of inputs is not a multiple of 4 are left, and said so. Or
            fractions to keep by name of layer or parameter, ranked inside each, where what has no name loses nothing;
            the report says what share of all weights it was.
        scope: Whether a fraction ranks all weights together ("global") or each layer's apart ("layer").
        score: Score of a posterior's weights, the lowest going first: `scores.snr`, or `scores.magnitude` as a control.
        min_kept: What every weight tensor keeps: below 1 a fraction of its weights, from 1 on a number of them. Where
            a fraction is kept the other tensors lose the more; the report says where it was needed. A pattern has no
            need.
        data: Batches, with labels or without, for recalibrating batch norm, forward passes only. An error there leaves
            the model as it was, of which a copy is kept meanwhile.

    Raises:
        TypeError: `score` returned no tensor of floats of a weight's shape.
        InfeasibleTargetError: `min_kept` leaves fewer weights to remove than the target says; nothing was changed.
        ValueError: the target is none of these or out of range, the scores are NaN, there is no batch, or the model has
            no variational layers, or none that trains.
    """
    check_module(model, "prune_weights")
    posteriors = removable_weights(model)
    goal = checked_goal(target, ("weights", "snr", PATTERN), "prune_weights")
    if scope not in ("global", "layer"):
        raise ValueError(f'scope is {scope!r}; expected "global" or "layer".')
    check_min_kept(min_kept)
    floors = [min(floor_of(p.mean.numel(), min_kept), kept) for p, kept in _num_kept(posteriors).items()]
    if not isinstance(goal, Target) or (goal.kind == "weights" and scope == "layer"):
        keeps, is_floored = _keep_shares(posteriors, removed_fractions(posteriors, goal), score, floors)
    elif goal.kind == "snr":
        keeps, is_floored = _keep_above(posteriors, goal.value, floors)
    elif goal.pattern:
        fitting = [p for p in posteriors if not whole_note(p, goal.pattern)]
        best = {p: _best_inputs(p, goal.pattern, scores) for p, scores in _scores(fitting, score).items()}
        keeps, is_floored = [best.get(posterior) for posterior in posteriors], [False] * len(posteriors)
    else:
        scores = list(_scores(posteriors, score).values())
        keeps, is_floored = keep_best(scores, round(goal.removed * sum(s.numel() for s in scores)), floors)
    notes = [f"held at min_kept={min_kept:g}" if floored else "" for floored in is_floored]
    if isinstance(goal, Target) and goal.pattern:
        notes = [whole_note(posterior, goal.pattern) for posterior in posteriors]
    with nullcontext() if data is None else undone_on_error(restore_point(model)):
        report = set_masks(model, posteriors, keeps, notes)
        if data is not None:
            recalibrate_batch_norm(model, data)
    _LOGGER.info("prune_weights: %s", report.summary())
    return report


def set_masks(
    model: nn.Module, posteriors: Sequence[Posterior], keeps: Sequence[Tensor | None], notes: Sequence[str]
) -> WeightReport:
    """Removes what is not kept of each posterior, in place, in all layers that hold it; None leaves one as it is."""
    rows, holders = [], holders_of(model)
    if is_attached(model) and not any(bool(_removed(posterior).any()) for posterior in posteriors):
        warn_of_averages(model)
    for posterior, keep in zip(posteriors, keeps, strict=True):
        if keep is not None:
            keep = ~_removed(posterior) & keep  # lies in memory as the mean does
            for layer, name in holders[id(posterior.mean)]:
                layer.set_mask(name, keep)
    for (posterior, kept), note in zip(_num_kept(posteriors).items(), notes, strict=True):
        said = "; ".join(filter(None, (note, _note_on_gates(posterior))))
        rows.append(WeightRow(posterior.name, posterior.mean.numel(), kept, said))
    return WeightReport(tuple(rows), _untouched(model, posteriors))


def _note_on_gates(posterior: Posterior) -> str:
    """How many of the weights that are kept evaluation reads as zeros, for their gates are closed; else empty."""
    layer = posterior.layer
    if layer.posterior_hook is None:
        return ""
    with eval_mode(layer):
        seen = full_tensor(as_gaussian(layer.posterior(posterior.parameter)).mean)
    closed = (seen == 0) & (full_tensor(posterior.mean) != 0) & ~_removed(posterior)
    num_closed = int(closed.sum())
    return f"{num_closed:,} of the kept are behind closed gates: gates.close removes them" if num_closed else ""


def _untouched(model: nn.Module, removable: Sequence[Posterior]) -> tuple[WeightRow, ...]:
    """The weights that could not go, with the reason."""
    posteriors = {id(posterior.mean): posterior for posterior in named_posteriors(model)}
    others = {id(posterior.mean) for posterior in removable}
    others |= {id(part) for posterior in posteriors.values() for part in posterior.log_std_parts}
    others |= {id(parameter) for _, module in named_auxiliaries(model) for parameter in module.parameters()}
    reasons = reasons_to_leave(model, None)
    kept, rows = _num_kept(posteriors.values()), []
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in others:
            layer, frozen = model.get_submodule(name.rpartition(".")[0]), posteriors.get(id(parameter))
            reason = reasons.get(layer, "it has no posterior") if parameter.requires_grad else FROZEN
            total = parameter.numel()
            rows.append(WeightRow(name, total, total if frozen is None else kept[frozen], reason))
    return tuple(rows)


def checked_goal(
    target: str | Target | Mapping[str, float], kinds: Collection[str], caller: str
) -> Target | Mapping[str, float]:
    """A target of these kinds, or fractions by name.

    Raises:
        ValueError: it is neither, or a number is out of range.
    """
    if not isinstance(target, Mapping):
        return Target.parse(target, kinds, caller)
    for name, kept in target.items():
        if isinstance(kept, str) or not hasattr(kept, "__float__") or not 0 <= kept <= 1:
            raise ValueError(f"{caller} is to keep {kept!r} of {name!r}; expected a fraction from 0 to 1, such as 0.2.")
    return target


def removed_fractions(posteriors: list[Posterior], goal: Target | Mapping[str, float]) -> list[float]:
    """The fraction to remove of each tensor: by its own name, by its layer's, or none."""
    if isinstance(goal, Target):
        return [0.0 if goal.pattern else goal.removed] * len(posteriors)
    layers = {posterior: posterior.name.rpartition(".")[0] for posterior in posteriors}
    names = {posterior.name for posterior in posteriors}
    if unknown := sorted(set(goal) - names - set(layers.values())):
        raise ValueError(
            f"the target names {first_names(map(repr, unknown), most=5)}, of which the model has no weights to "
            "remove, or frozen ones (requires_grad=False); "
            f"expected layers or parameters among {first_names(sorted(names), most=8)}."
        )
    return [1 - float(goal.get(posterior.name, goal.get(layer, 1.0))) for posterior, layer in layers.items()]


def _keep_shares(
    posteriors: list[Posterior], fractions: list[float], score: Score, floors: list[int]
) -> tuple[list[Tensor], list[bool]]:
    """The best of each tensor, as many as its fraction and the floors say."""
    sizes = [posterior.mean.numel() for posterior in posteriors]
    counts = [round(fraction * size) for fraction, size in zip(fractions, sizes, strict=True)]
    caps = [size - floor for size, floor in zip(sizes, floors, strict=True)]
    capped = within_caps(counts, caps)
    scores = _scores(posteriors, score).values()
    keeps = [keep_best([own], count, [0])[0][0] for own, count in zip(scores, capped, strict=True)]
    return keeps, [count > cap for count, cap in zip(counts, caps, strict=True)]


def keep_count(posterior: Posterior, count: int, score: Score) -> Tensor:
    """The mask of a tensor without its lowest `count` entries."""
    return keep_best([_scores([posterior], score)[posterior]], count, [0])[0][0]


def _keep_above(posteriors: list[Posterior], threshold: float, floors: list[int]) -> tuple[list[Tensor], list[bool]]:
    """What has this SNR, and the best of each tensor up to its floor."""
    all_scores = _scores(posteriors, snr).values()
    keeps = [scores >= threshold for scores in all_scores]
    is_floored = [kept < floor for kept, floor in zip(numbers_of([k.sum() for k in keeps]), floors, strict=True)]
    for index, scores in enumerate(all_scores):
        if is_floored[index]:
            keeps[index] = keep_best([scores], scores.numel() - floors[index], [0])[0][0]
    return keeps, is_floored


def keep_pattern(posterior: Posterior, pattern: tuple[int, int], score: Score) -> Tensor | None:
    """The best N of every M consecutive inputs; None where the number of inputs is not a multiple of M."""
    return (
        None
        if whole_note(posterior, pattern)
        else _best_inputs(posterior, pattern, _scores([posterior], score)[posterior])
    )


def _best_inputs(posterior: Posterior, pattern: tuple[int, int], scores: Tensor) -> Tensor:
    (n, m), (dim, _) = pattern, _inputs(posterior)
    scores = scores.movedim(dim, -1)
    groups = scores.reshape(-1, m)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    keep.scatter_(1, groups.topk(n, dim=1).indices, True)
    return keep.view(scores.shape).movedim(-1, dim).contiguous()


def whole_note(posterior: Posterior, pattern: tuple[int, int]) -> str:
    """The reason why a pattern leaves a tensor as it is; empty where it does not."""
    if kind_of(posterior.layer) == EMBEDDING:
        return "a lookup table multiplies nothing"
    num_inputs, multiple = _inputs(posterior)[1], pattern[1]
    return f"{num_inputs} inputs are not a multiple of {multiple}" if num_inputs % multiple else ""


def _inputs(posterior: Posterior) -> tuple[int, int]:
    """The dimension of the weight that numbers inputs, and how many of them each output has."""
    kind = kind_of(posterior.layer)
    return kind.input_dim, posterior.mean.shape[kind.input_dim] // (kind.num_groups if kind.input_dim == 0 else 1)


def _scores(posteriors: Iterable[Posterior], score: Score) -> dict[Posterior, Tensor]:
    """Scores of each, -inf for what is gone; whether they are numbers is asked for all at once."""
    found = {posterior: full_tensor(_checked_score(score(posterior), posterior)) for posterior in posteriors}
    for (posterior, scores), bad in zip(
        found.items(), numbers_of([s.isnan().sum() for s in found.values()]), strict=True
    ):
        if bad:
            raise ValueError(
                f"the scores of {posterior.name} have {bad} of {scores.numel()} values that are NaN; expected numbers. "
                "Check whether training diverged."
            )
        limits = torch.finfo(scores.dtype)
        found[posterior] = scores.clamp(limits.min, limits.max).masked_fill(_removed(posterior), -torch.inf)
    return found


def _checked_score(scores: Any, posterior: Posterior) -> Tensor:
    if not isinstance(scores, Tensor) or scores.shape != posterior.mean.shape or not scores.is_floating_point():
        what = f"{scores.dtype} of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else reprlib.repr(scores)
        raise TypeError(
            f"score returned {what} for {posterior.name}; expected a tensor of floats of the weight's shape, "
            f"{tuple(posterior.mean.shape)}."
        )
    return scores


def _num_kept(posteriors: Iterable[Posterior]) -> dict[Posterior, int]:
    """How many weights each has that were not removed."""
    found = {posterior: posterior.mean.numel() for posterior in posteriors}
    masks = {posterior: posterior.layer.mask(posterior.parameter, whole=True) for posterior in found}
    masked = {posterior: mask for posterior, mask in masks.items() if mask is not None}
    counts = numbers_of([mask.sum() for mask in masked.values()])
    return found | dict(zip(masked, counts, strict=True))


def _removed(posterior: Posterior) -> Tensor:
    mask, mean = posterior.layer.mask(posterior.parameter, whole=True), posterior.mean
    return whole_mask(mean, False) if mask is None else ~mask
