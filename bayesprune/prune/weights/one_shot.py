"""Removes single weights without training: what each layer gave before, fitted anew by the weights that it keeps.

Layers are cut in the order of the forward, as `laplace.compensate` fits them: to what the dense model computes, the
stream that the output is added to included, from what the layers before, cut already, give. The weights that stay are
found by alternating directions (`laplace.regression`), and are the conditional mean given the zeros. Published methods
fit each layer to its own outputs for the inputs that it has now (SparseGPT: Frantar & Alistarh, 2023,
arXiv:2301.00774), which passes on what went wrong before.

With the weights that stay fitted anew, the cost of a layer rises almost exponentially with its sparsity, for all layers
at much the same rate. So two levels around the mean tell the curve, and the division with the smallest sum of costs is
where one more weight costs the same in every layer.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.foundation.batches import device_of, logits_of, on_device, split, with_examples
from bayesprune.foundation.kinds import kind_of
from bayesprune.foundation.model import eval_mode, restore_values, restored_on_error, undone_on_error
from bayesprune.foundation.numbers import as_number
from bayesprune.foundation.progress import progress_bar
from bayesprune.foundation.sharding import check_whole
from bayesprune.foundation.target import PATTERN, Target
from bayesprune.laplace.calibration import as_predictions, total_divergence, unmasked
from bayesprune.laplace.compensation import Choose, refit
from bayesprune.laplace.kronecker import variational_layer
from bayesprune.laplace.matrices import is_matrix_product, to_matrix
from bayesprune.laplace.regression import Moments, best_support
from bayesprune.laplace.sequence import dense_moments, fit_in_sequence
from bayesprune.laplace.sites import MAX_COLUMNS, Site, fittable_experts, fittable_layers, sites_of
from bayesprune.layers import Posterior, holders_of, removable_weights
from bayesprune.prune.batch_norm import measured_norms, recalibrate_if_better
from bayesprune.prune.graph.removal import snapshot
from bayesprune.prune.weights.prune import (
    WeightReport,
    checked_goal,
    keep_count,
    keep_pattern,
    removed_fractions,
    set_masks,
    whole_note,
)

Loss = Callable[[nn.Module], float]

_DID_NOT_RUN = "did not run on the data"
_MISFIT = "what it reads depends on the weights: prune_weights takes it"
_ROWS_PER_COLUMN = 128  # positions in all at which a layer is looked at, for each of its columns
_JUDGES = 256  # examples by which the division between layers is judged
_LOGGER = logging.getLogger(__name__)


@torch.no_grad()
def prune_one_shot(
    model: nn.Module,
    data: Iterable[Any],
    target: str | Target | Mapping[str, float],
    *,
    scope: str = "global",
    loss: Loss | None = None,
    damping: float = 0.01,
    num_batches: int | None = None,
) -> WeightReport:
    """Removes single weights of linear layers, convolutions and experts and moves the others to make up, in place.

    From calibration data alone, without labels or training. Biases move too, those of experts apart; stds stay as they
    are. Each stacked expert is fitted to the tokens that the model's router sends to it. What was removed before stays
    removed and counts, so that it can be called again, in training as well. Batch norm is measured anew at the end
    where that brings the outputs closer to what they were.

    Cost: some three forwards over the data, see `laplace.compensate`, and for a layer of R outputs and C inputs (times
    taps) some 20 R C^2 + 3 C^3 multiplications and what `conditional_mean` takes. With a fraction and the scope
    "global" these products three times, and two forwards more of up to 256 examples for each layer. Memory: a copy of
    the model, 4 GiB of activations at most, and for the largest layer 50 C^2 + 30 R C bytes. A matrix of E experts
    costs as much as E layers, and a gradient of the experts for each R of its positions.

    Args:
        model: A variational model; it need not be trained as one.
        data: Batches, with labels or without; a few hundred examples. Positions that an `attention_mask` excludes do
            not count. More positions than a layer has inputs, or the damping decides in some directions. No more than
            128 for each input are looked at; of experts, 16 for each input and each expert.
        target: "weights=0.5", the fraction of the weights of those layers that is kept, or "2:4", as for
            `prune_weights`; or fractions to keep by name of layer or parameter, where what has no name is left as it
            is.
        scope: How a fraction is divided: "global", by what each layer costs when it is cut alone, or "layer", the
            same fraction of each.
        loss: What a cut costs, a function of the model that is called in evaluation mode; None is the divergence of its
            predictions from those before the cut, of a single output half the squared error.
        damping: Holds weights at their present values, as a fraction of the mean second moment of a layer's inputs.
        num_batches: No more batches than these.

    Raises:
        ValueError: the target is none of these or out of range, there is no batch, or the model has no variational
            layers, or none that trains.
        torch.linalg.LinAlgError: at damping=0, where the inputs of a layer without a bias or a batch norm are linearly
            dependent. Nothing was changed.
        UnsupportedModelError: the model is sharded over processes.

    Examples:
        >>> import torch, bayesprune as bp
        >>> model = bp.to_variational(torch.nn.Linear(8, 3))
        >>> report = bp.prune_one_shot(model, [torch.randn(32, 8)], "2:4")
        >>> print(report.summary())
        12 of 24 weights kept (sparsity 50.00%)
    """
    check_whole(model, "prune_one_shot")
    goal = checked_goal(target, ("weights", PATTERN), "prune_one_shot")
    pattern = goal.pattern if isinstance(goal, Target) else None
    posteriors = removable_weights(model)
    rules = {
        posterior.name: _Rule(posterior, pattern, share)
        for posterior, share in zip(posteriors, removed_fractions(posteriors, goal), strict=True)
    }
    notes = _notes(model, rules)
    batches = list(with_examples(model, data, num_batches))
    if not batches:
        raise ValueError("data has no batch; expected an iterable of input batches.")
    if scope not in ("global", "layer"):
        raise ValueError(f'scope is {scope!r}; expected "global" or "layer".')
    cut = {name: rules[name] for name, note in notes.items() if not note}
    reference, keeps = copy.deepcopy(model), dict[str, Tensor]()
    layers = {(name := weight.rpartition(".")[0]): variational_layer(reference, name) for weight in cut}
    sites = sites_of(reference, batches, layers, rows_per_column=_ROWS_PER_COLUMN, all_matrices=True)
    sites = [site for site in sites if site.weight in cut]
    with restored_on_error(model, reference), undone_on_error(snapshot(model)):
        if sites and isinstance(goal, Target) and not pattern and scope == "global" and 0 < goal.value < 1:
            cut = _divided(model, reference, cut, sites, batches, goal.removed, loss, damping)

        def fit(site: Site, moments: tuple[Moments, Moments]) -> Tensor | None:
            choose = _choice(cut[site.weight], keeps)
            shift = refit(model, reference, site, moments, choose=choose, damping=damping)
            kept = keeps[site.weight]
            _LOGGER.info("prune_one_shot: %s keeps %d of %d", site.weight, kept.sum(), kept.numel())
            return shift

        fit_in_sequence(model, reference, batches, sites, fit, progress=None, title="Prune in one shot")
        ran = {site.weight for site in sites}
        notes |= {name: notes[name] or (_MISFIT if name in ran else _DID_NOT_RUN) for name in rules.keys() - keeps}
        report = set_masks(model, posteriors, [keeps.get(its.name) for its in posteriors], list(notes.values()))
        _measure_norms(model, reference, batches)
    _LOGGER.info("prune_one_shot: %s", report.summary())
    return report


@dataclass(frozen=True)
class _Rule:
    """What may stay of a weight: a pattern, or all but a share."""

    posterior: Posterior
    pattern: tuple[int, int] | None
    share: float

    def keep(self, scores: Tensor, way: float = 1.0) -> Tensor:
        """The best by scores of the weight's shape, once this much of the removal is done."""

        def score(_: Posterior) -> Tensor:
            return scores.to(self.posterior.mean.device)

        if self.pattern:
            found = keep_pattern(self.posterior, self.pattern, score)
            assert found is not None, "the number of inputs fits"
            return found
        return keep_count(self.posterior, round(way * self.share * scores.numel()), score)


