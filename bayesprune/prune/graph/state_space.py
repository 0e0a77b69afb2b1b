"""Heads of state-space mixers (Mamba-2; Dao and Gu, 2024, arXiv:2405.21060) as units of removal.

A mixer computes gate, inputs, B, C and step sizes with one projection, convolves inputs, B and C channel by channel,
and runs a scan for every head; heads of one of its n_groups share B and C. Groups must stay of one size, so a unit is
one head of every group. A norm over the heads of a group stands in front of the output projection, which a head that is
only ignored would still take part in: what is checked, as for channels, is that heads put in another order change
nothing.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.dependency import Dependency, Node
from torch_pruning.pruner import function

from bayesprune.prune.graph.group import ChannelGroup, ChannelStructure, Member, Positions, is_depthwise, written_down

_SIZES = ("num_heads", "head_dim", "n_groups", "ssm_state_size", "intermediate_size", "conv_dim")
_BY_HEAD = ("A_log", "D", "dt_bias")


@dataclass(frozen=True)
class Mixer:
    """One mixer.

    Attributes:
        name: Its name.
        module: The module.
        num_heads: Its heads.
        num_groups: How many groups of heads have B and C of their own.
        head_dim: Channels of a head.
        num_states: Entries of B, and of C, of a group.
    """

    name: str
    module: nn.Module
    num_heads: int
    num_groups: int
    head_dim: int
    num_states: int

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_dim

    @property
    def projected(self) -> int:
        """Outputs of the first projection."""
        return 2 * self.width + 2 * self.num_groups * self.num_states + self.num_heads


def mixer_of(name: str, module: nn.Module) -> Mixer | None:
    """The mixer that a module is; None where it is none."""
    sizes = [vars(module).get(size) for size in _SIZES]
    if not all(type(size) is int for size in sizes):
        return None
    heads, dim, groups, states, width, convolved = sizes  # type: ignore[misc]
    found = Mixer(name, module, heads, groups, dim, states)  # type: ignore[arg-type]
    first, last, conv = (module._modules.get(child) for child in ("in_proj", "out_proj", "conv1d"))
    if not (isinstance(first, nn.Linear) and isinstance(last, nn.Linear) and is_depthwise(conv)):  # type: ignore[arg-type]
        return None
    fits = width == found.width == last.in_features and first.out_features == found.projected
    fits = fits and convolved == conv.out_channels == width + 2 * groups * states and not heads % groups  # type: ignore[union-attr, operator]
    by_head = [module._parameters.get(key) for key in _BY_HEAD]
    return found if fits and all(p is not None and p.shape == (heads,) for p in by_head) else None


def find_mixers(model: nn.Module, *, ignored_layers: Iterable[nn.Module] = ()) -> ChannelStructure:
    """The heads of all state-space mixers as groups; what hangs together is read off the mixer's sizes."""
    ignored = {module for layer in ignored_layers for module in layer.modules()}
    groups, left_whole = [], {}
    for name, module in model.named_modules():
        mixer = mixer_of(name, module)
        if mixer is None:
            continue
        if ignored.isdisjoint((module, module.get_submodule("in_proj"), module.get_submodule("conv1d"))):
            if mixer.num_heads > mixer.num_groups:
                groups.append(_group(mixer))
                continue
            reason = f"its heads stay whole: each of its {mixer.num_groups} groups has one"
        else:
            reason = "ignored_layers"
        left_whole |= {f"{name}.in_proj": reason, f"{name}.conv1d": reason}
    return ChannelStructure(tuple(groups), left_whole)


def _group(mixer: Mixer) -> ChannelGroup:
    members, dim = list(_members(mixer)), mixer.head_dim
    each = mixer.num_heads // mixer.num_groups
    heads = [tuple(range(unit, mixer.num_heads, each)) for unit in range(each)]
    return ChannelGroup(
        name=mixer.name,
        group=written_down([m for m in members if isinstance(m.layer, nn.Module)], mixer.width),
        units=tuple(tuple(head * dim + inside for head in unit for inside in range(dim)) for unit in heads),
        members=tuple(members),
        attention=(mixer.name,),
        attributes=tuple(_attributes(mixer)),
        heads_per_unit=mixer.num_groups,
        heads=tuple(heads),
    )


def _attributes(mixer: Mixer) -> Iterator[tuple[nn.Module, str, int]]:
    """Numbers on modules, and how much of each leaves with a unit."""
    channels = mixer.num_groups * mixer.head_dim
    yield from ((mixer.module, key, channels) for key in ("intermediate_size", "conv_dim"))
    yield mixer.module, "num_heads", mixer.num_groups
    norm = mixer.module._modules.get("norm")
    if norm is not None and vars(norm).get("group_size") == mixer.width // mixer.num_groups:
        yield norm, "group_size", mixer.head_dim


def _members(mixer: Mixer) -> Iterator[Member]:
    """What has entries by head, the projection behind the heads first."""
    width, dim = mixer.width, mixer.head_dim
    channels = {channel: [channel] for channel in range(width)}
    heads = {head * dim: [head] for head in range(mixer.num_heads)}
    steps = mixer.projected - mixer.num_heads
    projected = {
        channel: [channel, width + channel] + [steps + head for head in heads.get(channel, ())]
        for channel in range(width)
    }
    module, name = mixer.module, mixer.name
    last, conv, first = (module.get_submodule(child) for child in ("out_proj", "conv1d", "in_proj"))
    linear, depthwise = function.PrunerBox[ops.OPTYPE.LINEAR], function.PrunerBox[ops.OPTYPE.DEPTHWISE_CONV]
    yield _layer(f"{name}.out_proj", last, "in", linear.prune_in_channels, width, channels)
    yield _layer(f"{name}.conv1d", conv, "out", depthwise.prune_out_channels, conv.out_channels, channels)  # type: ignore[arg-type]
    yield _layer(f"{name}.in_proj", first, "out", linear.prune_out_channels, mixer.projected, projected)
    for path, inside in (("", module), ("norm.", module._modules.get("norm"))):
        for key, tensor in (*inside._parameters.items(), *inside._buffers.items()) if inside is not None else ():
            sizes = tuple(tensor.shape) if tensor is not None else ()
            for size, positions in ((mixer.projected, projected), (width, channels), (mixer.num_heads, heads)):
                if [s for s in sizes if s > 1] == [size]:
                    yield _tensor(f"{name}.{path}{key}", tensor, sizes.index(size), positions)
                    break


def _layer(name: str, layer: nn.Module, side: str, cut: Any, size: int, positions: dict[int, list[int]]) -> Member:
    node = Node(layer, None, name)  # type: ignore[arg-type]
    return Member((name, side), Dependency(cut, cut, node, node), size, Positions.by_root(positions))


def _tensor(name: str, tensor: Any, dim: int, positions: dict[int, list[int]]) -> Member:
    assert isinstance(tensor, Tensor), "it has sizes"
    node, cut = Node(tensor, None, name), function.prune_parameter_out_channels  # type: ignore[arg-type]
    node.pruning_dim, node.type = dim, ops.OPTYPE.PARAMETER
    return Member((name, "out"), Dependency(cut, cut, node, node), tensor.shape[dim], Positions.by_root(positions))
