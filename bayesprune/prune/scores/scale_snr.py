"""What a unit costs that nothing makes up for: the squared signal-to-noise ratio of a factor on what is read of it.

A factor of mean one on a unit's activations has, under its Laplace posterior from N examples, the precision E |J|^2
times N, J being the derivatives of an example's logits with respect to it. Half of E |J|^2 is to second order half the
squared change of the logits when the unit reads as zero: the unit of the costs of `unit_snr`, where the other weights
make up for the unit. Theis et al., 2018 (arXiv:1801.05787), take the Fisher information in place of the logits' metric.

J is the sum over the weights that read the unit of weight times derivative, so that it needs no activations and serves
every kind of layer. Of the sum of a batch's logits under random signs it is a random sum over examples and logits,
whose square is in expectation the sum of their squares.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.dependency import Group

from bayesprune.foundation.batches import split, with_examples
from bayesprune.foundation.kinds import LayerKind, kind_of
from bayesprune.foundation.model import eval_mode, requires_grad, same_random_numbers
from bayesprune.foundation.progress import progress_bar
from bayesprune.foundation.sharding import check_whole
from bayesprune.laplace.calibration import predictions, random_signs
from bayesprune.layers.stacks import stack_of
from bayesprune.prune.graph.group import ChannelGroup, by_channel, cut_parameters
from bayesprune.prune.graph.prunable_layers import is_frozen
from bayesprune.prune.scores.channels import Criterion
from bayesprune.prune.scores.unit_snr import Readers, readers_in, readers_of

_DRAWS = 64  # of signs, over all batches


class ScaleSNRImportance(Criterion):
    """A torch-pruning importance: how far the logits move when a channel or head is silent, in nats, to second order.

    For cuts that nothing makes up for: it foretells what removing one channel alone does better than any other score
    here. Where `prune_channels` has data, its default, which compensates, keeps more.

    A group that no linear layer, convolution or stacked expert reads, or with a frozen layer, gets None. It knows the
    channels of one model: after a cut make another. Scores of a group raise a ValueError where a layer that reads it
    has another shape than before.

    Cost: 64 backward passes, or one for each batch where they are more; what it keeps is a number for each pass and
    input of a layer.

    Args:
        model: With posteriors, which run at their means, or without. Its logits are one vector for each example or
            token.
        data: Batches, with labels or without, all of which are kept in memory.
        num_batches: No more batches than these; None takes all.

    Raises:
        ValueError: there is no batch, or the model's logits have another shape.
        UnsupportedModelError: the model is sharded over processes.

    Examples:
        >>> import torch, torch_pruning as tp, bayesprune as bp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> importance = bp.prune.ScaleSNRImportance(model, [torch.randn(32, 4)])
        >>> pruner = tp.pruner.BasePruner(
        ...     model, torch.randn(1, 4), importance, pruning_ratio=0.5, ignored_layers=[model[2]]
        ... )
        >>> pruner.step()
        >>> model[0].out_features
        4
    """

    is_of_one_model = True

    def __init__(self, model: nn.Module, data: Iterable[Any], *, num_batches: int | None = None) -> None:
        check_whole(model, "ScaleSNRImportance")
        batches = list(with_examples(model, data, num_batches))
        if not batches:
            raise ValueError("data has no batch; expected an iterable of input batches.")
        named = dict(model.named_modules())
        weights = {name: weight for name, layer in named.items() if (weight := _reading_weight(layer)) is not None}
        num_examples, num_draws = 0, math.ceil(_DRAWS / len(batches))
        rows: dict[str, list[Tensor]] = {name: [] for name in weights}
        with torch.enable_grad(), eval_mode(model), requires_grad(model, True), same_random_numbers(model):
            for batch in progress_bar(batches, "Silence units", "batch"):
                inputs = split(model, batch)
                num_examples += inputs.num_examples
                logits = predictions(model, inputs)
                for _ in range(num_draws):
                    gradients = torch.autograd.grad(
                        logits, list(weights.values()), random_signs(logits), retain_graph=True, materialize_grads=True
                    )
                    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
                        sums = _kind(named[name]).sums((weight * gradient).detach(), "in")
                        rows[name].append(sums.double().cpu() / math.sqrt(num_draws))
        self._names = {id(layer): name for name, layer in named.items()}
        self._shapes = {name: weight.shape for name, weight in weights.items()}
        self._factors = {name: torch.stack(of_layer) / math.sqrt(num_examples) for name, of_layer in rows.items()}

    @torch.no_grad()
    def scores(self, group: Group) -> Tensor | None:
        """Scores (C,) of the root channels of a dependency group, each a unit by itself; None where none is known."""
        if any(is_frozen(item.dep.layer) for item in group):
            return None
        return self._scores(readers_in(group, self._names), [(root,) for root in group[0].root_idxs])

    @torch.no_grad()
    def of_group(self, group: ChannelGroup) -> Tensor | None:
        """Scores (C,) of the root channels of a group of units; those of a unit are equal.

        Experts rank their channels each by itself, whose scores average to the cost of one of each.
        """
        if any(is_frozen(member.layer) for member in group.members):
            return None
        if not group.num_experts:
            return self._scores(readers_of(group), group.units)
        found = self._scores(readers_of(group), [(root,) for root in range(group.num_channels)])
        return None if found is None else group.num_experts * found

    def _scores(self, readers: Readers, units: Sequence[Sequence[int]]) -> Tensor | None:
        parts = [
            self._by_unit(name, layer, positions, units)
            for (name, layer), positions in readers.items()
            if name in self._factors
        ]
        if not parts:
            return None
        return by_channel(units, (0.5 * torch.stack(parts).sum(0).square().sum(0)).tolist())

    def _by_unit(
        self, name: str, layer: nn.Module, positions: Mapping[int, Sequence[int]], units: Sequence[Sequence[int]]
    ) -> Tensor:
        """The derivatives with respect to a factor on what this layer reads of each unit, (draws, U)."""
        factors, now = self._factors[name], _reading_weight(layer)
        if now is None or now.shape != self._shapes[name]:
            raise ValueError(
                f"{name} has a weight of {None if now is None else tuple(now.shape)}, and had one of "
                f"{tuple(self._shapes[name])}: the model was cut since. Make another ScaleSNRImportance."
            )
        places = [
            (place, number) for number, unit in enumerate(units) for root in unit for place in positions.get(root, ())
        ]
        columns, numbers = torch.tensor(places, dtype=torch.long).view(-1, 2).T
        return factors.new_zeros(len(factors), len(units)).index_add_(1, numbers, factors[:, columns])


def _kind(layer: nn.Module) -> LayerKind:
    """The layout of the weight that reads a layer's inputs, of experts without posteriors too."""
    stack = stack_of(layer)
    return kind_of(layer) if stack is None else stack.kind


def _reading_weight(layer: nn.Module) -> nn.Parameter | None:
    """The weight whose rows or columns read a layer's inputs; None of what is no matrix product."""
    if not _kind(layer).is_matrix:
        return None
    name, _ = cut_parameters(layer, "in")[0]
    weight = layer._parameters.get(name)
    return weight if weight is not None and weight.dim() > 1 + _kind(layer).num_stacked else None
