"""The inverse of removing channels: more units than before, with which the model computes what it did.

Along the same dependency groups as in `prune_channels`, each unit gets copies, and what reads it weighs them by shares
that add up to one (Net2WiderNet: Chen et al., 2016, arXiv:1511.05641). Unlike there every unit is copied, as often as
every other, so that norms over channels see what they saw. The shares are drawn, not equal: copies that are read alike
would get the same gradients, and would stay the same for good.

Wider networks bear fewer bits in each weight, and may be squeezed afterwards (Liu et al., 2020, arXiv:2002.00555).
"""

import copy
import logging
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.text import first_names
from bayesprune.layers import variational_layers
from bayesprune.prune.graph.find import groups_in
from bayesprune.prune.graph.group import ChannelGroup, Member, cut_parameters, is_depthwise, tied_parameters
from bayesprune.prune.graph.observe import Observed
from bayesprune.prune.graph.prunable_layers import Layers
from bayesprune.storage.save import outputs_differ

_GRANULARITY = ("mlp", "width")
_SMALLEST_SHARE = 0.5  # of what the copies would have if all had the same

_LOGGER = logging.getLogger(__name__)

_SIZES: dict[tuple[type[nn.Module], str], tuple[str, ...]] = {
    (nn.Linear, "out"): ("out_features",),
    (nn.Linear, "in"): ("in_features",),
    (_ConvNd, "out"): ("out_channels",),
    (_ConvNd, "in"): ("in_channels",),
    (_BatchNorm, "out"): ("num_features",),
    (nn.LayerNorm, "out"): ("normalized_shape",),
}
"""Attributes that say how long an axis is."""


@torch.no_grad()
def widen(
    model: nn.Module,
    example_inputs: Any,
    factor: int = 2,
    *,
    granularity: Collection[str] = _GRANULARITY,
    ignored_layers: Layers = (),
) -> dict[str, int]:
    """Makes a model so many times as wide, in place; its outputs in evaluation mode stay what they were, to rounding.

    Weights are new parameters, so make the optimizer afterwards. Heads keep their number, and so do inputs and outputs
    of the model. Every change is tried on a copy first: groups with which the outputs would not stay are left as they
    are, and logged.

    Args:
        model: An ordinary model of linear layers, convolutions, batch and layer norms, and what has no parameters.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments; on its device.
        factor: How many units there are for each from now on, 2 or more.
        granularity: What grows: "mlp", the channels inside residual blocks, and "width", the channels that blocks read
            from and add to, and those of nets without blocks.
        ignored_layers: Layers, or their names, whose output channels stay as many.

    Returns:
        The number of output channels that each wider layer has now, by name.

    Raises:
        ValueError: the factor is out of range, or the model has posteriors.
        UnsupportedModelError: no layer can be made wider, or the model does not run on these inputs.

    Examples:
        >>> import torch, bayesprune as bp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> bp.widen(model, torch.zeros(1, 8))
        {'0': 32}
    """
    if type(factor) is not int or factor < 2:
        raise ValueError(f"factor is {factor!r}; expected a whole number, 2 or more.")
    if any(variational_layers(model)):
        raise ValueError("widen got a model with posteriors; expected an ordinary one: call to_deterministic(model).")
    found = groups_in(Observed(model, example_inputs), granularity=granularity, ignored_layers=ignored_layers).groups
    tied = {id(module) for holders in tied_parameters(model).values() for module, _ in holders}
    groups = [group for group in found if _is_known(group, tied)]
    shares = {group.name: _shares(group.num_channels, factor) for group in groups}

    def stays(candidates: Sequence[ChannelGroup]) -> bool:
        trial = copy.deepcopy(model)
        try:
            _widen(trial, candidates, shares)
            return outputs_differ(model, trial, example_inputs) is None
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):  # of the model's own forward
            return False

    chosen = list(groups)
    if not chosen or not stays(chosen):
        chosen = []
        for group in groups:
            if stays([*chosen, group]):
                chosen.append(group)
    if not chosen:
        raise UnsupportedModelError(
            f"no layer of this {type(model).__name__} can be made wider: {len(found)} groups of channels were found, "
            f"{len(groups)} of them are of layers that widen knows, and with none of these the outputs would stay."
        )
    if left := [group.name for group in found if group not in chosen]:
        _LOGGER.info("left as wide as they were: %s", first_names(left))
    _widen(model, chosen, shares)
    return {name: _num_outputs(model.get_submodule(name)) for group in chosen for name in group.layers}


