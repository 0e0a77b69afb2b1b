"""What a forward left behind: the calls of its modules, and walks through autograd's graph."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Size, nn

from bayesprune.prune.graph.roots import is_linear, layer_sizes

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


def last_layers(output: Made, layer_of: dict[Any, nn.Module], inside: Collection[nn.Module]) -> list[nn.Module]:
    """Layers inside a module whose units are its output's units, as the projection behind the heads."""
    found = [layer for layer in reached(output.grad_fn, layer_of, _PASS_THROUGH) if layer in inside]
    if not found:  # tokens may be put back into rows and columns, while the size of the last dimension stays
        behind = reached(output.grad_fn, layer_of, (*_PASS_THROUGH, *_MOVING_TOKENS))
        linear = [layer for layer in behind if layer in inside and is_linear(layer)]
        found = [layer for layer in linear if layer_sizes(layer)[1] == output.shape[-1]]
    return found
