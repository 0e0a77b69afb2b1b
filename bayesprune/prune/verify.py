"""Checks channel groups by experiment: channels put in another order, everywhere, must leave the output as it is.

A wrong index in the dependency graph, as after a flatten whose channels come last, often gives a model that still runs
once channels are gone, on the wrong ones. A permutation shows it at the cost of one forward.
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.layers.stacks import select
from bayesprune.macs import eval_mode, run_forward
from bayesprune.prune.cuts import Axis, Member, cut_parameters, num_blocks, num_stacked
from bayesprune.prune.removal import snapshot
from bayesprune.prune.structure import ChannelGroup
from bayesprune.prune.trace import tensors_in

TOLERANCE = {torch.float64: 1e-2, torch.float32: 1e-2}
"""Largest change of an output, relative to its largest value; 0.1 in lower precision. A wrong index changes all."""


def misplaced(model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Any) -> list[ChannelGroup]:
    """The groups whose channels do not hang together as the graph says; the model is as before afterwards.

    A few wrong ones among many are found by halves, in a number of forwards that grows with the logarithm of the many.
    """
    expected = _outputs(model, example_inputs)
    if not all(output.isfinite().all() for output in expected):
        return []
    wrong, pending = [], [list(groups)]
    while pending:
        some = pending.pop()
        if _unchanged(model, some, example_inputs, expected):
            continue
        if len(some) == 1:
            wrong += some
        else:
            pending += [some[len(some) // 2 :], some[: len(some) // 2]]
    return wrong


def permute(model: nn.Module, groups: Iterable[ChannelGroup]) -> None:
    """Puts the channels of all groups in another order, in place, by new parameters."""
    orders: dict[Axis, tuple[Member, Tensor]] = {}
    for group in groups:
        shuffled = torch.tensor(random.Random(0).sample(range(len(group.units)), len(group.units)))
        for member in group.members:
            _, order = orders.setdefault(member.axis, (member, torch.arange(member.size)))
            roots = (root for unit in group.units for root in unit)
            positions = torch.tensor([position for root in roots for position in member.positions.get(root, ())])
            by_unit = positions.view(len(group.units), -1)  # every unit has equally many
            order[by_unit] = by_unit[shuffled]
    for member, order in orders.values():
        _permute(model, member, order)


def _permute(model: nn.Module, member: Member, order: Tensor) -> None:
    layer = member.layer
    if isinstance(layer, Tensor):
        path, _, name = member.axis[0].rpartition(".")
        _replace(model.get_submodule(path), name, member.dependency.target.pruning_dim, order)
        return
    for name, dim in cut_parameters(layer, member.axis[1]):
        inside = member.axis[1] == "in"  # of a grouped convolution, whose blocks all have the same order
        _replace(layer, name, dim, order[: member.size // num_blocks(member)] if inside else order, num_stacked(layer))
    for name in ("running_mean", "running_var"):
        if (buffer := layer._buffers.get(name)) is not None:
            layer._buffers[name] = buffer[order.to(buffer.device)]


def _replace(holder: nn.Module, name: str, dim: int, order: Tensor, stacked: int = 0) -> None:
    old = getattr(holder, name)
    data = select(old.data, dim, order.to(old.device), num_stacked=stacked)
    if isinstance(old, nn.Parameter):
        holder._parameters[name] = nn.Parameter(data, requires_grad=old.requires_grad)
    else:
        holder._buffers[name] = data


def _unchanged(
    model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Any, expected: Sequence[Tensor]
) -> bool:
    undo = snapshot(model)
    try:
        permute(model, groups)
        found = _outputs(model, example_inputs)
    except RuntimeError:
        return False  # two groups ask for orders that no layer can have
    finally:
        undo()
    return len(found) == len(expected) and all(map(_close, found, expected))


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    largest = (one - other).abs().max() / other.abs().max().clamp(min=torch.finfo(other.dtype).tiny)
    return bool(largest <= TOLERANCE.get(other.dtype, 0.1))


@torch.no_grad()
def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    with eval_mode(model):
        return [t for t in tensors_in(run_forward(model, example_inputs)) if t.is_floating_point() and t.numel()]
