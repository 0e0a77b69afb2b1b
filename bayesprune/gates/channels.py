"""A gate for every channel and head that can leave the model: spike and slab by dependency group.

After Jantre, Bhattacharya and Maiti (2023, arXiv 2308.09104), who gate the nodes of a layer. What differs: one gate
stands for everything that leaves with a channel, in all layers of its dependency group; it acts where the channel is
read, which is what removing it does whatever norm and activation stand before (theirs multiplies the norm's scale and
shift, the same thing in front of a ReLU); the slab is that of any prior given to `attach`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from bayesprune.foundation.kinds import kind_of
from bayesprune.foundation.model import run_forward, steady, tensors_in
from bayesprune.foundation.text import as_text
from bayesprune.gates.gate import CHANNEL_GATE, ChannelGate, GateOptions, SharedDraws, has_channel_gates
from bayesprune.layers import without_auxiliaries
from bayesprune.prune.graph.find import find_groups
from bayesprune.prune.graph.group import GRANULARITY, ChannelGroup, cut_parameters
from bayesprune.prune.graph.prunable_layers import Layers, is_root
from bayesprune.prune.graph.removal import SHAPE_ERRORS, remove


@dataclass(frozen=True)
class GateReport:
    """The gates that were added, and the layers without; prints as a table.

    Attributes:
        gated: Number of units (channels, heads, sets of channels that leave together) by the group's first layer.
        left_out: Why a layer's channels have no gates, by name.
    """

    gated: dict[str, int]
    left_out: dict[str, str]

    def __str__(self) -> str:
        """The table as plain text."""
        table = Table("layer", "gates", "note", title=f"{sum(self.gated.values()):,} gates")
        for name, count in self.gated.items():
            table.add_row(name, f"{count:,}", "")
        for name, reason in self.left_out.items():
            table.add_row(name, "-", reason)
        return as_text(table)


def add_channel_gates(
    model: nn.Module,
    example_inputs: Any,
    *,
    prior_inclusion: float = 1e-4,
    initial_inclusion: float = 0.99,
    temperature: float = 0.5,
    lr: float = 1e-2,
    granularity: Collection[str] = GRANULARITY,
    ignored_layers: Layers = (),
) -> GateReport:
    """Gives every channel and head that can leave the model a gate; in place.

    Until training the output in evaluation mode is what it was. `attach` finds the gates, adds their KL and moves them.
    `prune_channels(model, example_inputs, "inclusion=0.5")` removes what they closed; `close` sets its
    weights to zero instead. Every group was tried: where a closed gate gives another output than the removed channel,
    as with layer norm, whose statistics the channel leaves, the group has no gates, and the report says so.

    Args:
        model: With variational layers (the KL of their weights then counts as far as the weights are there). Not
            wrapped.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        prior_inclusion: Prior probability that a channel is there.
        initial_inclusion: Posterior probability at the start.
        temperature: Of the binary concrete relaxation.
        lr: Learning rate of the gates' logits.
        granularity: Which of "heads", "mlp" and "width" get gates; see `prune_channels`.
        ignored_layers: Layers, or their names, with everything inside them, whose output channels get none.

    Raises:
        UnsupportedModelError: torch-pruning cannot trace the model.
        ValueError: no group can have gates, the model has some, or a number is out of range.
    """
    options = GateOptions(prior_inclusion, initial_inclusion, temperature, lr)
    if has_channel_gates(model):
        raise ValueError("the model has gates on its channels already; call gates.close first.")
    structure = find_groups(model, example_inputs, granularity=granularity, ignored_layers=ignored_layers)
    left_out = dict(structure.left_whole)
    built = {group: _build(model, group, options) for group in structure.groups}
    reasons = reasons_against(model, built, example_inputs)
    for group, reason in reasons.items():
        left_out |= dict.fromkeys([group.name, *group.layers], reason)
    gates = {group.name: gate for group, gate in built.items() if group not in reasons}
    if not gates:
        raise ValueError(
            f"no channels of {type(model).__name__} can have gates: "
            + "; ".join(f"{name} ({reason})" for name, reason in list(left_out.items())[:4])
        )
    for name, gate in gates.items():
        root = model.get_submodule(name)
        root.add_module(CHANNEL_GATE, gate.train(root.training))
        for side in gate.sides:
            if side.feature_dim is not None:
                side.attach()
    if shared := [gate for gate in gates.values() if gate.num_readers > 1]:
        draws = SharedDraws(shared)
        model.register_forward_pre_hook(draws.begin)
        model.register_forward_hook(draws.end, always_call=True)
    return GateReport({name: gate.logits.numel() for name, gate in gates.items()}, left_out)


def _build(model: nn.Module, group: ChannelGroup, options: GateOptions) -> ChannelGate:
    """The group's gate, not yet in the model."""
    root = next(model.get_submodule(group.name).parameters())
    gate = ChannelGate(len(group.units), options, root.device)
    unit_of = {channel: number for number, unit in enumerate(group.units) for channel in unit}
    for member in group.members:
        layer = member.layer
        if not isinstance(layer, nn.Module):
            continue  # a parameter that stands by itself: what it adds is gated where it is read
        units = torch.full((member.size,), len(group.units))
        for channel, positions in member.positions.items():
            units[positions] = unit_of[channel]
        parameters = tuple(cut_parameters(layer, member.axis[1]))
        if member.axis[1] == "out":
            gate.add_side(layer, units, parameters=parameters)
        elif is_root(layer):
            kind = kind_of(layer)
            gate.add_side(
                layer,
                units,
                parameters=parameters,
                feature_dim=kind.feature_dim,
                blocks=kind.num_groups,
            )
    return gate


_OTHERWISE = (
    "a closed gate is not a removed channel here: a norm counts the channel, or a layer that is not called reads it"
)

_UNCHECKED = (
    "the outputs on these example_inputs are no finite real numbers, so nothing can be checked: pass example_inputs "
    "from the data and a model that returns scores"
)


@without_auxiliaries
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
