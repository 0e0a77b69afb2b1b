"""What of a model leaves together: channels, heads and units of experts; and the sides of layers that lose them."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from torch_pruning.dependency import Dependency, Group

from bayesprune.foundation.kinds import STOCK_KINDS, kind_of
from bayesprune.layers import VariationalLayer
from bayesprune.layers.stacks import stack_of
from bayesprune.layers.structures import SUFFIXES
from bayesprune.prune.graph.prunable_layers import is_root, layer_sizes


class Positions(Mapping[int, Sequence[int]]):
    """Positions along one axis by root channel; as two index vectors, for there may be many.

    Attributes:
        roots: Root channels, one for each position.
        places: The positions, in the same order.

    Examples:
        >>> fused = Positions.by_root({0: [0, 4], 1: [1, 5]})
        >>> fused[1], fused.of(torch.tensor([1, 0])).tolist()
        ([1, 5], [1, 5, 0, 4])
    """

    def __init__(self, roots: Sequence[int], places: Sequence[int]) -> None:
        self.roots, self.places = (torch.tensor(values, dtype=torch.long) for values in (roots, places))

    @classmethod
    def by_root(cls, positions: Mapping[int, Sequence[int]]) -> "Positions":
        """Positions that are given by root channel."""
        roots = chain.from_iterable([root] * len(found) for root, found in positions.items())
        return cls(list(roots), list(chain.from_iterable(positions.values())))

    def of(self, roots: Tensor) -> Tensor:
        """The positions that leave with these root channels, one root channel after the other, each in its order."""
        if self._table is not None and int(roots.max()) < len(self._table):
            return self._table[roots].flatten()
        return torch.tensor([place for root in roots.tolist() for place in self.get(root, ())], dtype=torch.long)

    @cached_property
    def is_even(self) -> bool:
        """Whether every root channel has as many positions."""
        return len(set(self._counts.tolist())) == 1

    @cached_property
    def num_places(self) -> int:
        """Number of positions, those of several root channels once."""
        return len(self.places.unique())

    @cached_property
    def num_roots(self) -> int:
        """Number of root channels."""
        return len(self._counts)

    @cached_property
    def _counts(self) -> Tensor:
        counts = torch.bincount(self.roots)
        return counts[counts > 0]

    @cached_property
    def _table(self) -> Tensor | None:
        """Positions by root channel, where root channels are 0 to C - 1 and have as many each, (C, n)."""
        if not self.is_even or int(self.roots.max()) >= self.num_roots:
            return None
        order = (self.roots * (1 + int(self.places.max())) + self.places).argsort()
        return self.places[order].view(self.num_roots, -1)

    @cached_property
    def _by_root(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for root, place in zip(self.roots.tolist(), self.places.tolist(), strict=True):
            found.setdefault(root, []).append(place)
        return {root: sorted(places) for root, places in found.items()}

    def __getitem__(self, root: int) -> list[int]:
        return self._by_root[root]

    def __iter__(self) -> Iterator[int]:
        return iter(self._by_root)

    def __len__(self) -> int:
        return self.num_roots


Axis = tuple[str, str]
"""A layer's name, and "out" or "in"."""

CUTTABLE = (*(stock for stock in STOCK_KINDS if stock is not nn.EmbeddingBag), nn.Parameter)
"""What torch-pruning knows how to cut."""


@dataclass(frozen=True, eq=False)
class Member:
    """One side of one layer that loses channels with its group.

    Attributes:
        axis: Its name and side.
        dependency: torch-pruning's edge, which knows how to cut it.
        size: Length of the axis.
        positions: Positions along the axis by root channel.
    """

    axis: Axis
    dependency: Dependency
    size: int
    positions: Positions

    @property
    def layer(self) -> nn.Module | Tensor:
        """The layer, or a parameter or buffer that stands in the model by itself."""
        return self.dependency.layer


def side(dependency: Dependency) -> str:
    """The side that a dependency cuts; layers whose two sides are one (norms, depthwise convolutions) have "out"."""
    return "in" if dependency.handler.__name__ == "prune_in_channels" else "out"


def axis_size(graph: tp.DependencyGraph, dependency: Dependency) -> int | None:
    """Length of the axis that a dependency cuts; None for a layer without one (a PReLU of one slope)."""
    return (graph.get_in_channels if side(dependency) == "in" else graph.get_out_channels)(dependency.target)


