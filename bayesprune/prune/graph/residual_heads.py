"""Heads that leave with the width, as where a forward takes the size of a head for the width over the number of heads.

DaViT, NesT, Twins and the Swin transformers of torchvision reshape by `C // num_heads`, with C the width of what they
read, so neither a head nor channels of the stream leave alone. What leaves is a head of every attention module on one
stream, with as many channels of the stream.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch_pruning.dependency import Group

from bayesprune.prune.graph.attention import Attention, find_attention
from bayesprune.prune.graph.cuts import Member
from bayesprune.prune.graph.heads import HEADS_STAY, in_every_layout
from bayesprune.prune.graph.observe import Observed
from bayesprune.prune.graph.roots import is_root
from bayesprune.prune.graph.structure import ChannelGroup, ChannelStructure
from bayesprune.prune.graph.trials import is_right, missed


def attention_left(observed: Observed, heads: ChannelStructure, ignored_layers: Iterable[nn.Module]) -> list[Attention]:
    """The attention modules whose heads were not found to leave by themselves."""
    solved = {name for group in heads.groups for name in group.attention}
    if not any(reason.startswith(HEADS_STAY) for reason in heads.left_whole.values()):
        return []
    return [a for a in find_attention(observed, ignored_layers)[0] if a.name not in solved]


def with_heads(
    model: nn.Module,
    example_inputs: Any,
    groups: Iterable[ChannelGroup],
    attention: Sequence[Attention],
    members_of: Callable[[nn.Module], list[Member]],
) -> list[ChannelGroup]:
    """The groups, with those in place of streams that the model does not run without by single channels.

    Args:
        model: As it is; it is as before afterwards.
        example_inputs: Of the model.
        groups: Of channels.
        attention: Modules whose heads do not leave by themselves.
        members_of: All that leaves with the outputs of a layer.
    """
    if not attention:
        return list(groups)
    return [_with_heads(model, example_inputs, group, attention, members_of) or group for group in groups]


def _with_heads(
    model: nn.Module,
    example_inputs: Any,
    stream: ChannelGroup,
    attention: Sequence[Attention],
    members_of: Callable[[nn.Module], list[Member]],
) -> ChannelGroup | None:
    names = {module: name for name, module in model.named_modules()}
    written = {member.axis[0] for member in stream.members if member.axis[1] == "out"}
    width = stream.num_channels
    place = [a for a in attention if names[a.behind] in written and a.num_heads * a.head_dim == width]
    if not place or stream.unit_size > 1 or len({a.num_units for a in place}) > 1:
        return None
    if not missed(model, [stream], example_inputs):
        return None
    for heads in in_every_layout(model, place):
        members = {member.axis: member for member in (*stream.members, *heads.members)}
        for a in place:
            members |= {member.axis: member for member in _inside(a, names, members, width, members_of)}
        group = replace(
            heads,
            name=stream.name,
            group=_joined([stream.group, heads.group]),
            members=tuple(members.values()),
        )
        if is_right(model, group, example_inputs):
            return group
    return None


def _inside(
    attention: Attention,
    names: dict[nn.Module, str],
    known: Iterable[Any],
    width: int,
    members_of: Callable[[nn.Module], list[Member]],
) -> Iterator[Member]:
    """What makes or reads as many channels inside attention, as a convolution over its keys."""
    for layer in attention.module.modules():
        if is_root(layer) and (names[layer], "out") not in known:
            found = members_of(layer)
            if found and all(set(member.positions) == set(range(width)) for member in found):
                yield from found


def _joined(parts: Iterable[Group]) -> Group:
    joined: Any = Group()
    for item in (item for part in parts for item in part):
        joined.add_dep(item.dep, item.idxs)
        joined[-1].root_idxs = item.root_idxs
    return joined
