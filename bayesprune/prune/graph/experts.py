"""Hidden units of the experts of mixtures as units of removal.

Experts that stand in stacked parameters must all have as many hidden units. Each may lose other ones, though: what
leaves together is the unit of the same rank in every expert, by the scores, not the unit of the same number. As with
heads the arrangement of a fused parameter cannot be seen from its size, so the ones in use are tried by experiment.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch_pruning.dependency import Dependency, Node
from torch_pruning.pruner.function import BasePruningFunc

from bayesprune.layers import VariationalLayer
from bayesprune.layers.stacks import SIZES, Stack, axis_size, select, stack_of, stacks
from bayesprune.prune.graph.group import ChannelGroup, ChannelStructure, Member, Positions, written_down
from bayesprune.prune.graph.trials import disagreement


class ExpertsPruner(BasePruningFunc):
    """Cuts hidden units, numbered through all experts, each of which loses as many.

    Args:
        stack: How the module holds its experts, which cannot be seen while one side is cut and the other is not.
    """

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        """The experts without putting out these units."""
        return self._cut(layer, "out", idxs)

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        """The experts without taking in these units."""
        return self._cut(layer, "in", idxs)

    def get_out_channels(self, layer: Any) -> int:
        """Hidden units of all experts, a gate and a value for each where they are fused."""
        return self.stack.axis_size(layer, "out")

    def get_in_channels(self, layer: Any) -> int:
        """Hidden units of all experts."""
        return self.stack.axis_size(layer, "in")

    def _cut(self, layer: nn.Module, side: str, idxs: Sequence[int]) -> nn.Module:
        for name, dim in self.stack.cut_parameters(layer, side):
            parameter = layer.get_parameter(name)
            size = axis_size(parameter, dim, num_stacked=1)
            kept = torch.tensor(sorted(set(range(size)) - set(idxs)))
            index = kept.to(parameter.device)
            smaller = nn.Parameter(select(parameter.data, dim, index, num_stacked=1), parameter.requires_grad)
            if parameter.grad is not None:
                smaller.grad = select(parameter.grad, dim, index, num_stacked=1)
            layer._parameters[name] = smaller
            if isinstance(layer, VariationalLayer) and name in layer.active_names():
                layer.cut(name, dim, kept.tolist(), size)
        return layer


def find_experts(
    model: nn.Module, example_inputs: Any, *, ignored_layers: Iterable[nn.Module] = ()
) -> ChannelStructure:
    """The hidden units of all stacked experts as groups, checked by experiment; the model is as before afterwards."""
    ignored = {module for layer in ignored_layers for module in layer.modules()}
    found = {name: module for name, module in model.named_modules() if stack_of(module) is not None}
    left_whole = {name: "ignored_layers" for name, module in found.items() if module in ignored}
    tried = {name: module for name, module in found.items() if name not in left_whole}
    groups = [_group(name, module, _stack(module)) for name, module in tried.items()]
    if not groups or _problem(model, groups, example_inputs) is None:
        return ChannelStructure(tuple(groups), left_whole)
    groups = []
    for name, module in tried.items():
        problems = []
        for stack in stacks(module):
            group = _group(name, module, stack)
            if (problem := _problem(model, [group], example_inputs)) is None:
                groups.append(group)
                break
            problems.append(problem)
        else:
            left_whole[name] = f"its experts stay whole: {problems[0]}"
    return ChannelStructure(tuple(groups), left_whole)


def _stack(module: nn.Module) -> Stack:
    found = stack_of(module)
    assert found is not None, "modules of experts alone come here"
    return found


def _problem(model: nn.Module, groups: list[ChannelGroup], example_inputs: Any) -> str | None:
    selection = [(group, group.units[group.multiple : 2 * group.multiple] or group.units[:1]) for group in groups]
    return disagreement(model, selection, example_inputs)


def _group(name: str, module: nn.Module, stack: Stack) -> ChannelGroup:
    members = tuple(_member(name, module, stack, side) for side in ("out", "in"))
    units = range(stack.num_units)
    return ChannelGroup(
        name=name,
        group=written_down(members, stack.num_experts * stack.num_units),
        units=tuple(tuple(range(unit, stack.num_experts * stack.num_units, stack.num_units)) for unit in units),
        members=members,
        attributes=tuple((module, key, 1) for key in SIZES if vars(module).get(key) == stack.num_units),
        num_experts=stack.num_experts,
        multiple=_multiple(module, stack),
    )


def _multiple(module: nn.Module, stack: Stack) -> int:
    """What the number of hidden units is kept a multiple of: kernels for experts read 16 bytes at once.

    Of half precision, to which a model may be cast; of that which the parameters have where experts are tiny.
    """
    numbers = 8 if stack.num_units >= 32 else 16 // next(module.parameters()).element_size()
    return math.gcd(stack.num_units, numbers)


def _member(name: str, module: nn.Module, stack: Stack, side: str) -> Member:
    pruner, node = ExpertsPruner(stack), Node(module, None, name)  # type: ignore[arg-type]
    cut = pruner.prune_in_channels if side == "in" else pruner.prune_out_channels
    size, positions = stack.axis_size(module, side), stack.positions(module, side)
    return Member((name, side), Dependency(cut, cut, node, node), size, Positions.by_root(positions))
