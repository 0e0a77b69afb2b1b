"""Attention modules of a model, their numbers of heads, and the linear layer behind the heads."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from bayesprune.prune.graph.observe import Observed
from bayesprune.prune.graph.prunable_layers import is_linear, layer_sizes
from bayesprune.prune.graph.state_space import mixer_of
from bayesprune.prune.graph.trace import HEAD_ATTRIBUTES, has_heads, last_layers, reached

_DIM_ATTRIBUTES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_KV_ATTRIBUTES = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
# All that stands between heads and a layer outside their module that takes them in.
_CONCATENATION = ("View", "UnsafeView", "Transpose", "Permute", "Clone", "ToCopy", "Reshape")


@dataclass(frozen=True)
class Attention:
    """One attention module.

    Attributes:
        name: Its name.
        module: The module that knows the number of heads.
        behind: The linear layer that mixes the heads, inside the module or right behind it.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Inputs of the layer behind by head.
        layers: Names of the linear layers before the heads.
    """

    name: str
    module: nn.Module
    behind: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[str, ...]

    @property
    def num_units(self) -> int:
        """Sets of heads that can leave by themselves."""
        return self.num_kv_heads if self.num_kv_heads > 1 else self.num_heads


def find_attention(
    observed: Observed, ignored_layers: Iterable[nn.Module] = ()
) -> tuple[list[Attention], dict[str, str]]:
    """The attention modules whose heads may go, and why the layers of others stay whole."""
    model, ignored = observed.model, {module for layer in ignored_layers for module in layer.modules()}
    names = {id(module): name for name, module in model.named_modules()}
    modules = [m for m in model.modules() if _knows_heads(m) and any(map(is_linear, m.modules()))]
    modules = [module for module in modules if mixer_of("", module) is None]  # whose heads are no attention
    behind = _layers_behind(observed, modules) if modules else {}
    inner = _innermost([module for module in modules if len(behind[module]) == 1])
    known = {part for module in inner for part in module.modules()}  # an MLP of position biases knows heads, too
    unsure = [m for m in modules if m not in known and known.isdisjoint(m.modules())]
    found: list[Attention] = []
    left_whole: dict[str, str] = {}
    for module in (*inner, *_innermost(unsure)):
        layers = [layer for layer in module.modules() if is_linear(layer) and layer not in behind[module]]
        attention = _described(names[id(module)], module, behind[module], [names[id(x)] for x in layers])
        if isinstance(attention, Attention) and (module in ignored or ignored.intersection(layers)):
            attention = "ignored_layers"
        if isinstance(attention, Attention):
            found.append(attention)
        else:
            left_whole |= {names[id(layer)]: attention for layer in layers}
    return found, left_whole


def _innermost(modules: list[nn.Module]) -> list[nn.Module]:
    """The modules that have none of the others inside."""
    known = set(modules)
    return [module for module in modules if not any(m in known for m in module.modules() if m is not module)]


def _described(name: str, module: nn.Module, behind: list[nn.Module], layers: list[str]) -> Attention | str:
    """The attention module, or why its heads stay."""
    if len(behind) != 1:
        return f"its heads stay whole: {len(behind)} linear layers were found behind the heads, one is expected"
    size = layer_sizes(behind[0])[0]
    dim = _first(module, _DIM_ATTRIBUTES)
    heads = _first(module, [key for key in HEAD_ATTRIBUTES if key != "num_key_value_groups"]) or (dim and size // dim)
    if not heads or size % heads:
        return f"its heads stay whole: {heads or 'an unknown number of'} heads for {size} inputs of the layer behind"
    groups = _first(module, ["num_key_value_groups"]) or 1
    kv_heads = _first(module, _KV_ATTRIBUTES) or heads // groups
    if heads % kv_heads or heads < 2:
        return f"its heads stay whole: there are {heads} query heads and {kv_heads} key and value heads"
    return Attention(name, module, behind[0], heads, kv_heads, size // heads, tuple(layers))


def _knows_heads(module: nn.Module) -> bool:
    return has_heads(module) or _first(module, _DIM_ATTRIBUTES) is not None


def _first(module: nn.Module, names: Iterable[str]) -> int | None:
    values = (vars(module).get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), None)


def _layers_behind(observed: Observed, modules: list[nn.Module]) -> dict[nn.Module, list[nn.Module]]:
    """The linear layers that make an attention module's output, or else those that take it in."""
    made_by: dict[Any, nn.Module] = {}
    came_from: dict[Any, nn.Module] = {}
    takes: dict[nn.Module, list[nn.Module]] = {}
    makes: dict[nn.Module, list[nn.Module]] = {}
    inside = {module: set(module.modules()) for module in modules}
    for call in observed.calls:
        if not call.is_end:
            for tensor in call.tensors:
                for module in reached(tensor.grad_fn, came_from, _CONCATENATION):
                    if call.module not in inside[module]:
                        takes.setdefault(module, []).append(call.module)
        elif call.tensors:
            output = call.tensors[0]
            if is_linear(call.module):
                made_by[output.grad_fn] = call.module
            if call.module in inside:
                makes.setdefault(call.module, []).extend(last_layers(output, made_by, inside[call.module]))
                came_from[output.grad_fn] = call.module
    return {module: list(dict.fromkeys(makes.get(module) or takes.get(module, []))) for module in modules}
