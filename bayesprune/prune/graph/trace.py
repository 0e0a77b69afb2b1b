"""torch-pruning's dependency graph of a model that was run, made from what the forward left behind.

torch-pruning takes every operation between layers for elementwise and ties the channels of all that goes in and comes
out. A map of one channel that multiplies a stream, or a sum over the channels, ties nothing: `unlink` removes such
links by the shapes that autograd remembers.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Size, Tensor, nn
from torch_pruning.dependency import Group, Node

from bayesprune.foundation.model import eval_mode
from bayesprune.prune.graph.internals import ElementwiseOperation, UnwrappedParameters, infer_out_channels_recursively
from bayesprune.prune.graph.mapping import Graph, map_parts, signed
from bayesprune.prune.graph.prunable_layers import LINEAR_PRUNER, is_linear, is_root, is_unknown_linear, layer_sizes

HEAD_ATTRIBUTES = ("num_heads", "num_attention_heads", "num_key_value_groups", "n_heads", "n_head", "heads")
# What puts tokens elsewhere and leaves their channels alone, where the last dimension has the size that the layer gave.
_MOVING_TOKENS = ("View", "UnsafeView", "Permute", "Roll", "Slice", "Alias")
# What may stand between an attention module's last layer and its output; a reshape means that heads come out.
_PASS_THROUGH = ("Add", "Mul", "Clone", "ToCopy", "NativeBatchNorm", "NativeLayerNorm", "NativeDropout")


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor that a forward made, as far as its history goes; the tensor itself is not kept.

    Attributes:
        grad_fn: The node of autograd's graph that it came from; None where it has no history.
        shape: Its shape.
    """

    grad_fn: Any
    shape: Size


@dataclass(frozen=True)
class Call:
    """The beginning of a linear layer's call, or the end of any module's.

    Attributes:
        module: What is called.
        is_end: Whether the call ends here.
        tensors: What it reads first, at the beginning; what it puts out, at the end.
        is_tensor: Whether it puts out one tensor by itself.
    """

    module: nn.Module
    is_end: bool
    tensors: tuple[Made, ...]
    is_tensor: bool = False


def has_heads(module: nn.Module) -> bool:
    """Whether a module names a number of heads among its attributes."""
    return any(isinstance(getattr(module, name, None), int) for name in HEAD_ATTRIBUTES)


def nodes_before(ends: Iterable[Any], goes_on: Callable[[Any], bool] = lambda node: True) -> Iterator[Any]:
    """These nodes of autograd's graph and all before them, each once; behind a node only where `goes_on` says so."""
    pending, seen = list(ends), set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if goes_on(node):
            pending.extend(following for following, _ in node.next_functions)


def reached(grad_fn: Any, targets: dict[Any, nn.Module], pass_through: tuple[str, ...]) -> list[nn.Module]:
    """The modules whose outputs a tensor is made of by these operations alone."""
    nodes = nodes_before([grad_fn], lambda node: node not in targets and node.name().startswith(pass_through))
    return [targets[node] for node in nodes if node in targets]


def last_layers(output: Made, layer_of: dict[Any, nn.Module], inside: Collection[nn.Module]) -> list[nn.Module]:
    """Layers inside a module whose units are its output's units, as the projection behind the heads."""
    found = [layer for layer in reached(output.grad_fn, layer_of, _PASS_THROUGH) if layer in inside]
    if not found:  # tokens may be put back into rows and columns, while the size of the last dimension stays
        behind = reached(output.grad_fn, layer_of, (*_PASS_THROUGH, *_MOVING_TOKENS))
        linear = [layer for layer in behind if layer in inside and is_linear(layer)]
        found = [layer for layer in linear if layer_sizes(layer)[1] == output.shape[-1]]
    return found


