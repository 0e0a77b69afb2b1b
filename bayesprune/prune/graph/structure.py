"""What of a model leaves together: channels that a dependency graph couples, heads of attention, units of experts."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch_pruning.dependency import Dependency, Group

from bayesprune.prune.graph.cuts import Member, has_outputs

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
    """What of a model can be removed, in the model's order.

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
