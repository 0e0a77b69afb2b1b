"""A torch-pruning criterion: how much of the posterior's signal leaves with a channel.

The score of one weight with posterior N(mu, sigma^2) in a layer whose means have root mean square s is

    mu^2 / (s^a sigma^p),    a = min(1, 2 - p).

p = 2 is the squared signal-to-noise ratio, which ranks as Optimal Brain Damage does under a Laplace posterior (LeCun et
al., 1989).
A smaller p believes the stds in part: they are known roughly, and hold for small changes only. From 2 down to 1 what
they lose goes to the layer's scale, so that the score stays a pure number; below 1 the score has a unit, but it is the
same for all layers. p = 0 is the squared magnitude over the layer's. A channel's score is the sum over all weights that
are removed with it, in every layer of its dependency group.
Unlike torch-pruning's own importances it scores the exact block of a grouped convolution that a channel takes along.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import Group

from bayesprune import estimators
from bayesprune.foundation import defaults
from bayesprune.foundation.kinds import kind_of
from bayesprune.layers import VariationalLayer
from bayesprune.prune.graph.companions import follow_stds
from bayesprune.prune.graph.group import ChannelGroup, cut_parameters, num_stacked
from bayesprune.prune.graph.prunable_layers import is_frozen
from bayesprune.prune.graph.trace import quiet


class Criterion(tp.importance.Importance):
    """An importance of torch-pruning by a posterior.

    Making one changes nothing. When a pruner of torch-pruning calls it, stds and masks follow their means through
    torch-pruning from then on, as after `follow_stds()`.

    Attributes:
        target_kind: The kind of target, such as "evidence", whose threshold its scores are compared with, or None.
        is_of_one_model: Whether its scores are those of the model that it was made for, and of no cut of it.
    """

    target_kind: ClassVar[str | None] = None
    is_of_one_model: ClassVar[bool] = False

    def __call__(self, group: Group) -> Tensor | None:  # type: ignore[override]
        """Scores (C,) of the root channels of a dependency group; None where none are known."""
        follow_stds()
        return self.scores(group)

    def of_group(self, group: ChannelGroup) -> Tensor | None:
        """Scores (C,) of the root channels of a group of this library, which cuts stds by itself."""
        return self.scores(group.group)

    def scores(self, group: Group) -> Tensor | None:
        """Scores (C,) of the root channels of a dependency group; None where none are known."""
        raise NotImplementedError


GRADIENTS = "A criterion that needs gradients, as Taylor's does, needs loss.backward() before."

Importance = tp.importance.Importance | Callable[[Any], Any]


class RemovedWeights(NamedTuple):
    """The weights that leave with each root channel of a dependency group, of C root channels.

    Attributes:
        score: Sum of the weights' scores, (C,).
        number: How many of those weights were not removed before, (C,).
    """

    score: Tensor
    number: Tensor


_KNOWN: ContextVar[dict[tuple[VariationalLayer, str, bool], RemovedWeights] | None] = ContextVar("known", default=None)


class SNRImportance(Criterion):
    """Score per channel: sum of mu^2 / (s^min(1, 2 - power) sigma^power) over the weights that leave with it.

    s is the root mean square of a layer's means at scoring time. Deterministic layers of a group contribute nothing,
    and a group without any variational layer, or with a frozen one, gets no score (None): torch-pruning then leaves it
    alone. Biases do not count, nor do the projections inside `nn.MultiheadAttention`. In a torch-pruning pruner of your
    own stds and masks follow their means, see `follow_stds`.

    torch-pruning's own global ranking skips a group whole once all of its channels fall under the threshold, so that
    it removes less than asked for; `bayesprune.prune_channels` keeps a share of every group instead and meets the
    target.

    Args:
        power: Weight given to the stds, from 0 (they are ignored) to 2, the squared signal-to-noise ratio. 1 for stds
            that were trained, 0.5 for those of `laplace.RunningLaplace`.
        reduction: "sum" is what removing the channel costs; "mean" divides by the number of weights.

    Examples:
        >>> import torch, torch_pruning as tp, bayesprune as bp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = bp.to_variational(model)
        >>> pruner = tp.pruner.BasePruner(
        ...     model, torch.randn(1, 4), bp.SNRImportance(), pruning_ratio=0.5, ignored_layers=[model[2]]
        ... )
        >>> pruner.step()
        >>> model[0].out_features
        4

    Raises:
        ValueError: the reduction is unknown or the power negative.
    """

    def __init__(self, power: float = defaults.CHANNEL_POWER, *, reduction: Literal["sum", "mean"] = "sum") -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f'reduction is {reduction!r}; expected "sum" or "mean".')
        if not 0 <= power <= 2:
            raise ValueError(f"power is {power!r}; expected 0 (stds ignored), 1, 2 (SNR^2), or between.")
        self.power = power
        self.reduction = reduction

    @torch.no_grad()
    def scores(self, group: Group) -> Tensor | None:
        """Scores (C,) of the root channels of a dependency group; None where nothing in it is variational."""
        removed = removed_weights(group, partial(weight_scores, power=self.power))
        if removed is None:
            return None
        return removed.score if self.reduction == "sum" else removed.score / removed.number.clamp(min=1)


def removed_weights(group: Group, weight_score: Callable[..., Tensor]) -> RemovedWeights | None:
    """Score and number of the weights that leave with each root channel; None where none is variational, or one frozen.

    Args:
        group: A dependency group of torch-pruning.
        weight_score: weight_score(layer, name=...) gives the scores of this parameter of the layer, in its shape, 0
            where a weight was removed.
    """
    if any(is_frozen(item.dep.layer) for item in group):
        return None
    roots = {channel: index for index, channel in enumerate(group[0].root_idxs)}
    removed: RemovedWeights | None = None
    for item in group:
        layer, root_idxs = item.dep.layer, item.root_idxs
        if not item.idxs or root_idxs is None or None in root_idxs:
            continue  # members that grouped-query attention reaches have no root of their own
        into_inputs = item.dep.handler.__name__ == "prune_in_channels"
        for name in _weights(layer, into_inputs=into_inputs) if isinstance(layer, VariationalLayer) else ():
            of_layer = _sums(layer, name, weight_score, into_inputs=into_inputs)
            device = of_layer.score.device
            if removed is None:
                zeros = torch.zeros(len(roots), device=device)
                removed = RemovedWeights(zeros, zeros.clone())
            positions = torch.tensor(item.idxs, device=device)
            targets = torch.tensor([roots[root] for root in root_idxs], device=removed.score.device)
            for total, values in zip(removed, of_layer, strict=True):
                total.scatter_add_(0, targets, values[positions].to(total))
    return removed


@contextmanager
def scored_once() -> Iterator[None]:
    """Inside, `removed_weights` scores each parameter once for all groups, with the first `weight_score` that it gets.

    A weight leaves with its output channel or with its input channel, so that most are asked for twice. Nothing may
    change the weights inside.
    """
    token = _KNOWN.set({})
    try:
        yield
    finally:
        _KNOWN.reset(token)


def _sums(
    layer: VariationalLayer, name: str, weight_score: Callable[..., Tensor], *, into_inputs: bool
) -> RemovedWeights:
    """Score and number of a parameter's weights by input or output channel."""
    known = _KNOWN.get()
    key = layer, name, into_inputs
    if known is not None and key in known:
        return known[key]
    scores, mask = weight_score(layer, name=name), layer.mask(name)
    found = {}
    loses_both = known is not None and name in dict(cut_parameters(layer, "out" if into_inputs else "in"))
    for side in (False, True) if loses_both else (into_inputs,):
        sums = per_channel_sums(layer, scores, into_inputs=side)
        if mask is None:
            numbers = torch.full_like(sums, scores.numel() / len(sums))
        else:
            numbers = per_channel_sums(layer, mask, into_inputs=side)
        found[layer, name, side] = RemovedWeights(sums, numbers)
    if known is not None:
        known.update(found)
    return found[key]


