"""torch-pruning's dependency graph of a model, with what else a forward shows: outputs and the insides of attention."""

import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning._helpers import UnwrappedParameters

from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.model import eval_mode, requires_grad, run_forward
from bayesprune.layers import VariationalLayer
from bayesprune.prune.graph.links import unlink
from bayesprune.prune.graph.mapping import Graph, map_parts
from bayesprune.prune.graph.roots import LINEAR_PRUNER, is_linear, is_root, is_unknown_linear, layer_sizes
from bayesprune.prune.graph.seeing import buffers_as_parameters, everything_seen

_LOGGER = logging.getLogger(__name__)
_ERRORS = (AssertionError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

HEAD_ATTRIBUTES = ("num_heads", "num_attention_heads", "num_key_value_groups", "n_heads", "n_head", "heads")
# What puts tokens elsewhere and leaves their channels alone, where the last dimension has the size that the layer gave.
_MOVING_TOKENS = ("View", "UnsafeView", "Permute", "Roll", "Slice", "Alias")
# What may stand between an attention module's last layer and its output; a reshape means that heads come out.
PASS_THROUGH = ("Add", "Mul", "Clone", "ToCopy", "NativeBatchNorm", "NativeLayerNorm", "NativeDropout")


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


def trace(model: nn.Module, example_inputs: Any) -> Trace:
    """Traces the model; its mode and `requires_grad` are as before afterwards.

    torch-pruning follows autograd's graph, so gradients are enabled meanwhile, for frozen parameters too, and what
    stops them in the forward does not.

    Raises:
        UnsupportedModelError: torch-pruning fails on the model.
    """
    try:
        several = _of_several_outputs(model, example_inputs)  # by a forward of its own, which no graph is to hold
        try:
            with everything_seen(), buffers_as_parameters(model) as buffers:
                return _trace(model, example_inputs, buffers, several)
        except _ERRORS as error:  # a forward that writes into buffers, or relies on detached tensors
            _LOGGER.debug("traced again, as autograd sees the model: %s", error)
            return _trace(model, example_inputs, {}, several)
    except _ERRORS as error:
        raise UnsupportedModelError(
            f"torch-pruning {version('torch-pruning')} cannot trace {type(model).__name__} ({type(error).__name__}: "
            f"{error}); expected a model whose forward runs on example_inputs under autograd, not wrapped, compiled or "
            "scripted. Single weights can be removed with prune_weights."
        ) from error


def _trace(
    model: nn.Module, example_inputs: Any, buffers: dict[nn.Parameter, str], ignored_layers: list[nn.Module]
) -> Trace:
    layer_of: dict[Any, nn.Module] = {}
    made: list[tuple[nn.Module, Tensor]] = []
    attention: list[tuple[nn.Module, Tensor]] = []
    ends: set[Any] = set()
    history: set[Any] = set()
    dead_ends: set[nn.Module] = set()

    def saw_layer(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):  # routers that are linear layers put out several
            layer_of[output.grad_fn] = module
            made.append((module, output))

    def saw_attention(module: nn.Module, _: Any, output: Any) -> None:
        attention.extend((module, tensor) for tensor in tensors_in(output))

    def outputs_with_history(output: Any) -> list[Tensor]:
        found = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
        ends.update(tensor.grad_fn for tensor in found)
        history.update(walk(ends))
        for layer, tensor in reversed(made):  # the last ones first, behind which nothing is seen
            if tensor.grad_fn is not None and tensor.grad_fn not in history:
                dead_ends.add(layer)
                found.append(tensor)
                history.update(walk([tensor.grad_fn]))
        return found

    handles = [m.register_forward_hook(saw_layer) for m in model.modules() if is_root(m)]
    handles += [m.register_forward_hook(saw_attention) for m in model.modules() if has_heads(m)]
    try:
        with (
            torch.enable_grad(),
            eval_mode(model),
            requires_grad(model, True),
            without_cache(model),
            _out_of_place(model),
            quiet(),
        ):
            graph = Graph()
            unwrapped: Any = [UnwrappedParameters(buffer, _last_dim(buffer)) for buffer in buffers]
            graph.build_dependency(
                model,
                example_inputs,
                forward_fn=run_forward,
                customized_pruners={type(m): LINEAR_PRUNER for m in model.modules() if is_unknown_linear(m)},
                output_transform=outputs_with_history,
                unwrapped_parameters=unwrapped,
                ignored_layers=ignored_layers,
                verbose=False,
            )
            map_parts(graph)
            unlink(graph, buffers)
    finally:
        for handle in handles:
            handle.remove()
    outputs = {node.module for node in graph.module2node.values() if node.grad_fn in ends}
    inside = {child for module in model.modules() if has_heads(module) for child in _layers_of(module)}
    inside -= {layer for module, output in attention for layer in last_layers(output, layer_of, set(module.children()))}
    called = {layer for layer, _ in made}
    weights = {node.variable for node in history if hasattr(node, "variable")}
    return Trace(
        graph=graph,
        outputs=frozenset(outputs),
        inside_attention=frozenset(inside),
        called=frozenset(called),
        dead_ends=frozenset(dead_ends),
        weights=frozenset(weights),
        buffers=buffers,
    )


def _last_dim(tensor: Tensor) -> int:
    """The last dimension of more than one entry."""
    return max(dim for dim, size in enumerate(tensor.shape) if size > 1)


def _of_several_outputs(model: nn.Module, example_inputs: Any) -> list[nn.Module]:
    """Layers of other libraries that put out more than one tensor, as routers that are linear layers."""
    several: list[nn.Module] = []

    def see(module: nn.Module, _: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            several.append(module)

    stock = (m.stock_type if isinstance(m, VariationalLayer) else type(m) for m in model.modules())
    own = [m for m, kind in zip(model.modules(), stock, strict=True) if is_root(m) and kind.__module__[:6] != "torch."]
    handles = [module.register_forward_hook(see) for module in own]
    try:
        if own:
            with torch.no_grad(), eval_mode(model):
                run_forward(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return several


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output, which may nest them in mappings, tuples, lists, dataclasses and objects."""
    pending, seen = [output], set()
    while pending:
        part = pending.pop()
        if isinstance(part, Tensor):
            yield part
        elif id(part) not in seen and not isinstance(part, (nn.Module, type, str, bytes)) and not _is_cache(part):
            seen.add(id(part))  # an object may hold itself
            if isinstance(part, (list, tuple, Mapping)):
                inside = list(part.values() if isinstance(part, Mapping) else part)
            else:
                inside = list(getattr(part, "__dict__", {}).values())
            pending += reversed(inside)


def _is_cache(part: Any) -> bool:
    """Whether something holds keys and values of transformers for the next token, which no one reads as outputs."""
    return hasattr(part, "get_seq_length")


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, a model of transformers keeps no keys and values: torch-pruning fails on the concatenation."""
    holders = [vars(module) for module in model.modules()]  # the stacks of T5 have configs of their own
    configs: list[Any] = [attributes["config"] for attributes in holders if "config" in attributes]
    before = [(config, config.use_cache) for config in configs if isinstance(getattr(config, "use_cache", None), bool)]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, was in reversed(before):
            config.use_cache = was


@contextmanager
def _out_of_place(model: nn.Module) -> Iterator[None]:
    """Inside, activations write into no output of a layer: autograd forgets the layer where that is a view."""
    writing: list[Any] = [module for module in model.modules() if getattr(module, "inplace", None) is True]
    try:
        for module in writing:
            module.inplace = False
        yield
    finally:
        for module in writing:
            module.inplace = True


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, warnings of torch-pruning are not shown; what they warn of is in the report, by layer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch_pruning\b")
        yield


def has_heads(module: nn.Module) -> bool:
    """Whether a module names a number of heads among its attributes."""
    return any(isinstance(getattr(module, name, None), int) for name in HEAD_ATTRIBUTES)


def walk(ends: Iterable[Any], goes_on: Callable[[Any], bool] = lambda node: True) -> Iterator[Any]:
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
    nodes = walk([grad_fn], lambda node: node not in targets and node.name().startswith(pass_through))
    return [targets[node] for node in nodes if node in targets]


def _layers_of(attention: nn.Module) -> Iterator[nn.Module]:
    return (child for child in attention.children() if is_root(child))


def last_layers(output: Tensor, layer_of: dict[Any, nn.Module], inside: Collection[nn.Module]) -> list[nn.Module]:
    """Layers inside a module whose units are its output's units, as the projection behind the heads."""
    found = [layer for layer in reached(output.grad_fn, layer_of, PASS_THROUGH) if layer in inside]
    if not found:  # tokens may be put back into rows and columns, while the size of the last dimension stays
        behind = reached(output.grad_fn, layer_of, (*PASS_THROUGH, *_MOVING_TOKENS))
        linear = [layer for layer in behind if layer in inside and is_linear(layer)]
        found = [layer for layer in linear if layer_sizes(layer)[1] == output.shape[-1]]
    return found
