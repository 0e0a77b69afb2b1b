"""Which operands of an operation carry its channels, by the shapes that autograd remembers.

torch-pruning takes every operation between layers for elementwise and ties the channels of all that goes in and comes
out. A map of one channel that multiplies a stream, or a sum over the channels, ties nothing.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch_pruning as tp
from torch import nn
from torch_pruning.dependency import Group, Node

from bayesprune.prune.graph.internals import ElementwiseOperation, infer_out_channels_recursively
from bayesprune.prune.graph.mapping import signed

# Operations in which a buffer of one number for each channel may meet the channels.
_BY_CHANNEL = ("Add", "Sub", "Rsub", "Mul", "Div", "Addcmul", "Addcdiv", "Lerp", "Pow", "Where")

# Operations that change which channels there are, by the start of autograd's names for them.
_MOVING = ("Slice", "Index", "Select", "Gather", "ConstantPad", "Pad", "Repeat", "Roll", "Flip", "Unfold", "Stack")
_MOVING = (*_MOVING, "View", "UnsafeView", "Reshape", "Expand", "AsStrided", "PixelShuffle", "ChannelShuffle", "Topk")


def moving(group: Group) -> str:
    """The operations in a group that may move, select or count channels, as words for a reason."""
    names = (item.dep.target.grad_fn.name() for item in group if hasattr(item.dep.target.grad_fn, "name"))
    found = dict.fromkeys(name.partition("Backward")[0] for name in names if name.startswith(_MOVING))
    return " or ".join(found) or "an operation"


def unlink(graph: tp.DependencyGraph, buffers: Collection[nn.Parameter]) -> None:
    """Removes links between nodes that share no channels, in place.

    Args:
        graph: Of torch-pruning, built.
        buffers: Nodes that stand for buffers; those that meet channels otherwise than by channel are taken out.
    """
    node_of = {node.grad_fn: node for node in graph.module2node.values()}
    for node in list(graph.module2node.values()):
        if isinstance(node.module, ElementwiseOperation):
            for before in [*_broadcast(graph, node, node_of), *_summed_over(graph, node, node_of)]:
                _separate(before, node)
    made_of_buffers = {graph.module2node[b] for b in buffers if b in graph.module2node}
    pending = list(made_of_buffers)
    while pending:
        node = pending.pop()
        for behind in dict.fromkeys(node.outputs):
            if behind not in made_of_buffers and made_of_buffers.issuperset(behind.inputs):
                made_of_buffers.add(behind)
                pending.append(behind)
    for node in made_of_buffers:
        for behind in dict.fromkeys(node.outputs):
            if behind not in made_of_buffers and not behind.grad_fn.name().startswith(_BY_CHANNEL):
                _separate(node, behind)


def _broadcast(graph: tp.DependencyGraph, node: Node, node_of: dict[Any, Node]) -> Iterator[Node]:
    """Inputs that have one entry for all channels of the output."""
    out = _shape(node.grad_fn, 0)
    inputs = list(_inputs(node, node_of))
    if out is None or all(shape == out for _, shape in inputs):
        return
    channels = {before: infer_out_channels_recursively(graph, before, [0]) for before, _ in inputs}
    most = max([count or 1 for count in channels.values()])
    places = [dim for dim, size in enumerate(out) if size == most]
    for before, shape in inputs if most > 1 else ():
        if shape is None or len(shape) > len(out):
            continue
        aligned = (1,) * (len(out) - len(shape)) + tuple(shape)
        fits = all(size in (1, whole) for size, whole in zip(aligned, out, strict=True))  # a transpose does not
        apart = channels[before] == 1 or (fits and places and all(aligned[dim] == 1 for dim in places))
        if apart and aligned != tuple(out):
            yield before


def _summed_over(graph: tp.DependencyGraph, node: Node, node_of: dict[Any, Node]) -> Iterator[Node]:
    """Inputs whose channels a sum, mean or maximum runs over."""
    dims, out = _saved_dims(node.grad_fn), _shape(node.grad_fn, 0)
    if dims is None or out is None:
        return
    for before, shape in _inputs(node, node_of):
        if shape is None:
            continue
        over = {signed(dim, len(shape)) for dim in dims} or set(range(len(shape)))
        left = [size for dim, size in enumerate(shape) if dim not in over]
        if [size for size in out if size != 1] != [size for size in left if size != 1]:
            continue  # it keeps this dimension, as a softmax does
        channels = infer_out_channels_recursively(graph, before, [0])
        places = {dim for dim, size in enumerate(shape) if size == channels}
        if places and places <= over:
            yield before


def _saved_dims(grad_fn: Any) -> tuple[int, ...] | None:
    dims = getattr(grad_fn, "_saved_dim", None)
    return dims if dims is None or isinstance(dims, tuple) else (dims,)


def _inputs(node: Node, node_of: dict[Any, Node]) -> Iterator[tuple[Node, Any]]:
    """The nodes before an operation, with the shape of what it takes from each."""
    for before, number in node.grad_fn.next_functions:
        if before in node_of:
            yield node_of[before], _shape(before, number)


def _shape(grad_fn: Any, number: int) -> Any:
    if hasattr(grad_fn, "variable"):
        return tuple(grad_fn.variable.shape)
    metadata = getattr(grad_fn, "_input_metadata", None)
    return tuple(metadata[number].shape) if metadata else None


def _separate(one: Node, other: Node) -> None:
    one.dependencies = [dependency for dependency in one.dependencies if dependency.target is not other]
    other.dependencies = [dependency for dependency in other.dependencies if dependency.target is not one]