def _divided(
    model: nn.Module,
    reference: nn.Module,
    rules: Mapping[str, _Rule],
    sites: Sequence[Site],
    batches: Sequence[Any],
    sparsity: float,
    loss: Loss | None,
    damping: float,
) -> dict[str, _Rule]:
    """The rules with the shares that `divide` finds; the model is as before afterwards."""
    measure = divergence(reference, _judges(reference, batches)) if loss is None else loss
    costs = {}
    with eval_mode(model):
        base = as_number(measure(model), "loss")
        bar = progress_bar(None, "Divide between layers", "layer", total=len(sites))
        for site, moments in dense_moments(reference, batches, sites):
            found = []
            for share in levels(sparsity):
                choose = _choice(replace(rules[site.weight], share=share), {})
                refit(model, reference, site, moments, choose=choose, damping=damping)
                found.append(as_number(measure(model), "loss") - base)
            restore_values(model, reference, *(name for name in (site.name, site.norm) if name is not None))
            costs[site.weight] = (found[0], found[1])
            bar.update()
        bar.close()
    if not all(math.isfinite(cost) for pair in costs.values() for cost in pair):
        raise ValueError("the loss is not a number for some cut; check the calibration data, the model and loss=.")
    removed = [1 - float(kept.float().mean()) if (kept := _mask(rules[name])) is not None else 0.0 for name in costs]
    sizes = [rules[name].posterior.mean.numel() for name in costs]
    shares = divide(sparsity, sizes, list(costs.values()), removed)
    return {name: replace(rules[name], share=share) for name, share in zip(costs, shares, strict=True)}