@dataclass(frozen=True)
class Trace:
    """Findings of one forward in evaluation mode.

    Attributes:
        graph: torch-pruning's dependency graph.
        outputs: Layers and operations whose output is an output of the model.
        inside_attention: Layers whose output units are dimensions of attention heads.
        called: Layers with channels of their own making that were called.
        dead_ends: Those of them behind which nothing is seen, though they are no outputs, as where scores are sorted.
        weights: Parameters that the outputs and the dead ends depend on.
        buffers: Names of buffers, by the parameters that stand for them in the graph.
    """

    graph: Graph
    outputs: frozenset[nn.Module]
    inside_attention: frozenset[nn.Module]
    called: frozenset[nn.Module]
    dead_ends: frozenset[nn.Module]
    weights: frozenset[Tensor]
    buffers: dict[nn.Parameter, str]


def trace(model: nn.Module, calls: Iterable[Call], outputs: Iterable[Made], buffers: dict[nn.Parameter, str]) -> Trace:
    """The graph of a forward that has run; the model is as before afterwards.

    Args:
        model: The model.
        calls: Of its modules, in their order.
        outputs: Of the model, those with a history.
        buffers: Names of buffers, by the parameters that stood for them.
    """
    calls = [call for call in calls if call.is_end and call.tensors]
    made = [(call.module, call.tensors[0]) for call in calls if call.is_tensor and is_root(call.module)]
    ends = {output.grad_fn for output in outputs}
    history, dead_ends = set(nodes_before(ends)), {}
    for layer, output in reversed(made):  # the last ones first, behind which nothing is seen
        if output.grad_fn is not None and output.grad_fn not in history:
            dead_ends[output] = layer
            history.update(nodes_before([output.grad_fn]))
    graph = _graph(model, calls, [*outputs, *dead_ends], buffers)
    layer_of = {output.grad_fn: layer for layer, output in made}
    with_heads = {module for module in model.modules() if has_heads(module)}
    inside = {child for module in with_heads for child in module.children() if is_root(child)}
    for module, found in ((call.module, call.tensors) for call in calls if call.module in with_heads):
        inside.difference_update(*(last_layers(output, layer_of, set(module.children())) for output in found))
    return Trace(
        graph=graph,
        outputs=frozenset(node.module for node in graph.module2node.values() if node.grad_fn in ends),
        inside_attention=frozenset(inside),
        called=frozenset(layer for layer, _ in made),
        dead_ends=frozenset(dead_ends.values()),
        weights=frozenset(node.variable for node in history if hasattr(node, "variable")),
        buffers=buffers,
    )


def _graph(model: nn.Module, calls: Sequence[Call], ends: Sequence[Made], buffers: Collection[nn.Parameter]) -> Graph:
    before = {module: set(module._forward_hooks) for module in model.modules()}

    def replay(*_: Any) -> None:
        """What torch-pruning has to see of the forward: the calls of layers, by hooks that it has just registered."""
        added = {m: [hook for key, hook in m._forward_hooks.items() if key not in known] for m, known in before.items()}
        for call in calls:
            if call.is_tensor or not is_root(call.module):  # routers that are linear layers put out several
                for hook in added[call.module]:
                    hook(call.module, (), call.tensors[0])

    graph = Graph()
    unwrapped: Any = [UnwrappedParameters(buffer, _last_dim(buffer)) for buffer in buffers]
    with torch.enable_grad(), eval_mode(model), quiet():
        graph.build_dependency(
            model,
            (),
            forward_fn=replay,  # type: ignore[arg-type]
            customized_pruners={type(m): LINEAR_PRUNER for m in model.modules() if is_unknown_linear(m)},
            output_transform=lambda _: iter(ends),  # a list would be searched for tensors
            unwrapped_parameters=unwrapped,
            verbose=False,
        )
        map_parts(graph)
        unlink(graph, buffers)
    return graph


def _last_dim(tensor: Tensor) -> int:
    """The last dimension of more than one entry."""
    return max(dim for dim, size in enumerate(tensor.shape) if size > 1)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, warnings of torch-pruning are not shown; what they warn of is in the report, by layer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch_pruning\b")
        yield


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
