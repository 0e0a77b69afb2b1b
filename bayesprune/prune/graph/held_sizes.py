"""Sizes that modules keep as numbers and split, reshape or compare by: they follow the channels that they count."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from bayesprune.prune.graph.heads import COUNTS
from bayesprune.prune.graph.structure import ChannelGroup
from bayesprune.prune.graph.trials import is_right, missed

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
