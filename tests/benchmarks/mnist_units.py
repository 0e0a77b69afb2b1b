"""Whole units of the MNIST networks: what leaves with them, and the smaller network without them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from mnist_methods import Network, Score, mask_of
from torch import Tensor, nn

from bayesprune.layers import VariationalLayer, named_posteriors


@dataclass(frozen=True)
class Slice:
    """The weights of one layer that belong to units: its rows (outputs) or columns, in blocks after a flattening."""

    layer: int
    dim: int
    block: int = 1

    def of(self, values: Tensor) -> Tensor:
        """A view of weight-shaped values with the units in front."""
        if self.dim == 0:
            return values
        if self.block > 1:
            values = values.view(len(values), -1, self.block)
        return values.transpose(0, 1)

    def reduce(self, values: Tensor, *, any_: bool = False) -> Tensor:
        view = self.of(values).flatten(1)
        return view.any(1) if any_ else view.sum(1)


def unit_groups(net: Network) -> list[list[Slice]]:
    """Inputs of an MLP and the units of its layers; filters, inputs of the dense layer and its units of a LeNet."""
    layers, groups = net.layers, []
    if isinstance(layers[0], nn.Linear):
        groups.append([Slice(0, 1)])
    for index, (layer, after) in enumerate(pairwise(layers)):
        is_flattened = isinstance(after, nn.Linear) and not isinstance(layer, nn.Linear)
        block = after.weight.shape[1] // layer.weight.shape[0] if is_flattened else 1
        groups.append([Slice(index, 0), Slice(index + 1, 1, block)])
        if is_flattened:
            groups.append([Slice(index + 1, 1)])
    return groups


def live_units(net: Network) -> list[int]:
    """How many units of each group have kept weights in each of its slices."""
    masks = [mask_of(layer).contiguous() for layer in net.layers]
    return [int(_alive(group, masks).sum()) for group in unit_groups(net)]


@torch.no_grad()
def keep_units(net: Network, widths: Sequence[int], score: Score) -> None:
    """Removes whole units until these are left; a unit's score is the sum over all weights that leave with it."""
    weights = {id(posterior.layer): posterior for posterior in named_posteriors(net.model) if posterior.is_weight}
    masks = [mask_of(layer).contiguous() for layer in net.layers]
    scores = [
        score(weights[id(layer)]).double().contiguous() * mask for layer, mask in zip(net.layers, masks, strict=True)
    ]
    for width, group in zip(widths, unit_groups(net), strict=True):
        total = torch.stack([part.reduce(scores[part.layer]) for part in group]).sum(0)
        total.masked_fill_(~_alive(group, masks), -1)
        gone = torch.ones(len(total), dtype=torch.bool)
        gone[total.topk(min(width, len(total))).indices] = False
        for part in group:
            part.of(masks[part.layer])[gone] = False
            part.of(scores[part.layer])[gone] = 0
    for layer, mask in zip(net.layers, masks, strict=True):
        layer.set_mask("weight", mask)


@torch.no_grad()
def compact(net: Network) -> None:
    """Takes units without weights out; the outputs stay as they were, since what such a unit gives is a constant."""
    for group in unit_groups(net):
        masks = [mask_of(layer).contiguous() for layer in net.layers]
        alive = _alive(group, masks)
        first = group[0]
        if bool(alive.all()):
            continue
        if not bool(alive.any()):
            alive[0] = True
        kept = alive.nonzero().flatten()
        layer = net.layers[first.layer]
        if first.dim == 1:  # inputs: pixels go, those of a dense layer behind filters stay in place as zeros
            if net.inputs is not None and first.layer == 0:
                _select(layer, 1, kept)
                net.inputs = net.inputs[kept]
            continue
        after, part = net.layers[first.layer + 1], group[1]
        constant = layer.bias.relu() * ~alive
        columns = part.of(after.weight.contiguous())
        after.bias += torch.einsum("u,uo->o", constant, columns.flatten(2).sum(2) if columns.dim() > 2 else columns)
        _select(layer, 0, kept)
        spread = (kept[:, None] * part.block + torch.arange(part.block)).flatten()
        _select(after, 1, spread)


def _alive(group: list[Slice], masks: list[Tensor]) -> Tensor:
    return torch.stack([part.reduce(masks[part.layer], any_=True) for part in group]).all(0)


def _select(layer: VariationalLayer, dim: int, kept: Tensor) -> None:
    """Keeps these outputs (0) or inputs (1) of a layer, with stds and masks."""
    old = layer.weight.shape[dim]
    layer.weight = nn.Parameter(layer.weight.data.index_select(dim, kept).contiguous())
    layer.cut("weight", dim, kept.tolist(), old)
    if dim == 0:
        layer.bias = nn.Parameter(layer.bias.data[kept])
        layer.cut("bias", 0, kept.tolist(), old)
    names = ("out_features", "in_features") if isinstance(layer, nn.Linear) else ("out_channels", "in_channels")
    setattr(layer, names[dim], len(kept))
