"""Tries units on the model: without one it must run, and compute what it does when the layer behind ignores it.

The units are heads of attention, hidden units of experts and whatever else leaves together; the module of the experts
is the layer behind them, too.

Every weight, bias and table that has entries by head is random meanwhile, so that a wrong index changes the output by
much, however alike the trained heads are. The model is restored afterwards.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.foundation.batches import on_device
from bayesprune.foundation.kinds import EMBEDDING, kind_of
from bayesprune.foundation.model import steady_forward, tensors_in
from bayesprune.laplace.matrices import silenced
from bayesprune.prune.graph.group import ChannelGroup, cut_parameters, num_stacked
from bayesprune.prune.graph.removal import SHAPE_ERRORS, Selection, remove, snapshot

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Largest difference of what the layers behind put out, relative to the largest value; 0.1 in lower precision."""

_PERIOD = 65521  # of the random numbers; a prime, so that no two rows repeat each other


@torch.no_grad()
def disagreement(
    model: nn.Module,
    selection: Selection,
    example_inputs: Any,
    *,
    parts: Sequence[Selection] | None = None,
    to_the_end: bool = False,
) -> str | None:
    """Describes how the model without these heads differs from the one that ignores them; None where it does not.

    The model is as before afterwards. What the layers behind the heads put out is compared.

    Args:
        model: With the heads.
        selection: Groups, and the units that leave each.
        example_inputs: Of the model.
        parts: Of the selection, one of which leaves at a time while the others are ignored; None is all together.
        to_the_end: Whether the outputs of the model are compared, too.
    """
    undo = snapshot(model)
    try:
        generator = torch.Generator().manual_seed(0)
        for group, _ in selection:
            randomise(model, group, generator)
        uncut = snapshot(model)
        for group, units in selection:
            silence(model, group, units)
        expected = _outputs_behind(model, selection, example_inputs, to_the_end)
        for part in [selection] if parts is None else parts:
            uncut()
            try:
                for group, units in selection:
                    if all(group is not removed for removed, _ in part):
                        silence(model, group, units)
                remove(model, part)
                found = _outputs_behind(model, selection, example_inputs, to_the_end)
            except SHAPE_ERRORS as error:
                first_line = str(error).partition(chr(10))[0]
                return f"the model does not run without one ({type(error).__name__}: {first_line})"
            if (problem := _difference(found, expected)) is not None:
                return problem
    finally:
        undo()
    return None


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    if not expected:
        return "the layer behind its heads is not called on example_inputs, so nothing can be checked"
    if not all(output.isfinite().all() for output in expected):
        return "the forward pass gives numbers that are not finite, so nothing can be checked"
    if len(found) != len(expected) or not all(map(_close, found, expected)):
        return "the model without one is not the model that ignores it"
    return None


def randomise(model: nn.Module, group: ChannelGroup, generator: torch.Generator) -> None:
    """Gives all that leaves with a group random values of a usual size, in place, by new parameters."""
    for member in group.members:
        layer = member.layer
        if isinstance(layer, Tensor):
            path, _, name = member.axis[0].rpartition(".")
            _replace(model.get_submodule(path), name, 1.0, generator)
            continue
        stacked = num_stacked(layer)
        for name, dim in cut_parameters(layer, member.axis[1]):
            weight = layer._parameters[name]
            if weight is None:
                continue
            is_matrix = weight.dim() > 1 + stacked and kind_of(layer) != EMBEDDING
            other = 2 * stacked + 1 - dim if member.axis[1] == "in" else dim
            fan_in = weight[(0,) * stacked].numel() / weight.shape[other] if is_matrix else 1
            _replace(layer, name, fan_in**-0.5, generator)


def _replace(module: nn.Module, name: str, scale: float, generator: torch.Generator) -> None:
    old = getattr(module, name)
    numbers = (torch.randn(_PERIOD, generator=generator) * scale).to(old)
    values = numbers.repeat(-(-old.numel() // _PERIOD))[: old.numel()].reshape(old.shape)
    if isinstance(old, nn.Parameter):
        module._parameters[name] = nn.Parameter(values, requires_grad=old.requires_grad)
    else:
        module._buffers[name] = values


def silence(model: nn.Module, group: ChannelGroup, units: Any) -> None:
    """Zeroes what is read of these units, in place, by new parameters: as good as their removal.

    Layers behind read them, and parameters of the model's own may, as the gate of an additive attention does.
    """
    roots = torch.tensor(units, dtype=torch.long).flatten()
    for member in group.members if len(roots) else ():
        gone = member.positions.of(roots).tolist()
        if member.axis[1] == "in":
            assert isinstance(member.layer, nn.Module), "the layer behind the heads is linear"
            silence_inputs(member.layer, gone)
        elif isinstance(member.layer, Tensor):
            path, _, name = member.axis[0].rpartition(".")
            module = model.get_submodule(path)
            if (old := module._parameters.get(name)) is not None:  # a buffer may be what is divided by
                index = torch.tensor(gone, device=old.device)
                values = old.data.index_fill(member.dependency.target.pruning_dim, index, 0)
                module._parameters[name] = nn.Parameter(values, requires_grad=old.requires_grad)


def silence_inputs(layer: nn.Module, positions: Sequence[int]) -> None:
    """Zeroes what a layer reads at these positions of its inputs, in place, by a new parameter."""
    name, _ = cut_parameters(layer, "in")[0]
    trains = layer.get_parameter(name).requires_grad
    layer._parameters[name] = nn.Parameter(silenced(layer, positions), requires_grad=trains)


def _outputs_behind(model: nn.Module, selection: Selection, example_inputs: Any, to_the_end: bool) -> list[Tensor]:
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        outputs.append(output)

    axes = [(m.layer, m.axis[1]) for group, _ in selection for m in group.members if isinstance(m.layer, nn.Module)]
    cut = {layer for layer, side in axes if side == "out" and not num_stacked(layer)}  # these put out less
    handles = [layer.register_forward_hook(keep) for layer, side in axes if side == "in" and layer not in cut]
    try:
        given = tensors_in(steady_forward(model, example_inputs))
    finally:
        for handle in handles:
            handle.remove()
    return [*outputs, *(tensor for tensor in given if to_the_end and tensor.is_floating_point())]


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    largest = (one - other).abs().max() / other.abs().max().clamp(min=torch.finfo(other.dtype).tiny)
    return bool(largest <= TOLERANCE.get(other.dtype, 0.1))


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
