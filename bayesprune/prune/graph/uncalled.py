"""Layers that the example forward does not call, as auxiliary heads and the heads of other tasks, and what feeds them.

Their inputs would not be cut with what feeds them, and the next forward that calls them would fail. A forward in
training mode shows what feeds the auxiliary heads of it. What it does not call either may be fed by all that has as
many channels as it reads.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from bayesprune.foundation.kinds import EMBEDDING, kind_of
from bayesprune.foundation.model import layers_called, requires_grad, run_forward, tensors_in
from bayesprune.prune.graph.group import ChannelGroup
from bayesprune.prune.graph.prunable_layers import is_linear, is_root, layer_sizes
from bayesprune.prune.graph.removal import snapshot
from bayesprune.prune.graph.trace import nodes_before

_NEXT = "pass example_inputs with which the model calls it, or delete it from the model if it is not needed"


def whole_for_uncalled(
    model: nn.Module, example_inputs: Any, groups: Sequence[ChannelGroup], uncalled: Sequence[nn.Module]
) -> dict[ChannelGroup, str]:
    """The groups that feed, or may feed, layers that are not called, with the reason to leave them whole.

    Args:
        model: With modes and parameters as they are; it is as before afterwards.
        example_inputs: Those with which the layers are not called in evaluation mode.
        groups: Of channels, not of heads, which nothing outside their module reads.
        uncalled: Layers in the model's order.
    """
    names = {module: name for name, module in model.named_modules()}
    reasons: dict[ChannelGroup, str] = {}
    fed_by = _feeders_in_training(model, example_inputs, uncalled)
    for layer, feeders in fed_by.items():
        for group in groups:
            if not feeders.isdisjoint(m.layer for m in group.members if m.axis[1] == "out"):
                why = f"it feeds {names[layer]}, which the model calls only in training: {_NEXT}"
                reasons.setdefault(group, why)
    for layer in _first_of_their_kind([layer for layer in uncalled if layer not in fed_by], model):
        size = layer_sizes(layer)[0]
        why = f"{names[layer]} reads {size} channels, maybe these, and is not called with example_inputs: {_NEXT}"
        alike = [group for group in groups if size in (member.size for member in group.members)]
        if not alike and is_linear(layer):  # behind a flatten
            alike = [group for group in groups if not size % group.num_channels]
        for group in alike:
            reasons.setdefault(group, why)
    return reasons


def _feeders_in_training(
    model: nn.Module, example_inputs: Any, layers: Sequence[nn.Module]
) -> dict[nn.Module, set[nn.Module]]:
    """For the layers that a forward in training mode calls, the layers next before them."""
    made_by: dict[Any, nn.Module] = {}
    read: dict[nn.Module, list[Any]] = {}

    def leave(layer: nn.Module, _: Any, output: Any) -> None:
        made_by[output.grad_fn] = layer

    def enter(layer: nn.Module, args: tuple[Any, ...]) -> None:
        read.setdefault(layer, []).extend(tensor.grad_fn for tensor in tensors_in(args[:1]))

    modes = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    undo = snapshot(model)
    handles = [m.register_forward_hook(leave) for m in model.modules() if is_root(m) or kind_of(m) == EMBEDDING]
    handles += [layer.register_forward_pre_hook(enter) for layer in layers]
    try:
        for module in model.modules():  # running statistics and their like are written in place
            module._buffers.update({name: b.clone() for name, b in module._buffers.items() if b is not None})
        with torch.enable_grad(), requires_grad(model, True), layers_called(model), torch.random.fork_rng(devices):
            run_forward(model.train(), example_inputs)
    except Exception:  # noqa: BLE001 (it may want targets, or more than one example; what ran until then is known)
        pass
    finally:
        undo()
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return {
        layer: {made_by[node] for node in nodes_before(grad_fns, lambda node: node not in made_by) if node in made_by}
        for layer, grad_fns in read.items()
    }


def _first_of_their_kind(layers: Sequence[nn.Module], model: nn.Module) -> Iterator[nn.Module]:
    """The layers that no other one of these, before them in the same unused part of the model, can feed."""
    unused = set(layers)
    part: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        roots = [inner for inner in module.modules() if is_root(inner)]
        if roots and unused.issuperset(roots):
            for root in roots:
                part.setdefault(root, module)
    before: dict[nn.Module, list[int]] = {}
    for layer in layers:
        size, made = layer_sizes(layer)
        earlier = before.setdefault(part[layer], [])
        if not any(size == other or (is_linear(layer) and other > 1 and not size % other) for other in earlier):
            yield layer
        earlier.append(made)
