"""Turns gates into hard decisions: closed ones become zero weights, then nothing of the gates is left."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from bayesprune.gates.gate import ChannelGate, GatedSide, SharedDraws, WeightGate, keep_slow_path, named_gates
from bayesprune.layers import VariationalLayer


@torch.no_grad()
def fold_gates(model: nn.Module, lost: Mapping[str, Collection[int]]) -> None:
    """Removes the weights behind closed gates, in place; the gates stay.

    Args:
        model: A model with gates or without.
        lost: Input channels that each layer is about to lose, by the layer's name: their zeros get no mask.
    """
    names = {id(module): name for name, module in model.named_modules()}
    for layer in list(model.modules()):
        for key, gate in list(layer._modules.items()):
            if isinstance(gate, WeightGate):
                _remove(layer, key.removesuffix("_gate"), ~gate.is_open)
    for gate in [gate for _, gate in named_gates(model) if isinstance(gate, ChannelGate)]:
        for side in gate.sides:
            if side.feature_dim is not None:
                _fold_side(gate, side, lost.get(names[id(side.layer)], ()))


def drop_gates(model: nn.Module) -> None:
    """Removes all gates and their hooks, open or closed."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            ours = [key for key, hook in hooks.items() if _is_ours(hook)]
            for key in ours:
                for registry in (
                    hooks,
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    registry.pop(key, None)
    for module in list(model.modules()):
        vars(module).pop("posterior_hook", None)
        for key in [key for key, child in module._modules.items() if isinstance(child, ChannelGate | WeightGate)]:
            del module._modules[key]


def _is_ours(hook: object) -> bool:
    return hook is keep_slow_path or isinstance(getattr(hook, "__self__", hook), GatedSide | SharedDraws)


def _fold_side(gate: ChannelGate, side: GatedSide, lost: Collection[int]) -> None:
    staying = side.units.clone()
    staying[list(lost)] = len(gate.logits)
    for name, _ in side.parameters:
        _remove(side.layer, name, _closed(gate, side, name, staying))
        getattr(side.layer, name).masked_fill_(_closed(gate, side, name, side.units), 0)


def _closed(gate: ChannelGate, side: GatedSide, name: str, units: Tensor) -> Tensor:
    """Which entries of a parameter are behind closed gates, broadcastable to it, for the unit of each position."""
    by_entry = side.units_of(name, units)
    assert by_entry is not None, "it is one of the side's parameters"
    return ~gate.by_position(gate.is_open.to(torch.int8), by_entry).bool()


def _remove(layer: nn.Module, name: str, removed: Tensor) -> None:
    if not removed.any():
        return
    parameter = getattr(layer, name)
    removed = removed.expand(parameter.shape)
    if isinstance(layer, VariationalLayer) and name in layer.active_names():
        mask = layer.mask(name, whole=True)
        layer.set_mask(name, ~removed if mask is None else mask & ~removed)
    else:
        parameter.masked_fill_(removed, 0)
