"""torch-pruning's dependency graph of a model that was run, with what else its calls show about layers."""

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.foundation.model import eval_mode
from bayesprune.prune.graph.history import Call, Made, has_heads, last_layers, walk
from bayesprune.prune.graph.internals import UnwrappedParameters
from bayesprune.prune.graph.links import unlink
from bayesprune.prune.graph.mapping import Graph, map_parts
from bayesprune.prune.graph.roots import LINEAR_PRUNER, is_root, is_unknown_linear


@dataclass(frozen=True)
class Trace:
    """What one forward in evaluation mode shows.

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
    history, dead_ends = set(walk(ends)), {}
    for layer, output in reversed(made):  # the last ones first, behind which nothing is seen
        if output.grad_fn is not None and output.grad_fn not in history:
            dead_ends[output] = layer
            history.update(walk([output.grad_fn]))
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