def by_channel(units: Iterable[Sequence[int]], costs: Iterable[float]) -> Tensor:
    """The cost of each channel's unit, (C,), of units that have all C root channels."""
    found = {channel: cost for unit, cost in zip(units, costs, strict=True) for channel in unit}
    return torch.tensor([found[channel] for channel in sorted(found)], dtype=torch.double)


def cut_parameters(layer: nn.Module, side: str) -> list[tuple[str, int]]:
    """Name and dimension of the parameters of a layer that its side cuts."""
    if (stack := stack_of(layer)) is not None:
        return stack.cut_parameters(layer, side)
    dim = 0 if side == "out" and is_depthwise(layer) else kind_of(layer).side_dim(side)
    if side == "in":
        return [("weight", dim)]
    found = [("weight", dim), ("bias", 0), *((name, 0) for name in gains(layer))]
    return [(name, dim) for name, dim in found if layer._parameters.get(name) is not None]


def num_stacked(layer: nn.Module) -> int:
    """Number of leading dimensions of a layer's parameters that number layers of their own."""
    return 0 if stack_of(layer) is None else 1


def has_outputs(layer: object) -> bool:
    """Whether a layer has channels of its own making: a root layer, or stacked experts."""
    return is_root(layer) or (isinstance(layer, nn.Module) and stack_of(layer) is not None)


def gains(layer: nn.Module | Tensor) -> list[str]:
    """Further parameters with an entry for each output, as `ScaledStdConv2d` has; torch-pruning does not cut them."""
    if not is_root(layer):
        return []
    size = layer_sizes(layer)[1]
    names = _further_parameters(layer)
    return [name for name in names if layer._parameters[name].shape[:1].numel() == size]  # type: ignore[union-attr]


def is_depthwise(layer: nn.Module | Tensor) -> bool:
    """Whether torch-pruning cuts both sides of this convolution at once."""
    return isinstance(layer, _ConvNd) and layer.groups == layer.out_channels > 1


def num_blocks(member: Member) -> int:
    """Equal blocks that an axis falls into, and that must stay equal: those of grouped convolutions and group norms."""
    return 1 if is_depthwise(member.layer) else kind_of(member.layer).num_groups


def misfit(member: Member) -> str | None:
    """The reason why this side cannot be cut correctly, if there is one."""
    layer, (name, _) = member.layer, member.axis
    if isinstance(layer, nn.Module) and is_root(layer) and layer._parameters.get("weight") is None:
        return _computed_weight(name, layer)
    if unknown := [name for name in _further_parameters(layer) if name not in gains(layer)]:
        return f"torch-pruning does not know {name}.{unknown[0]}, a parameter without an entry for each output"
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1:
        return f"{name} normalises over more than channels"
    if num_blocks(member) > 1:
        if kind_of(layer).is_transposed:
            return f"torch-pruning cannot cut {name}, a grouped transposed convolution"
        if member.positions.num_places != member.size:
            return f"{name} works on blocks of channels of which only some are in this group"
    return None


def overflows(member: Member) -> bool:
    """Whether the graph gives this side positions that it has not, or a parameter too few."""
    return int(member.positions.places.max()) >= member.size or (
        isinstance(member.layer, nn.Parameter) and member.positions.num_places != member.size
    )


def _computed_weight(name: str, layer: nn.Module) -> str:
    """What computes the weight of a layer, and how to make it a parameter again."""
    if is_parametrized(layer):
        how = f"torch.nn.utils.parametrize.remove_parametrizations({name}, 'weight')"
    elif {"weight_g", "weight_v"} <= layer._parameters.keys():
        how = f"torch.nn.utils.remove_weight_norm({name})"
    elif "weight_mask" in layer._buffers:
        how = f"torch.nn.utils.prune.remove({name}, 'weight')"
    elif "weight_orig" in layer._parameters:
        how = f"torch.nn.utils.remove_spectral_norm({name})"
    else:
        return f"the weight of {name} is computed, not a parameter: keep the result as an nn.Parameter to cut it"
    return f"the weight of {name} is computed in each forward, not a parameter: call {how} first"


