"""What of a model leaves together: channels that a dependency graph couples, and heads of attention."""

from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch_pruning.dependency import Group

from bayesprune.prune.cuts import Member, is_root

Granularity = Literal["heads", "mlp", "width"]
GRANULARITY: tuple[Granularity, ...] = ("heads", "mlp", "width")


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels of one root layer, or heads of one attention module, and everything that leaves with each.

    Attributes:
        name: The root layer; of heads, the attention module.
        group: torch-pruning's group of all its channels.
        units: Sets of root channels that can only leave together, all of one size.
        members: What loses channels.
        attention: The attention modules, where the units are heads: their matrix products shrink with the heads.
        attributes: Numbers on modules that shrink as the number of units does, as `num_heads`.
        heads_per_unit: Query heads in a unit: those that share a key and a value; 0 where the units are no heads.
    """

    name: str
    group: Group
    units: tuple[tuple[int, ...], ...]
    members: tuple[Member, ...]
    attention: tuple[str, ...] = ()
    attributes: tuple[tuple[nn.Module, str], ...] = ()
    heads_per_unit: int = 0

    @property
    def unit_size(self) -> int:
        """Channels in a unit: the number of groups of a grouped convolution, the size of a head, usually 1."""
        return len(self.units[0])

    @property
    def num_channels(self) -> int:
        """Channels of the root layer."""
        return len(self.units) * self.unit_size

    @property
    def layers(self) -> list[str]:
        """Layers with weights whose output channels leave, the root first."""
        found = [m.axis[0] for m in self.members if m.axis[1] == "out" and is_root(m.layer)]
        return sorted(found, key=lambda name: name != self.name)

    def positions_per_unit(self, member: Member) -> int:
        """Positions along the member's axis that one unit takes along."""
        return sum(len(member.positions.get(channel, ())) for channel in self.units[0])


@dataclass(frozen=True)
class ChannelStructure:
    """What of a model can be removed, in the model's order.

    Attributes:
        groups: Its groups of channels and heads.
        left_whole: Why a layer keeps all its output channels, by name.
    """

    groups: tuple[ChannelGroup, ...]
    left_whole: dict[str, str]
