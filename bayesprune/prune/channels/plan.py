"""How many channels leave each group: an exact cost model, and the selection that meets a target with least removed.

Every cost (MACs of a layer, size of a parameter) is its dense value times the kept fraction of the axes that it has, so
the cost of a plan is integer arithmetic and needs no model.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from bayesprune.layers import VariationalLayer, named_gates
from bayesprune.prune.graph.cuts import Axis, cut_parameters, num_stacked
from bayesprune.prune.graph.structure import ChannelGroup

Counts = Sequence[int]
"""Units removed from each group."""

FLOOR = Fraction(1, 10)


@dataclass(frozen=True)
class Term:
    """One part of a cost: its dense value, the axes that it shrinks with, and the layer that it belongs to."""

    dense: int
    axes: tuple[Axis, ...]
    layer: str


@dataclass(frozen=True)
class CostModel:
    """What a model costs when channels are removed.

    Attributes:
        groups: Its groups.
        terms: The parts by name of the cost ("macs", "params").
    """

    groups: tuple[ChannelGroup, ...]
    terms: dict[str, tuple[Term, ...]]

    @property
    def layers(self) -> set[str]:
        """What loses channels, with its modules of attention."""
        axes = {member.axis[0] for group in self.groups for member in group.members}
        return axes | {name for group in self.groups for name in group.attention}

    def cost(self, what: str, removed: Counts) -> int:
        """The cost after these numbers of units were removed."""
        return sum(self.parts(what, removed).values())

    def saved(self, what: str) -> list[int]:
        """What one unit of each group saves, while all others are there."""
        none = [0] * len(self.groups)
        dense = self.cost(what, none)
        return [dense - self.cost(what, [int(other == group) for other in self.groups]) for group in self.groups]

    def parts(self, what: str, removed: Counts) -> dict[str, int]:
        """The cost by layer after these numbers of units were removed."""
        sizes: dict[Axis, int] = {}
        kept: dict[Axis, int] = {}
        for group, count in zip(self.groups, removed, strict=True):
            for member in group.members:
                sizes[member.axis] = member.size
                kept.setdefault(member.axis, member.size)
                kept[member.axis] -= count * group.positions_per_unit(member)
        parts: dict[str, int] = defaultdict(int)
        for term in self.terms[what]:
            axes = [axis for axis in term.axes if axis in sizes]
            numerator = term.dense * math.prod(kept[axis] for axis in axes)
            parts[term.layer] += numerator // math.prod(sizes[axis] for axis in axes)
        return dict(parts)


def cost_model(model: nn.Module, groups: tuple[ChannelGroup, ...], macs: Mapping[str, int]) -> CostModel:
    """The cost model of a model whose dense MACs by module are known.

    The stds of variational layers do not count as parameters; a tied parameter counts once.
    """
    axes: dict[int, dict[int, Axis]] = defaultdict(dict)  # of a parameter, by its dimension
    sides: dict[str, list[Axis]] = defaultdict(list)
    for axis, layer in {member.axis: member.layer for group in groups for member in group.members}.items():
        if isinstance(layer, Tensor):
            axes[id(layer)][0] = axis
            continue
        if axis[1] == "in" or not num_stacked(layer):  # what experts put out and take in are the same units
            sides[axis[0]].append(axis)
        for name, dim in cut_parameters(layer, axis[1]):
            axes[id(layer._parameters[name])].setdefault(dim, axis)  # every holder of a tied parameter is cut alike
    for group in groups:
        for name in group.attention:
            sides[name].append(group.members[0].axis)
    stock = {id(parameter): (layer, parameter) for layer, parameter in stock_parameters(model)}
    params = tuple(Term(p.numel(), tuple(axes[key].values()), layer) for key, (layer, p) in stock.items())
    counted = tuple(Term(count, tuple(sides[name]), name) for name, count in macs.items())
    return CostModel(groups, {"macs": counted, "params": params})


def stock_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Layer and parameter for what the stock model has too, tied ones under every holder: no stds, no gates."""
    gates = {gate for _, gate in named_gates(model)}
    for name, module in ((name, module) for name, module in model.named_modules() if module not in gates):
        stds: set[int] = set()
        if isinstance(module, VariationalLayer):
            stds = {id(part) for key in module.active_names() for part in module.log_std_parts(key)}
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in stds:
                yield name, parameter