def _judges(model: nn.Module, batches: Sequence[Any]) -> list[Any]:
    """The first batches, of 256 examples or a little more."""
    found, number = [], 0
    for batch in batches:
        if number < _JUDGES:
            found.append(batch)
            number += split(model, batch).num_examples
    return found


def _measure_norms(model: nn.Module, reference: nn.Module, batches: Sequence[Any]) -> None:
    """Measures batch norm anew where that brings predictions closer to those of the reference, or nothing tells."""
    if not measured_norms(model):
        return
    try:
        distance = divergence(reference, batches)
    except (TypeError, ValueError):  # no logits
        distance = None
    recalibrate_if_better(model, batches, distance)


def _mask(rule: _Rule) -> Tensor | None:
    return rule.posterior.layer.mask(rule.posterior.parameter, whole=True)


def _choice(rule: _Rule, keeps: dict[str, Tensor]) -> Choose:
    """The choice of a rule by alternating directions; what it keeps, of the weight's shape, goes into `keeps`."""
    layer, shape = rule.posterior.layer, rule.posterior.mean.shape
    from_matrices = partial(kind_of(layer).from_matrices, shape=shape)

    def choose(mean: Tensor, precision: Tensor) -> Tensor:
        def select(scores: Tensor, way: float) -> Tensor:
            return to_matrix(layer, rule.keep(from_matrices(scores), way)).to(scores.device)

        kept = best_support(mean, precision, select)
        keeps[rule.posterior.name] = from_matrices(kept).contiguous().to(rule.posterior.mean.device)
        return kept

    return choose


def _notes(model: nn.Module, rules: Mapping[str, _Rule]) -> dict[str, str]:
    """Why a weight is left as it is, by its name; nothing where it is not."""
    holders, layers = holders_of(model), fittable_layers(model) | fittable_experts(model, all_matrices=True)
    notes = {}
    for name, rule in rules.items():
        is_expert = kind_of(rule.posterior.layer).num_stacked > 0
        if not is_expert and (not is_matrix_product(rule.posterior.layer) or rule.posterior.parameter != "weight"):
            notes[name] = "neither a linear layer, a convolution nor experts: prune_weights takes it"
        elif len(holders[id(rule.posterior.mean)]) > 1:
            notes[name] = "the weight of several layers: prune_weights takes it"
        elif rule.posterior.layer.posterior_hook is not None:
            notes[name] = "gates decide on its weights: call gates.close first"
        elif name.rpartition(".")[0] not in layers:
            others = ", or another matrix of its experts that is frozen, shared or too wide" if is_expert else ""
            notes[name] = f"more than {MAX_COLUMNS:,} inputs times taps{others}: prune_weights takes it"
        elif rule.pattern is None and not rule.share:
            notes[name] = "all of it is kept"
        else:
            notes[name] = whole_note(rule.posterior, rule.pattern) if rule.pattern else ""
    return notes


