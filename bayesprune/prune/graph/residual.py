"""Residual streams, and what leaves with their width: heads of attention, and sizes that modules keep as numbers.

DaViT, NesT, Twins and the Swin transformers of torchvision reshape by `C // num_heads`, with C the width of what they
read, so neither a head nor channels of the stream leave alone. What leaves is a head of every attention module on one
stream, with as many channels of the stream.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch_pruning as tp
from torch import nn
from torch_pruning.dependency import Group, Node

from bayesprune.prune.graph.attention import Attention, find_attention
from bayesprune.prune.graph.group import ChannelGroup, ChannelStructure, Member, is_depthwise
from bayesprune.prune.graph.heads import COUNTS, HEADS_STAY, in_every_layout
from bayesprune.prune.graph.internals import ElementwiseOperation
from bayesprune.prune.graph.observe import Observed
from bayesprune.prune.graph.prunable_layers import is_root
from bayesprune.prune.graph.trials import is_right, missed


class Streams:
    """The streams of one graph; what it asks of the graph as a whole it asks once."""

    def __init__(self, graph: tp.DependencyGraph) -> None:
        self.nodes: dict[Any, Node] = graph.module2node
        self._place = _order(self.nodes.values())
        self._before_sums: set[Node] = set()
        pending = [node for node in self.nodes.values() if _is_sum(node)]
        while pending:
            for before in pending.pop().inputs:
                if before not in self._before_sums:
                    self._before_sums.add(before)
                    pending.append(before)

    def is_width(self, group: ChannelGroup) -> bool:
        """Whether a group is hidden width: a stream that what reads it writes to again, or no part of a block."""
        writers = {m.layer for m in group.members if m.axis[1] == "out" and is_root(m.layer)}
        writers = {layer for layer in writers if not is_depthwise(layer)}
        readers = [self.nodes[m.layer] for m in group.members if m.axis[1] == "in"]
        if len(writers) > 1 and self._reach(readers, writers):
            return True
        return self._before_sums.isdisjoint(readers)

    def _reach(self, readers: Iterable[Node], writers: set[Any]) -> bool:
        """Whether what is computed from the readers gets to a writer; nothing behind the last writer is looked at."""
        last = max(self._place.get(self.nodes[layer], math.inf) for layer in writers)
        pending, seen = list(readers), set()
        while pending:
            for node in pending.pop().outputs:
                if node.module in writers:
                    return True
                if node not in seen and self._place.get(node, 0) <= last:
                    seen.add(node)
                    pending.append(node)
        return False


def _is_sum(node: Node) -> bool:
    is_sum = isinstance(node.module, ElementwiseOperation) and "Add" in str(node.module._grad_fn)
    return is_sum and len(node.inputs) > 1


def _order(nodes: Iterable[Node]) -> dict[Node, int]:
    """Numbers such that inputs come before outputs; modules called in a circle, and what follows them, have none."""
    missing = {node: len(node.inputs) for node in nodes}
    ready = [node for node, count in missing.items() if not count]
    place: dict[Node, int] = {}
    while ready:
        node = ready.pop()
        place[node] = len(place)
        for behind in node.outputs:
            missing[behind] -= 1
            if not missing[behind]:
                ready.append(behind)
    return place


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


_LEVELS = 3  # above a layer, up to the module that may know how many channels it has

_Attribute = tuple[nn.Module, str, int]


def with_sizes(model: nn.Module, example_inputs: Any, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """The groups; those without whose units the model does not run take along the numbers with which it does.

    Args:
        model: As it is; it is as before afterwards.
        example_inputs: Of the model.
        groups: Of channels.
    """
    held = {group: list(_held(model, group)) for group in groups}
    claimed = {(module, name) for group in groups for module, name, _ in group.attributes}
    found: dict[ChannelGroup, ChannelGroup] = {}
    for group in missed(model, [group for group in groups if held[group]], example_inputs):
        free = [attribute for attribute in held[group] if attribute[:2] not in claimed]
        trials = (free, _of_the_parents(model, group, free), *([attribute] for attribute in free))
        follow = next((some for some in trials if some and _right(model, group, some, example_inputs)), [])
        for attribute in follow if len(follow) > 1 else ():  # those that are used for something else, or for nothing
            fewer = [other for other in follow if other is not attribute]
            follow = fewer if _right(model, group, fewer, example_inputs) else follow
        found[group] = _with(group, follow)
        claimed |= {attribute[:2] for attribute in follow}
    return [found.get(group, group) for group in groups]


def _with(group: ChannelGroup, attributes: Iterable[_Attribute]) -> ChannelGroup:
    return replace(group, attributes=(*group.attributes, *attributes))


def _right(model: nn.Module, group: ChannelGroup, attributes: Sequence[_Attribute], example_inputs: Any) -> bool:
    larger = _with(group, attributes)
    return not missed(model, [larger], example_inputs) and is_right(model, larger, example_inputs)


def _held(model: nn.Module, group: ChannelGroup) -> Iterator[_Attribute]:
    """Numbers on the modules around a group's layers that are the size of one of its axes."""
    sizes: dict[int, int | None] = {}
    for member in group.members:
        each = group.positions_per_unit(member)
        if member.positions.num_places == member.size:
            sizes[member.size] = each if sizes.get(member.size, each) == each else None
    paths = {path: None for member in group.members for path in _above(member.axis[0], _LEVELS)}
    for module in (model.get_submodule(path) for path in paths):
        for name, value in vars(module).items():
            if type(value) is int and name not in COUNTS and (each := sizes.get(value)):
                yield module, name, each


def _above(name: str, levels: int) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[:-level]) for level in range(1, min(levels, len(parts) - 1) + 1))


def _of_the_parents(model: nn.Module, group: ChannelGroup, attributes: Iterable[_Attribute]) -> list[_Attribute]:
    parents = {path for member in group.members for path in _above(member.axis[0], 1)}
    modules = {model.get_submodule(path) for path in parents}
    return [attribute for attribute in attributes if attribute[0] in modules]