@dataclass(frozen=True)
class Block:
    """Units of one group that leave in one step, so that its kept channels stay a multiple of `round_to`."""

    group: int
    units: int
    key: Any


def blocks(
    groups: Sequence[ChannelGroup], scores: Sequence[Sequence[float]], *, uniform: bool, round_to: int
) -> list[list[Block]]:
    """The order in which channels leave, as levels of blocks that leave together; a floor per group never leaves.

    Ranked globally, a level is one block, by the mean score of a channel in it. Ranked inside groups, it is every block
    by which a group reaches the same kept fraction, to the nearest that it can.

    Args:
        groups: The groups.
        scores: Scores of each group's units per channel, any order.
        uniform: Rank inside groups.
        round_to: Kept channels are a multiple of this.
    """
    found: list[Block] = []
    for index, (group, values) in enumerate(zip(groups, scores, strict=True)):
        ascending, removed = sorted(values), 0
        for units in _reachable(group, round_to):
            if uniform:
                key: Any = Fraction(2 * removed + units, 2 * len(ascending))
            else:
                key = math.fsum(ascending[removed : removed + units]) / units
            found.append(Block(index, units, key))
            removed += units
    levels: dict[Any, list[Block]] = defaultdict(list)
    for number, block in enumerate(found):
        levels[block.key if uniform else (block.key, number)].append(block)
    return [levels[key] for key in sorted(levels)]


def fewest(model: CostModel, levels: Sequence[list[Block]], what: str, budget: float, *, gives_back: bool) -> list[int]:
    """Units to remove from each group: the shortest prefix of the levels whose cost is within the budget.

    All levels where none is.

    Args:
        model: What removal saves.
        levels: The order in which blocks leave.
        what: The cost.
        budget: What it may be.
        gives_back: Whether blocks stay after all that the budget has room for, the last to leave first.
    """
    low, high = 0, len(levels)
    while low < high:
        middle = (low + high) // 2
        if model.cost(what, totals(model.groups, levels[:middle])) <= budget:
            high = middle
        else:
            low = middle + 1
    counts = totals(model.groups, levels[:low])
    if not gives_back or model.cost(what, counts) > budget:
        return counts
    leaving: set[int] = set()
    for block in (block for level in reversed(levels[:low]) for block in level):
        if block.group not in leaving:
            counts[block.group] -= block.units
            if model.cost(what, counts) > budget:
                counts[block.group] += block.units
                leaving.add(block.group)
        if len(leaving) == len(model.groups):
            break
    return counts


def totals(groups: Sequence[ChannelGroup], levels: Iterable[list[Block]]) -> list[int]:
    """Units that these levels remove from each group."""
    counts = [0] * len(groups)
    for block in (block for level in levels for block in level):
        counts[block.group] += block.units
    return counts


def below(
    groups: Sequence[ChannelGroup], scores: Sequence[Sequence[float]], threshold: float, round_to: int
) -> list[int]:
    """Units of each group that score below a threshold, as far as its floor and `round_to` allow."""
    counts = []
    for group, values in zip(groups, scores, strict=True):
        candidates, removed = sum(value < threshold for value in values), 0
        for units in _reachable(group, round_to):
            removed += units if removed + units <= candidates else 0
        counts.append(removed)
    return counts


def _reachable(group: ChannelGroup, round_to: int) -> list[int]:
    """Numbers of units that leave one after the other, from all channels down to the floor."""
    size = 1 if group.num_experts else group.unit_size  # every expert has a layer of its own
    multiple = math.lcm(round_to // math.gcd(round_to, size), group.multiple)
    floor = max(round_to, math.ceil(FLOOR * len(group.units) * size))
    kept, steps = len(group.units), []
    while True:
        step = kept % multiple or multiple
        if (kept - step) * size < floor:
            return steps
        steps.append(step)
        kept -= step
