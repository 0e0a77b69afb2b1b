"""Which weights leave together, as plain data for priors: units of channels or heads, and their place in parameters."""

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from bayesprune.priors import DependencyGroup, Member
from bayesprune.prune.graph.find import find_groups
from bayesprune.prune.graph.group import GRANULARITY, ChannelGroup, cut_parameters
from bayesprune.prune.graph.group import Member as CutMember
from bayesprune.prune.graph.prunable_layers import Layers


def dependency_groups(
    model: nn.Module,
    example_inputs: Any,
    *,
    granularity: Collection[str] = GRANULARITY,
    ignored_layers: Layers = (),
) -> tuple[DependencyGroup, ...]:
    """The units of a model that `prune_channels` removes whole, with their place in every parameter; changes nothing.

    A unit's members are the output rows of the layers that make it, the input slices of those that read it, and the
    scales and shifts of norms in between. `priors.ARD`, `priors.Horseshoe` and `priors.GroupLasso` take them as what
    shares a scale.

    Args:
        model: With variational layers or without; the groups are the same.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        granularity: Which of "heads", "mlp" and "width" may go.
        ignored_layers: Layers, or their names, with everything inside them, whose output channels all stay.

    Raises:
        UnsupportedModelError: torch-pruning cannot trace the model.
        ValueError: no channel of the model can be removed.
    """
    structure = find_groups(model, example_inputs, granularity=granularity, ignored_layers=ignored_layers)
    groups = [group for group in structure.groups if not group.num_experts]  # whose units have no fixed partners
    if not groups:
        shown = ", ".join(f"{name} ({reason})" for name, reason in list(structure.left_whole.items())[:5])
        raise ValueError(f"no group of channels or heads can be removed; left whole: {shown or 'all there is'}.")
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # tied ones under their first name
    return tuple(_plain(group, names) for group in groups)


def _plain(group: ChannelGroup, names: dict[int, str]) -> DependencyGroup:
    unit_of = {channel: number for number, unit in enumerate(group.units) for channel in unit}
    found: dict[tuple[str, int], list[int]] = {}
    for member in group.members:
        for parameter, dim in _parameters(member):
            if id(parameter) not in names:
                continue  # a buffer
            size = parameter.shape[dim]
            units = found.setdefault((names[id(parameter)], dim), [-1] * size)
            for channel, positions in member.positions.items():
                for position in positions:  # a grouped convolution loses the same input of every block
                    units[position % size] = unit_of[channel]
    members = tuple(Member(name, dim, tuple(units)) for (name, dim), units in found.items())
    return DependencyGroup(group.name, len(group.units), members)


def _parameters(member: CutMember) -> Iterator[tuple[Any, int]]:
    layer = member.layer
    if isinstance(layer, nn.Module):
        yield from ((layer._parameters[name], dim) for name, dim in cut_parameters(layer, member.axis[1]))
    else:
        yield layer, member.dependency.target.pruning_dim
