"""Cuts a model by a plan, in place, such that it can be undone.

Every axis is cut once, by the positions of all groups together, so no index ever shifts under another group.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bayesprune.foundation.model import undone_on_error
from bayesprune.layers import VariationalLayer
from bayesprune.prune.graph.companions import TAG, following
from bayesprune.prune.graph.group import Axis, ChannelGroup, Member, cut_parameters, gains, num_blocks, tied_parameters

# What a model's own code raises when its sizes no longer fit each other.
SHAPE_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_BIASED = (_BatchNorm, _InstanceNorm, nn.GroupNorm)  # torch-pruning cuts a bias wherever these have a weight

Selection = Sequence[tuple[ChannelGroup, Sequence[tuple[int, ...]]]]
"""Groups, and the units that leave each."""


@dataclass(frozen=True)
class _State:
    kind: type[nn.Module]
    attributes: dict
    parameters: dict
    buffers: dict


def remove(model: nn.Module, selection: Selection) -> Callable[[], None]:
    """Cuts the channels and heads out of the model, in place; what it returns undoes it.

    Stds, masks and gradients follow their means, numbers of heads the heads; `requires_grad`, ties and modes stay as
    they were. Optimizers keep the old parameters.
    """
    undo = snapshot(model)
    with undone_on_error(undo):
        ties, frozen = tied_parameters(model), _frozen(model)
        with following() as follows:
            for member, positions in _positions(selection):
                _cut(model, member, positions, follows=follows)
        for group, units in selection:
            for module, name, each in group.attributes if units else ():
                setattr(module, name, getattr(module, name) - each * len(units))
        _tie(ties)
        for module, name in frozen:
            module.get_parameter(name).requires_grad_(False)
        _check_companions(model)
    return undo


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Remembers the class and the attributes of every module by reference; what it returns puts them back.

    That suffices while changes make new tensors and leave the old ones alone, as cutting does.
    """
    before = {m: _State(type(m), dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in model.modules()}

    def undo() -> None:
        for module, state in before.items():
            for current, old in ((module._parameters, state.parameters), (module._buffers, state.buffers)):
                current.clear()
                current.update(old)
            module.__dict__.clear()
            module.__dict__.update(state.attributes)
            module.__class__ = state.kind

    return undo


def restore_point(model: nn.Module) -> Callable[[], None]:
    """Remembers the model with the values of its parameters and buffers; what it returns puts all back."""
    undo = snapshot(model)
    values = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]

    def restore() -> None:
        undo()
        for tensor, value in values:
            tensor.data.copy_(value)

    return restore


def lost_inputs(selection: Selection) -> dict[str, list[int]]:
    """Positions of the inputs that each layer loses."""
    lost: dict[str, set[int]] = defaultdict(set)
    for group, units in selection:
        roots = torch.tensor(units, dtype=torch.long).flatten()
        for member in (m for m in group.members if m.axis[1] == "in" and units):
            lost[member.axis[0]].update(member.positions.of(roots).tolist())
    return {name: sorted(positions) for name, positions in lost.items() if positions}


def _positions(selection: Selection) -> Iterable[tuple[Member, list[int]]]:
    members: dict[Axis, Member] = {}
    positions: dict[Axis, list[Tensor]] = defaultdict(list)
    for group, units in selection:
        roots = torch.tensor(units, dtype=torch.long).flatten()
        for member in group.members if units else ():
            members[member.axis] = member
            positions[member.axis].append(member.positions.of(roots))
    found = {axis: torch.cat(some).unique().tolist() for axis, some in positions.items()}
    return [(member, found[axis]) for axis, member in members.items() if found[axis]]


def _cut(model: nn.Module, member: Member, positions: list[int], *, follows: bool) -> None:
    layer, dependency = member.layer, member.dependency
    if isinstance(layer, Tensor):
        _cut_tensor(model, member, positions)
        return
    further = gains(layer) if member.axis[1] == "out" else []
    scale = layer._parameters["weight"] if isinstance(layer, _BIASED) and layer.bias is None else None
    if scale is not None:
        layer._parameters["bias"] = nn.Parameter(torch.zeros_like(scale))
    dependency(positions)
    if scale is not None:
        layer._parameters["bias"] = None
    for name in further:
        parameter: Any = layer._parameters[name]
        kept = sorted(set(range(member.size)) - set(positions))
        layer._parameters[name] = _kept_part(parameter, kept)
    if isinstance(layer, VariationalLayer) and not (follows or layer.num_stacked):
        _cut_companions(layer, member, positions)
    for parameter in layer._parameters.values():
        _untag(parameter)


def _kept_part(parameter: nn.Parameter, kept: list[int]) -> nn.Parameter:
    index = torch.tensor(kept, device=parameter.device)
    smaller = nn.Parameter(parameter.data.index_select(0, index), requires_grad=parameter.requires_grad)
    if parameter.grad is not None:
        smaller.grad = parameter.grad.index_select(0, index)
    return smaller


def _cut_tensor(model: nn.Module, member: Member, positions: list[int]) -> None:
    """Cuts a parameter or a buffer that stands in a module by itself."""
    path, _, name = member.axis[0].rpartition(".")
    module, dependency = model.get_submodule(path), member.dependency
    tensor = getattr(module, name)
    if isinstance(tensor, nn.Parameter):
        pruner: Any = dependency.handler
        pruner.__self__.pruning_dim = dependency.target.pruning_dim
        setattr(module, name, pruner(tensor, positions))
        _untag(module._parameters[name])
    else:
        kept = torch.tensor(sorted(set(range(member.size)) - set(positions)), device=tensor.device)
        setattr(module, name, tensor.index_select(dependency.target.pruning_dim, kept))


def _untag(parameter: nn.Parameter | None) -> None:
    if hasattr(parameter, TAG):
        delattr(parameter, TAG)


def _cut_companions(layer: VariationalLayer, member: Member, positions: list[int]) -> None:
    kept = sorted(set(range(member.size)) - set(positions))
    blocks = num_blocks(member) if member.axis[1] == "in" else 1
    for name, dim in ((n, dim) for n, dim in cut_parameters(layer, member.axis[1]) if n in layer.active_names()):
        layer.cut(name, dim, kept[: len(kept) // blocks], member.size // blocks)


def _tie(ties: dict[int, list[tuple[nn.Module, str]]]) -> None:
    for holders in ties.values():
        (first, name), *others = holders
        parameter = first._parameters[name]
        for module, key in others:
            module._parameters[key] = parameter


def _frozen(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(m, n) for m in model.modules() for n, p in m._parameters.items() if p is not None and not p.requires_grad]


def _check_companions(model: nn.Module) -> None:
    for layer in (module for module in model.modules() if isinstance(module, VariationalLayer)):
        for name in layer.active_names():
            layer.log_std(name)
            mask, shape = layer.mask(name), getattr(layer, name).shape
            if mask is not None and mask.shape != shape:
                raise ValueError(f"{name}_mask has shape {tuple(mask.shape)}, its weight {tuple(shape)}.")
