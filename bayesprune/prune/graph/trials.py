"""Tries groups on the model: whether it runs without a unit, and whether it is then the model that ignores the unit."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.foundation.batches import on_device
from bayesprune.prune.graph.removal import SHAPE_ERRORS, remove, snapshot
from bayesprune.prune.graph.silenced import disagreement
from bayesprune.prune.graph.steady import steady_forward
from bayesprune.prune.graph.structure import ChannelGroup


def missed(model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Any) -> list[ChannelGroup]:
    """The groups without whose first unit the model does not run; it is as before afterwards.

    A few among many are found by halves.
    """
    if not groups or _runs(model, groups, example_inputs):
        return []
    half = len(groups) // 2
    parts = (groups[:half], groups[half:]) if half else ()
    return [group for part in parts for group in missed(model, part, example_inputs)] if parts else list(groups)


def is_right(model: nn.Module, group: ChannelGroup, example_inputs: Any) -> bool:
    """Whether the model without a unit is the one that ignores it, but for norms, which count the channels."""
    undo = snapshot(model)
    try:
        for member in group.members:
            if isinstance(member.layer, (nn.LayerNorm, nn.GroupNorm)):
                vars(member.layer)["forward"] = torch.tanh  # bounded too, and of each channel alone
        ends = (group.units[0], group.units[-1])
        return all(disagreement(model, [(group, [unit])], example_inputs, to_the_end=True) is None for unit in ends)
    finally:
        undo()


def _runs(model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Any) -> bool:
    """Whether the model runs without the first unit of each: by shapes alone, and else for certain."""
    return any(_runs_once(model, groups, example_inputs, shapes_alone=shapes_alone) for shapes_alone in (True, False))


def _runs_once(model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Any, *, shapes_alone: bool) -> bool:
    undo = snapshot(model)
    try:
        if shapes_alone:
            _forget_values(model)
            example_inputs = on_device(example_inputs, torch.device("meta"))
        remove(model, [(group, group.units[:1]) for group in groups])
        steady_forward(model, example_inputs)
    except SHAPE_ERRORS:
        return False
    finally:
        undo()
    return True


def _forget_values(model: nn.Module) -> None:
    """Puts tensors without values in place of all parameters and buffers."""
    known: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = known.setdefault(id(tensor), _without_values(tensor))  # type: ignore[assignment]


def _without_values(tensor: Tensor) -> Tensor:
    values = tensor.detach().to("meta")
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
