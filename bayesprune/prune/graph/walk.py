"""Which positions of which layers leave with the channels of one layer, by torch-pruning's dependency graph.

torch-pruning's own walk goes on from a position as often as it is reached, by lists of positions that are not equal,
which takes exponential time in some graphs and does not end in others. Here a walk goes on from a position once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import Dependency, Group
from torch_pruning.pruner import function

from bayesprune.prune.graph.cuts import axis_size, is_depthwise
from bayesprune.prune.graph.mapping import Graph

_Key = tuple[Any, Callable[..., Any]]


@dataclass(frozen=True)
class Reached:
    """What a walk found.

    Attributes:
        group: As torch-pruning's `get_pruning_group` gives it; a position reached from several root channels is under
            one of them.
        linked: Pairs of root channels that reach one position, as the two halves of a gated linear unit do: neither
            leaves without the other.
    """

    group: Group
    linked: list[tuple[int, int]]


def walk(graph: Graph, root: nn.Module, *, bound: int) -> Reached:
    """All that leaves with the output channels of a layer; time is linear in what it finds.

    Where the graph gives a layer positions that it has not, they are in the group, and the walk ends there.

    Args:
        graph: Of the model.
        root: A layer in it.
        bound: Positions of an operation end there, see `largest_axis`.
    """
    pruner: Any = graph.get_pruner_of_module(root)
    cut = function.prune_depthwise_conv_out_channels if is_depthwise(root) else pruner.prune_out_channels
    node = graph.module2node[root]
    start = Dependency(cut, cut, source=node, target=node)
    channels = range(pruner.get_out_channels(root))
    indices = [_HybridIndex(idx=channel, root_idx=channel) for channel in channels]
    owners: dict[_Key, dict[int, int | None]] = {(node, cut): {channel: channel for channel in channels}}
    dependencies, sizes = {(node, cut): start}, {(node, cut): len(channels)}
    linked: dict[tuple[int, int], None] = {}
    pending = [(start, indices)]
    while pending:
        dependency, indices = pending.pop()
        for following in dependency.target.dependencies:
            if not following.is_triggered_by(dependency.handler):
                continue
            mapped = indices
            for mapping in following.index_mapping:
                mapped = mapped if mapping is None else mapping(mapped)  # type: ignore[misc]
            if not mapped:
                continue
            if following.target in graph.even_parts:  # what leaves one part leaves all
                part, whole = graph.even_parts[following.target]
                mapped = [
                    _HybridIndex(idx=place, root_idx=index.root_idx)
                    for index in mapped
                    for place in range(index.idx % part, whole, part)
                ]
            key = (following.target, following.handler)
            if key not in owners:
                owners[key], dependencies[key] = {}, following
                size = axis_size(graph, following)
                sizes[key] = bound if size is None else size
            owner, size = owners[key], sizes[key]
            fresh = []
            for index in mapped:
                if index.idx not in owner:
                    owner[index.idx] = index.root_idx
                    if index.idx < size:
                        fresh.append(index)
                elif (other := owner[index.idx]) != index.root_idx and None not in (other, index.root_idx):
                    linked[index.root_idx, other] = None  # type: ignore[index]
            if fresh:
                pending.append((following, fresh))
    return Reached(_as_group(graph, dependencies, owners), list(linked))


def largest_axis(graph: Graph) -> int:
    """What no axis of channels of the traced model is longer than: the most that a layer or a concatenation has."""
    nodes = graph.module2node.values()
    sizes = [size or 0 for node in nodes for size in (graph.get_out_channels(node), graph.get_in_channels(node))]
    return max([0, *sizes, *(sum(_parts(node.module)) for node in nodes)])


def _parts(operation: Any) -> list[int]:
    parts = getattr(operation, "concat_sizes", None) or getattr(operation, "split_sizes", None) or []
    return [part for part in parts if part is not None]


def _as_group(graph: Graph, dependencies: dict[_Key, Dependency], owners: dict[_Key, dict[int, int | None]]) -> Group:
    group: Any = Group()
    group._DG = graph
    for key, dependency in dependencies.items():
        group.add_dep(dependency, list(owners[key]))
        group[-1].root_idxs = list(owners[key].values())
    return group