def _further_parameters(layer: nn.Module | Tensor) -> list[str]:
    """Parameters beside weight, bias and their stds, which torch-pruning leaves at their size."""
    if isinstance(layer, Tensor):
        return []
    known = {"weight", "bias"}
    if isinstance(layer, VariationalLayer):
        known |= {f"{name}_{suffix}" for name in ("weight", "bias") for suffix in SUFFIXES}
    return [name for name, parameter in layer._parameters.items() if parameter is not None and name not in known]


def tied_parameters(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Modules and names that hold one parameter, for the parameters with several, by id."""
    holders: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders[id(parameter)].append((module, name))
    return {key: found for key, found in holders.items() if len(found) > 1}


Granularity = Literal["heads", "mlp", "width"]
GRANULARITY: tuple[Granularity, ...] = ("heads", "mlp", "width")


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels of one root layer, heads of one attention module or hidden units of experts, and all that leaves along.

    Attributes:
        name: The root layer; of heads, the attention module; of hidden units, that of the experts.
        group: torch-pruning's group of all its channels.
        units: Sets of root channels that can only leave together, all of one size.
        members: What loses channels.
        attention: The attention modules, where the units are heads: their matrix products shrink with the heads.
        attributes: Numbers on modules that shrink with the units, as `num_heads`, and by how much with each.
        heads_per_unit: Query heads in a unit: those that share a key and a value; 0 where the units are no heads.
        heads: The heads of each unit, where they are not simply one after the other.
        num_experts: Experts whose channels stand one behind the other, each of which has one in every unit, in any
            order; 0 where the units are no hidden units of experts.
        multiple: Kept units are a multiple of this.
    """

    name: str
    group: Group
    units: tuple[tuple[int, ...], ...]
    members: tuple[Member, ...]
    attention: tuple[str, ...] = ()
    attributes: tuple[tuple[nn.Module, str, int], ...] = ()
    heads_per_unit: int = 0
    heads: tuple[tuple[int, ...], ...] = ()
    num_experts: int = 0
    multiple: int = 1

    @cached_property
    def roots(self) -> Tensor:
        """Root channels by unit, (units, channels of a unit)."""
        return torch.tensor(self.units, dtype=torch.long)

    @property
    def unit_size(self) -> int:
        """Channels in a unit: the number of groups of a grouped convolution, the size of a head, usually 1."""
        return len(self.units[0])

    @property
    def num_channels(self) -> int:
        """Channels of the root layer."""
        return len(self.units) * self.unit_size

    @property
    def is_heads(self) -> bool:
        """Whether heads alone leave; otherwise the channels of the root layer leave, with heads or without."""
        return self.name in self.attention

    @property
    def layers(self) -> list[str]:
        """Layers with weights whose output channels leave, the root first."""
        found = [m.axis[0] for m in self.members if m.axis[1] == "out" and has_outputs(m.layer)]
        return sorted(found, key=lambda name: name != self.name)

    def by_rank(self, scores: Tensor) -> "ChannelGroup":
        """The group, where it is of experts with the lowest channel of each expert as one unit, and so on.

        Args:
            scores: Of each channel, (C,).
        """
        if not self.num_experts:
            return self
        order = scores.view(self.num_experts, -1).argsort(dim=1, stable=True)
        first = torch.arange(0, len(scores), order.shape[1], device=order.device)
        return replace(self, units=tuple(map(tuple, (order + first.unsqueeze(1)).T.tolist())))

    def positions_per_unit(self, member: Member) -> int:
        """Positions along the member's axis that one unit takes along."""
        return len(member.positions.of(self.roots[0]))


@dataclass(frozen=True)
class ChannelStructure:
    """The groups of a model that can be removed, in the model's order.

    Attributes:
        groups: Its groups of channels and heads.
        left_whole: Why a layer keeps all its output channels, by name.
    """

    groups: tuple[ChannelGroup, ...]
    left_whole: dict[str, str]


def written_down(members: Iterable[Member], num_channels: int) -> Group:
    """Members as a group of torch-pruning, for its importances: the first item holds each root channel once."""
    items: list[tuple[Dependency, dict[int, int]]] = []
    for member in members:
        for number in range(max(map(len, member.positions.values()))):
            of = {root: found[number] for root, found in sorted(member.positions.items()) if number < len(found)}
            items.append((member.dependency, of))
    group = Group()
    for dependency, of in sorted(items, key=lambda item: len(item[1]) < num_channels):
        group.add_dep(dependency, list(of.values()))
        group[-1].root_idxs = list(of)
    return group