def _weights(layer: VariationalLayer, *, into_inputs: bool) -> list[str]:
    """The posteriors that lose weights with a side of a layer."""
    found = cut_parameters(layer, "in" if into_inputs else "out") if num_stacked(layer) else [("weight", 0)]
    active = layer.active_names()
    return [name for name, _ in found if name in active and layer.is_weight(name)]


def weight_scores(layer: VariationalLayer, power: float, name: str = "weight") -> Tensor:
    """mu^2 / (s^min(1, 2 - power) sigma^power) of a layer's weights, in their shape; 0 where the mean is zero."""
    mean, std = estimators.as_gaussian(layer.posterior(name))
    mean, std = mean.detach().float(), std.detach()
    scores = mean.square()
    scale = scores.mean().sqrt().pow(min(1.0, 2.0 - power))
    return scores.div_(scale * (std if power == 1 else std.pow(power))).masked_fill_(mean == 0, 0.0)


def per_channel_sums(layer: nn.Module, values: Tensor, *, into_inputs: bool) -> Tensor:
    """Sums of weight-shaped values by input or output channel of the layer, (channels,).

    Of a grouped convolution, an input channel takes along its column in the rows of its own group alone. Channels of
    stacked experts are numbered through.
    """
    return kind_of(layer).sums(values, "in" if into_inputs else "out")


class Scored(NamedTuple):
    """A group whose units are ranked.

    Attributes:
        group: The group; each expert of stacked ones has put its channels in order.
        scores: Of its units, the lowest leaving first.
    """

    group: ChannelGroup
    scores: list[float]


@torch.no_grad()
def unit_scores(importance: Importance, group: ChannelGroup) -> Scored | None:
    """The mean score of a channel in each of the group's units; None where the importance gives none.

    Raises:
        ValueError: the scores are not one number for each channel, or the importance needs gradients and finds none.
    """
    name = type(importance).__name__
    try:
        with quiet():
            of_group = getattr(importance, "of_group", None)
            scores = importance(group.group) if of_group is None else of_group(group)
    except (AttributeError, LookupError, TypeError) as error:
        if has_gradients(member.layer for member in group.members):
            raise
        failure = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{name} fails on {group.name}, whose weights have no gradients ({failure}). {GRADIENTS}"
        ) from error
    if scores is None:
        return None
    if scores.shape != (group.num_channels,):
        raise ValueError(
            f"{name} gave scores of shape {tuple(scores.shape)} for {group.name}; expected one for each of its "
            f"{group.num_channels} channels."
        )
    if torch.isnan(scores).any():
        raise ValueError(f"{name} gave NaN for channels of {group.name}; check its weights and gradients.")
    values = scores.double().cpu()
    group = group.by_rank(values)
    return Scored(group, values[group.roots].mean(1).tolist())


def has_gradients(layers: Iterable[nn.Module | Tensor]) -> bool:
    """Whether a parameter of these layers, their own children apart, has a gradient."""
    own = ([layer] if isinstance(layer, Tensor) else layer.parameters(recurse=False) for layer in layers)
    return any(parameter.grad is not None for parameters in own for parameter in parameters)


def lowest_units(group: ChannelGroup, scores: list[float], count: int) -> list[tuple[int, ...]]:
    """The `count` units with the lowest scores, in their order."""
    ranked = sorted(range(len(scores)), key=scores.__getitem__)
    return [group.units[index] for index in ranked[:count]]
