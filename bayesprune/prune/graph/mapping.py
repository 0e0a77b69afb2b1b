"""Which channels go where when tensors are split, concatenated or reshaped, by the sizes that autograd remembers.

torch-pruning guesses sizes from the layers around and takes the parts of a split in the order in which it comes across
them. It follows no split or concatenation at all behind a class token or a position embedding, and takes a reshape for
a flatten where it guesses other numbers of channels before and behind it.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch_pruning as tp
from torch_pruning import ops
from torch_pruning.dependency import Dependency, Node

from bayesprune.prune.graph.internals import (
    ConcatMapping,
    FlattenMapping,
    HybridIndex,
    SliceMapping,
    SplitMapping,
    infer_in_channels_recursively,
    infer_out_channels_recursively,
    update_expand_index_mapping,
    update_reshape_index_mapping,
    update_unbind_index_mapping,
)

_Part = tuple[int, int]

_KINDS = ("CONCAT", "SPLIT", "RESHAPE", "UNBIND", "EXPAND", "SLICE")
_RESHAPING = frozenset(getattr(ops.OPTYPE, kind) for kind in _KINDS)
_GUESSES: dict[Any, Callable[[Any, Any], None]] = {
    ops.OPTYPE.RESHAPE: update_reshape_index_mapping,
    ops.OPTYPE.UNBIND: update_unbind_index_mapping,
    ops.OPTYPE.EXPAND: update_expand_index_mapping,
}


class Graph(tp.DependencyGraph):
    """torch-pruning's graph; `map_parts` has to be called once it is built.

    Attributes:
        even_parts: Sizes of a part and of the whole, of splits into equal parts, as `chunk` makes them after a cut too.
    """

    even_parts: dict[Node, tuple[int, int]]

    def _build_dependency(self, module2node: dict[Any, Node]) -> None:
        super()._build_dependency(module2node)
        self.even_parts = {}
        self.types = {node: node.type for node in module2node.values() if node.type in _RESHAPING}
        for node in self.types:
            node.type = ops.OPTYPE.ELEMENTWISE  # no guesses: some fail, some take long


def map_parts(graph: Graph) -> None:
    """Says, in place, which channels go where at the splits, concatenations and reshapes of a graph."""
    node: Any
    for node, kind in graph.types.items():
        if kind in (ops.OPTYPE.CONCAT, ops.OPTYPE.SPLIT) and not hasattr(node.grad_fn, "_saved_dim"):
            continue  # a function of the model's own
        node.type = kind
        if kind == ops.OPTYPE.CONCAT:
            node.module.concat_sizes = [size for _, size in _concatenated(node) or ()] or [0] * len(node.inputs)
        elif kind == ops.OPTYPE.SPLIT:
            node.module.split_sizes = _split_sizes(node)
    for node in graph.types:
        if (guess := _GUESSES.get(node.type)) is not None:
            with suppress(ArithmeticError, LookupError, TypeError):  # a guess that fails is none
                guess(graph, node)
    for node in graph.types:
        if node.type == ops.OPTYPE.SPLIT:
            _map_split(graph, node)
        elif node.type == ops.OPTYPE.CONCAT:
            _map_concatenation(graph, node)
        elif node.type == ops.OPTYPE.RESHAPE:
            _map_reshape(graph, node)
        elif node.type == ops.OPTYPE.SLICE:
            _map_slice(graph, node)


def signed(dim: int, num_dims: int) -> int:
    """A dimension that autograd saved, mostly without its sign, counted from 0."""
    return (dim - 2**64 if dim >= num_dims else dim) % num_dims


@dataclass(frozen=True)
class _Paths:
    """Channels of several paths or positions, one behind the other: each has a channel where the others have one.

    Attributes:
        size: Channels of a path.
        num_paths: How many there are.
        reverse: Whether it leads to the channels of all paths.
    """

    size: int
    num_paths: int
    reverse: bool = False

    def __call__(self, indices: list[Any]) -> list[Any]:
        if not self.reverse:
            return list(dict.fromkeys(HybridIndex(i.idx % self.size, i.root_idx) for i in indices))
        starts = range(0, self.size * self.num_paths, self.size)
        return [HybridIndex(i.idx + start, i.root_idx) for i in indices for start in starts]


def _map_reshape(graph: tp.DependencyGraph, node: Node) -> None:
    grad_fn: Any = node.grad_fn
    before, number = grad_fn.next_functions[0]
    found, given = getattr(grad_fn, "_input_metadata", None), getattr(before, "_input_metadata", None)
    if not found or not given:
        return
    new, old = found[0].shape, given[number].shape
    around = [*node.inputs, *node.outputs]
    pairs = [pair for other in around for pair in ((node, other), (other, node))]
    edges = [(source, d) for source, target in pairs for d in source.dependencies if d.target is target]
    flattened = [d for _, d in edges if isinstance(d.index_mapping[0], FlattenMapping)]
    if _is_cut_into_paths(graph, node, old, new):
        for dependency in flattened:
            _set(dependency, 0, None)
        for source, dependency in edges:
            if (dependency.target if source is node else source) in node.inputs:
                _set(dependency, 0, _Paths(new[2], new[1], reverse=source is node))
    elif (times := _side_by_side(graph, node, old, new)) > 1:
        for dependency in flattened:
            _set(dependency, 0, None)
        for source, dependency in edges:
            if (dependency.target if source is node else source) in node.inputs:
                _set(dependency, 0, _Paths(old[-1], times, reverse=source is not node))
    elif min(len(new), len(old)) > 1 and (new[-1] == old[-1] or new[1] == old[1]):  # the channels stay what they were
        for dependency in flattened:
            _set(dependency, 0, None)
    elif not flattened and len(old) > 2 and tuple(new) == (old[0], prod(old[1:])):  # there is no guess behind an index
        channels = next((infer_out_channels_recursively(graph, n, [0]) for n in node.inputs), None)
        if channels not in (None, old[1]):
            return
        stride = prod(old[2:])
        for source, dependency in edges:
            other = dependency.target if source is node else source
            if other in node.inputs:
                _set(dependency, 0, FlattenMapping(stride, reverse=source is node))


def _is_cut_into_paths(graph: tp.DependencyGraph, node: Node, old: Any, new: Any) -> bool:
    """Whether (N, paths * C, ...) becomes (N, paths, C, ...), and what follows has C channels, as selective kernels."""
    if len(old) < 3 or len(new) != len(old) + 1 or new[1] == 1 or new[2] == 1:
        return False
    if (old[0], old[1], *old[2:]) != (new[0], new[1] * new[2], *new[3:]):
        return False
    before = next((infer_out_channels_recursively(graph, n, [0]) for n in node.inputs), None)
    return before == old[1] and infer_in_channels_recursively(graph, node, [0]) == new[2]


def _side_by_side(graph: tp.DependencyGraph, node: Node, old: Any, new: Any) -> int:
    """How many positions with the channels last (..., C) become one (...): as patches are merged, or maps flattened."""
    before = next((infer_out_channels_recursively(graph, n, [0]) for n in node.inputs), None)
    if before != old[-1] or len(new) >= len(old) or tuple(new[:-1]) != tuple(old[: len(new) - 1]):
        return 1
    return new[-1] // old[-1] if infer_in_channels_recursively(graph, node, [0]) == new[-1] else 1


def _map_split(graph: Graph, node: Node) -> None:
    grad_fn: Any = node.grad_fn
    shape, dim, parts = _split(node)
    channels = next((infer_out_channels_recursively(graph, n, [0]) for n in node.inputs), None)
    if not _counts_channels(shape, dim, channels):
        return
    if len(parts) > 1 and len({end - start for start, end in parts}) == 1:
        graph.even_parts[node] = (parts[0][1], parts[-1][1])
    for behind in dict.fromkeys(node.outputs):
        numbers = [number for before, number in behind.grad_fn.next_functions if before is grad_fn]
        forth, back = list(_edges(node, behind, node.outputs)), list(_edges(behind, node, behind.inputs))
        if not len(numbers) == len(forth) == len(back):
            continue  # a module that is called several times
        for number, one, other in zip(numbers, forth, back, strict=True):
            _set(one, 0, SplitMapping(parts[number]))
            _set(other, 0, SplitMapping(parts[number], reverse=True))


def _map_slice(graph: Graph, node: Node) -> None:
    """A slice of rows or columns takes no channels away, whatever dimension they are in."""
    grad_fn: Any = node.grad_fn
    if not hasattr(grad_fn, "_saved_self_sym_sizes"):
        return
    shape = grad_fn._saved_self_sym_sizes
    dim, size = signed(grad_fn._saved_dim, len(shape)), grad_fn._input_metadata[0].shape
    channels = next((infer_out_channels_recursively(graph, n, [0]) for n in node.inputs), None)
    if not _counts_channels(shape, dim, channels):
        return
    start, step = signed(grad_fn._saved_start, shape[dim]), grad_fn._saved_step
    end = start + size[dim] * step
    for before in node.inputs:
        for source, target in ((before, node), (node, before)):
            for dependency in source.dependencies:
                if dependency.target is target:
                    _set(dependency, 0, SliceMapping(dim, start, step, end, reverse=source is node))


def _split(node: Node) -> tuple[Any, int, list[_Part]]:
    """The shape of what is split, along which dimension, and start and end of its parts."""
    grad_fn: Any = node.grad_fn
    shape = grad_fn._saved_self_sym_sizes
    dim = signed(grad_fn._saved_dim, len(shape))
    sizes = (part.shape[dim] for part in grad_fn._input_metadata)
    return shape, dim, list(pairwise(accumulate(sizes, initial=0)))


def _split_sizes(node: Node) -> list[int]:
    """The size of the part that each node behind a split reads."""
    _, _, parts = _split(node)
    numbers: dict[Node, Iterator[int]] = {}
    sizes = []
    for behind in node.outputs:
        read = (number for before, number in behind.grad_fn.next_functions if before is node.grad_fn)
        start, end = parts[next(numbers.setdefault(behind, read), 0)]
        sizes.append(end - start)
    return sizes


def _map_concatenation(graph: tp.DependencyGraph, node: Node) -> None:
    grad_fn: Any = node.grad_fn
    found = _concatenated(node) or []
    shape = grad_fn._input_metadata[0].shape
    dim = signed(grad_fn._saved_dim, len(shape))
    is_mapped = _counts_channels(shape, dim, infer_in_channels_recursively(graph, node, [0]))
    places: dict[Node, Iterator[tuple[Dependency, Dependency]]] = {}
    for before, (start, size) in zip(node.inputs, found, strict=False):
        if before not in places:
            places[before] = zip(_edges(before, node, before.outputs), _edges(node, before, node.inputs), strict=True)
        one, other = next(places[before])
        part = (start, start + size)
        _set(one, 1, ConcatMapping(part) if is_mapped else None)
        _set(other, 1, ConcatMapping(part, reverse=True) if is_mapped else None)


def _concatenated(node: Node) -> list[_Part] | None:
    """Start and size of what is put side by side, of those parts that are in the graph; None where they are unknown."""
    grad_fn: Any = node.grad_fn
    result = grad_fn._input_metadata
    dim = signed(grad_fn._saved_dim, len(result[0].shape))
    sizes, known = [], []
    for before, number in grad_fn.next_functions:
        metadata = getattr(before, "_input_metadata", None)
        sizes.append(metadata[number].shape[dim] if metadata else None)
        known.append(before is not None)
    if (missing := sizes.count(None)) > 1:
        return None
    if missing:  # a constant
        sizes[sizes.index(None)] = result[0].shape[dim] - sum(size for size in sizes if size is not None)
    starts = accumulate(sizes, initial=0)  # type: ignore[arg-type]
    found = [part for part, is_known in zip(zip(starts, sizes, strict=False), known, strict=True) if is_known]
    return found if len(found) == len(node.inputs) else None  # type: ignore[return-value]


def _set(dependency: Any, place: int, mapping: Any) -> None:
    dependency.index_mapping[place] = mapping


def _edges(source: Node, target: Node, neighbours: list[Node]) -> Iterator[Dependency]:
    """The dependencies of one node on another that stand for its inputs, or for its outputs."""
    offset = len(source.inputs) if neighbours is source.outputs else 0
    for place, neighbour in enumerate(neighbours):
        if neighbour is target:
            yield source.dependencies[offset + place]


def _counts_channels(shape: Any, dim: int, channels: int | None) -> bool:
    """Whether a dimension is that of the channels, of whose number torch-pruning may have an idea."""
    return dim in (1, len(shape) - 1) if channels is None else shape[dim] == channels