def _is_known(group: ChannelGroup, tied: Collection[int]) -> bool:
    """Whether all that would grow is of layers whose sizes are known, each channel at places of its own."""
    if group.attention or group.attributes or group.num_experts:
        return False
    return all(_is_known_member(member, tied) for member in group.members)


def _is_known_member(member: Member, tied: Collection[int]) -> bool:
    layer = member.layer
    if isinstance(layer, Tensor) or not isinstance(layer, (nn.Linear, _ConvNd, _BatchNorm, nn.LayerNorm)):
        return False
    if isinstance(layer, _ConvNd) and layer.groups > 1 and not is_depthwise(layer):
        return False
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1:
        return False
    return id(layer) not in tied and len(member.positions.places) == member.positions.num_places


def _shares(num_channels: int, factor: int) -> Tensor:
    """What each copy of a channel is read with, (C, factor); adds up to one."""
    drawn = _SMALLEST_SHARE + torch.rand(num_channels, factor, dtype=torch.double)
    return drawn / drawn.sum(1, keepdim=True)


def _widen(model: nn.Module, groups: Sequence[ChannelGroup], shares: dict[str, Tensor]) -> None:
    """Makes these groups wider; `shares` by name of a group."""
    axes: dict[tuple[str, str], list[tuple[ChannelGroup, Member]]] = defaultdict(list)
    for group in groups:
        for member in group.members:
            axes[member.axis].append((group, member))
    for (name, side), members in axes.items():
        index, weights = _spread(members, shares)
        _repeat(model.get_submodule(name), side, index, weights)


def _spread(members: Sequence[tuple[ChannelGroup, Member]], shares: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Which old position stands at each new one of an axis, and what it is read with.

    Copies of a channel stand behind it: the positions of a channel that follow one another, as those of a flattened
    map do, are repeated together, which is where a reshape or a concatenation puts them.
    """
    size = members[0][1].size
    owner: list[tuple[str, int] | None] = [None] * size
    for group, member in members:
        for root, place in zip(member.positions.roots.tolist(), member.positions.places.tolist(), strict=True):
            owner[place] = (group.name, root)
    index: list[int] = []
    weights: list[float] = []
    start = 0
    while start < size:
        its = owner[start]
        end = start + 1
        while its is not None and end < size and owner[end] == its:
            end += 1
        for share in [1.0] if its is None else shares[its[0]][its[1]].tolist():
            index += range(start, end)
            weights += [share] * (end - start)
        start = end
    return torch.tensor(index), torch.tensor(weights, dtype=torch.double)


def _repeat(layer: Any, side: str, index: Tensor, weights: Tensor) -> None:
    """Makes one side of a layer what stands at these positions; its inputs are weighed."""
    for name, dim in cut_parameters(layer, side):
        old = layer._parameters[name]
        new = old.detach().index_select(dim, index.to(old.device))
        if side == "in":
            shape = (1,) * dim + (-1,) + (1,) * (old.dim() - dim - 1)
            new = (new.double() * weights.to(old.device).view(shape)).to(old.dtype)
        layer._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
    if isinstance(layer, _BatchNorm) and layer.track_running_stats:
        for name in ("running_mean", "running_var"):
            old = layer.get_buffer(name)
            layer._buffers[name] = old.index_select(0, index.to(old.device))
    kind = next(kind for kind, its in _SIZES if isinstance(layer, kind) and its == side)
    names = _SIZES[kind, side]
    if is_depthwise(layer):
        names = ("in_channels", "out_channels", "groups")
    for name in names:
        setattr(layer, name, (len(index),) if name == "normalized_shape" else len(index))


def _num_outputs(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