_STEP, _REACH = 0.1, 0.2  # from the mean: to the levels that are measured, and as far as a layer may go
_POSITIONS = 256  # of a batch, at which predictions are compared
_RATES = (2.0, 20.0)  # of the exponential: about 7 at half of the weights


def levels(sparsity: float) -> tuple[float, float]:
    """The two sparsities at which each layer is measured."""
    return max(sparsity - _STEP, sparsity / 2), min(sparsity + _STEP, (1 + sparsity) / 2)


def divide(
    sparsity: float, sizes: Sequence[int], costs: Sequence[tuple[float, float]], least: Sequence[float]
) -> list[float]:
    """The sparsity of each layer, the whole being `sparsity`, with the smallest sum of costs within 0.2 of it.

    Args:
        sparsity: Fraction of all weights, above 0 and below 1.
        sizes: Weights of each layer.
        costs: What each costs at the two `levels`; what is not positive counts as a thousandth of the mean.
        least: What each has lost already.

    Examples:
        >>> [round(share, 2) for share in divide(0.5, [100, 100], [(0.01, 0.04), (0.02, 0.08)], [0, 0])]
        [0.55, 0.45]
    """
    low, high = levels(sparsity)
    floor = 1e-3 * max(sum(map(sum, costs)) / (2 * len(costs)), 1e-30)
    curves = []
    for size, (first, last) in zip(sizes, costs, strict=True):
        first, last = max(first, floor), max(last, floor)
        rate = min(max(math.log(last / first) / (high - low), _RATES[0]), _RATES[1])
        middle = math.sqrt(first * last)
        curves.append((rate, math.log(size / (rate * middle))))
    lowest = [max(sparsity - _REACH, 0.0, gone) for gone in least]
    highest = [max(min(sparsity + _REACH, (1 + sparsity) / 2), gone) for gone in lowest]

    def at(price: float) -> list[float]:
        """Where one more weight of each costs e^price."""
        return [
            min(max((low + high) / 2 + (price + offset) / rate, least), most)
            for (rate, offset), least, most in zip(curves, lowest, highest, strict=True)
        ]

    cheap, dear = -200.0, 200.0
    for _ in range(100):
        price = (cheap + dear) / 2
        total = sum(share * size for share, size in zip(at(price), sizes, strict=True))
        cheap, dear = (price, dear) if total < sparsity * sum(sizes) else (cheap, price)
    return at(dear)


@torch.no_grad()
def divergence(model: nn.Module, batches: Sequence[Any]) -> Callable[[nn.Module], float]:
    """A function of a model: the mean KL divergence of its predictions from those that `model` has now, in nats.

    Of a model with a single output it is half the mean squared error. Predictions are compared at 256 positions of each
    batch at most, evenly spaced among those that an `attention_mask` counts.
    """
    before = [_predictions(model, batch) for batch in batches]

    @torch.no_grad()
    def measure(changed: nn.Module) -> float:
        total = sum(
            total_divergence(wanted, _predictions(changed, batch))
            for batch, wanted in zip(batches, before, strict=True)
        )
        return total / sum(map(len, before))

    return measure


def _predictions(model: nn.Module, batch: Any) -> Tensor:
    parts = split(model, on_device(batch, device_of(model)))
    with eval_mode(model):
        logits = logits_of(parts.run(model))
    logits = logits[:, None] if logits.dim() == 1 else logits  # a number for each example
    logits = logits.movedim(1, -1) if logits.dim() > 3 else logits
    logits = unmasked(logits, parts)
    return as_predictions(logits[:: -(-len(logits) // _POSITIONS)].float())
