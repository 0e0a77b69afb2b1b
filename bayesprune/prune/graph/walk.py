"""Which positions of which layers leave with the channels of one layer, by torch-pruning's dependency graph.

torch-pruning's own walk goes on from a position as often as it is reached, by lists of positions that are not equal,
which takes exponential time in some graphs and does not end in others. Here a walk goes on from a position once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch_pruning.dependency import Dependency, Group
from torch_pruning.pruner import function

from bayesprune.prune.graph.group import axis_size, is_depthwise
from bayesprune.prune.graph.internals import HybridIndex
from bayesprune.prune.graph.mapping import Graph

_NOBODY, _UNKNOWN = -2, -1  # in place of a root channel


@dataclass(frozen=True)
class Reached:
    """The result of a walk.

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
    channels = np.arange(pruner.get_out_channels(root))
    axes = {(node, cut): _Axis(start, len(channels))}
    pending = [(start, axes[node, cut].fresh(channels, channels))]
    linked: dict[tuple[int, int], None] = {}
    while pending:
        dependency, (idxs, roots) = pending.pop()
        for following in dependency.target.dependencies:
            if not following.is_triggered_by(dependency.handler):
                continue
            mapped, of = _mapped(following, idxs, roots)
            if not len(mapped):
                continue
            if following.target in graph.even_parts:  # what leaves one part leaves all
                part, whole = graph.even_parts[following.target]
                places = np.arange(0, whole, part)
                mapped, of = (mapped[:, None] % part + places).ravel(), of.repeat(len(places))
            key = (following.target, following.handler)
            if key not in axes:
                size = axis_size(graph, following)
                axes[key] = _Axis(following, bound if size is None else size)
            found = axes[key].fresh(mapped, of, linked)
            if len(found[0]):
                pending.append((following, found))
    return Reached(_as_group(graph, axes.values()), list(linked))


class _Axis:
    """One axis that a walk came to: which positions it reached, in their order, and from which root channels."""

    def __init__(self, dependency: Dependency, size: int) -> None:
        self.dependency, self.size = dependency, size
        self.owners = np.full(size, _NOBODY)
        self.reached: list[np.ndarray] = []

    def fresh(
        self, idxs: np.ndarray, roots: np.ndarray, linked: dict[tuple[int, int], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The positions that nobody reached before, and their root channels; two that meet at one are linked."""
        if idxs.min() < 0:
            raise ValueError(f"position {idxs.min()} of {self.size}")
        if idxs.max() >= len(self.owners):
            missing = idxs.max() + 1 - len(self.owners)
            self.owners = np.append(self.owners, np.full(missing, _NOBODY))
        is_first = np.zeros(len(idxs), dtype=bool)
        is_first[np.unique(idxs, return_index=True)[1]] = True
        is_first &= self.owners[idxs] == _NOBODY
        self.owners[idxs[is_first]] = roots[is_first]
        self.reached.append(idxs[is_first])
        owners = self.owners[idxs]
        meets = (owners != roots) & (owners != _UNKNOWN) & (roots != _UNKNOWN)
        if linked is not None and meets.any():
            linked.update(dict.fromkeys(zip(roots[meets].tolist(), owners[meets].tolist(), strict=True)))
        goes_on = is_first & (idxs < self.size)
        return idxs[goes_on], roots[goes_on]


def _mapped(dependency: Dependency, idxs: np.ndarray, roots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where positions are behind the mappings of an edge, with the root channels that they came from."""
    mappings = [mapping for mapping in dependency.index_mapping if mapping is not None]
    if not mappings:
        return idxs, roots
    named = zip(idxs.tolist(), roots.tolist(), strict=True)
    indices = [HybridIndex(idx=idx, root_idx=None if root == _UNKNOWN else root) for idx, root in named]
    for mapping in mappings:
        indices = mapping(indices)  # type: ignore[misc]
    found = [(index.idx, _UNKNOWN if index.root_idx is None else index.root_idx) for index in indices]
    return tuple(np.array(found, dtype=np.int64).reshape(-1, 2).T)  # type: ignore[return-value]


def largest_axis(graph: Graph) -> int:
    """An upper bound of the channels along an axis: the most that a layer or a concatenation of the model has."""
    nodes = graph.module2node.values()
    sizes = [size or 0 for node in nodes for size in (graph.get_out_channels(node), graph.get_in_channels(node))]
    return max([0, *sizes, *(sum(_parts(node.module)) for node in nodes)])


def _parts(operation: Any) -> list[int]:
    parts = getattr(operation, "concat_sizes", None) or getattr(operation, "split_sizes", None) or []
    return [part for part in parts if part is not None]


def _as_group(graph: Graph, axes: Iterable[_Axis]) -> Group:
    group: Any = Group()
    group._DG = graph
    for axis in axes:
        idxs = np.concatenate(axis.reached)
        group.add_dep(axis.dependency, idxs.tolist())
        group[-1].root_idxs = [None if root == _UNKNOWN else root for root in axis.owners[idxs].tolist()]
    return group
