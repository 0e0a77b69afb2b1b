"""Tries whether a closed gate is what it stands for: a channel that was removed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.foundation.model import run_forward, steady, tensors_in
from bayesprune.layers.gates import ChannelGate, passing_gates
from bayesprune.prune.graph.group import ChannelGroup
from bayesprune.prune.graph.removal import SHAPE_ERRORS, remove

_OTHERWISE = (
    "a closed gate is not a removed channel here: a norm counts the channel, or a layer that is not called reads it"
)

_UNCHECKED = (
    "the outputs on these example_inputs are no finite real numbers, so nothing can be checked: pass example_inputs "
    "from the data and a model that returns scores"
)


@passing_gates
def reasons_against(
    model: nn.Module, gates: Mapping[ChannelGroup, ChannelGate], example_inputs: Any
) -> dict[ChannelGroup, str]:
    """The groups that cannot have these gates, which are not in the model yet; the model is as before afterwards.

    All groups together first, and strictly; one by one only where that does not agree.
    """
    reasons = {group: "no layer with weights reads its channels" for group in gates if not gates[group].num_readers}
    tried = {group: gate for group, gate in gates.items() if group not in reasons}
    before = _outputs(model, example_inputs)
    if not before or not all(output.isfinite().all() for output in before):
        return reasons | dict.fromkeys(tried, _UNCHECKED)
    if _reason(model, tried, example_inputs, before, tolerance=1e-4) is None:
        return reasons
    for group, gate in tried.items():
        if (reason := _reason(model, {group: gate}, example_inputs, before, tolerance=1e-2)) is not None:
            reasons[group] = reason
    return reasons


def _reason(
    model: nn.Module,
    gates: Mapping[ChannelGroup, ChannelGate],
    example_inputs: Any,
    before: Sequence[Tensor],
    *,
    tolerance: float,
) -> str | None:
    """Why half of these groups closed is not half of them removed; None where it is."""
    try:
        undo = remove(model, [(group, group.units[::2]) for group in gates])
        try:
            expected = _outputs(model, example_inputs)
        finally:
            undo()
    except SHAPE_ERRORS as error:
        return f"the model does not run without some of its channels ({type(error).__name__})"
    logits = {gate: gate.logits.detach().clone() for gate in gates.values()}
    hooks = [side.attach() for gate in logits for side in gate.sides if side.feature_dim is not None]
    try:
        for gate in logits:
            gate.eval().logits.data[::2] = -1.0
        found = _outputs(model, example_inputs)
    finally:
        for gate, values in logits.items():
            gate.logits.data.copy_(values)
        for hook in hooks:
            hook.remove()
    pairs = zip(found, expected, before, strict=True)
    return None if all(_same(*outputs, tolerance=tolerance) for outputs in pairs) else _OTHERWISE


def _same(found: Tensor, expected: Tensor, before: Tensor, *, tolerance: float) -> bool:
    """Whether two outputs are one, up to rounding and a small part of what removal changes."""
    if found.shape != expected.shape:
        return False
    rounding = 64 * torch.finfo(found.dtype).eps * before.abs().max()
    return bool((found - expected).abs().max() <= tolerance * (expected - before).abs().max() + rounding)


def _outputs(model: nn.Module, example_inputs: Any) -> Sequence[Tensor]:
    with steady(model):
        return [t for t in tensors_in(run_forward(model, example_inputs)) if t.is_floating_point() and t.numel()]
