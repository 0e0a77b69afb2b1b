"""An exact cost model of channels, and the numbers to remove from each group that meet a target with least removed.

Every cost (MACs of a layer, size of a parameter) is its dense value times the kept fraction of the axes that it has, so
the cost of a plan is integer arithmetic and needs no model.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.errors import InfeasibleTargetError
from bayesprune.foundation import defaults
from bayesprune.foundation.text import first_names
from bayesprune.layers import VariationalLayer, named_auxiliaries
from bayesprune.prune.graph.group import Axis, ChannelGroup, cut_parameters, num_stacked

Counts = Sequence[int]
"""Units removed from each group."""

_FLOOR = Fraction(str(defaults.CHANNEL_FLOOR))  # exact: a tenth of 30 is 3


@dataclass(frozen=True)
class Term:
    """One part of a cost: its dense value, the axes that it shrinks with, and the layer that it belongs to."""

    dense: int
    axes: tuple[Axis, ...]
    layer: str


@dataclass(frozen=True)
class CostModel:
    """The cost of a model as a function of the channels removed.

    Attributes:
        groups: Its groups.
        terms: The parts by name of the cost ("macs", "params", "latency").
    """

    groups: tuple[ChannelGroup, ...]
    terms: dict[str, tuple[Term, ...]]

    @property
    def layers(self) -> set[str]:
        """Names of the layers and modules of attention that lose channels."""
        axes = {member.axis[0] for group in self.groups for member in group.members}
        return axes | {name for group in self.groups for name in group.attention}

    def cost(self, what: str, removed: Counts) -> int:
        """The cost after these numbers of units were removed."""
        return sum(self.parts(what, removed).values())

    def saved(self, what: str) -> list[int]:
        """The cost that one unit of each group saves, while all others are there."""
        running = _Running(self, what, [0] * len(self.groups))
        found = []
        for group in range(len(self.groups)):
            dense = running.cost
            found.append(dense - running.remove(group, 1))
            running.remove(group, -1)
        return found

    @cached_property
    def _sizes(self) -> dict[Axis, int]:
        return {member.axis: member.size for group in self.groups for member in group.members}

    @cached_property
    def _steps(self) -> list[list[tuple[Axis, int]]]:
        """Of each group the axes, and how much of an axis leaves with a unit of it."""
        return [[(member.axis, group.positions_per_unit(member)) for member in group.members] for group in self.groups]

    def parts(self, what: str, removed: Counts) -> dict[str, int]:
        """The cost by layer after these numbers of units were removed."""
        kept, parts = self._kept(removed), defaultdict(int)
        for term in self.terms[what]:
            parts[term.layer] += self._value(term, kept)
        return dict(parts)

    def _kept(self, removed: Counts) -> dict[Axis, int]:
        kept = dict(self._sizes)
        for count, steps in zip(removed, self._steps, strict=True):
            for axis, each in steps:
                kept[axis] -= count * each
        return kept

    def _value(self, term: Term, kept: Mapping[Axis, int]) -> int:
        axes = [axis for axis in term.axes if axis in kept]
        numerator = term.dense * math.prod(kept[axis] for axis in axes)
        return numerator // math.prod(self._sizes[axis] for axis in axes)


class _Running:
    """A cost that follows the numbers of units removed, one group at a time, by the terms that the group shrinks.

    Attributes:
        cost: The cost as it is now.
    """

    def __init__(self, model: CostModel, what: str, removed: Counts) -> None:
        self.cost = model.cost(what, removed)
        self._model, self._kept = model, model._kept(removed)
        by_axis: dict[Axis, dict[int, Term]] = defaultdict(dict)
        for number, term in enumerate(model.terms[what]):
            for axis in term.axes:
                by_axis[axis][number] = term
        self._by_axis = by_axis

    def remove(self, group: int, units: int) -> int:
        """The cost with so many more units of the group removed, or fewer, which it is from then on."""
        steps = self._model._steps[group]
        terms = {number: term for axis, _ in steps for number, term in self._by_axis.get(axis, {}).items()}.values()
        self.cost -= sum(self._model._value(term, self._kept) for term in terms)
        for axis, each in steps:
            self._kept[axis] -= units * each
        self.cost += sum(self._model._value(term, self._kept) for term in terms)
        return self.cost


def cost_model(
    model: nn.Module,
    groups: tuple[ChannelGroup, ...],
    macs: Mapping[str, int],
    seconds: Mapping[str, float] | None = None,
) -> CostModel:
    """The cost model of a model whose dense MACs, and for a latency seconds, by module are known.

    The stds of variational layers do not count as parameters; a tied parameter counts once. The latency is that of the
    modules that lose channels, in nanoseconds: what all others take does not shrink with any plan.
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
    timed = ((name, round(1e9 * time)) for name, time in (seconds or {}).items())
    latency = tuple(Term(time, tuple(sides[name]), name) for name, time in timed if name in sides)
    return CostModel(groups, {"macs": counted, "params": params, "latency": latency})


def stock_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Layer and parameter for what the stock model has too, tied ones under every holder: no stds, no gates."""
    others = {module for _, module in named_auxiliaries(model)}
    for name, module in ((name, module) for name, module in model.named_modules() if module not in others):
        stds: set[int] = set()
        if isinstance(module, VariationalLayer):
            stds = {id(part) for key in module.active_names() for part in module.log_std_parts(key)}
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in stds:
                yield name, parameter


@dataclass(frozen=True)
class Order:
    """The order in which units leave, by blocks of one group that leave in one step.

    Attributes:
        groups: The group of each block, by its number, (blocks,).
        units: How many units leave with each block, (blocks,).
        levels: How many blocks have left once each level has: those of one level leave together.
    """

    groups: Tensor
    units: Tensor
    levels: Sequence[int]

    def totals(self, num_groups: int, num_levels: int) -> list[int]:
        """Units that so many levels remove from each group."""
        end = self.levels[num_levels - 1] if num_levels else 0
        counts = torch.zeros(num_groups, dtype=torch.long)
        return counts.index_add_(0, self.groups[:end], self.units[:end]).tolist()


def order(groups: Sequence[ChannelGroup], scores: Sequence[Sequence[float]], *, uniform: bool, round_to: int) -> Order:
    """The order in which channels leave; a floor per group never leaves.

    Ranked globally, a level is one block, by the mean score of a channel in it. Ranked inside groups, it is every block
    by which a group reaches the same kept fraction, to the nearest that it can.

    Args:
        groups: The groups.
        scores: Scores of each group's units per channel, any order.
        uniform: Rank inside groups.
        round_to: Kept channels are a multiple of this, so that a block is what leaves to come to the next one.
    """
    of: list[int] = []
    units: list[int] = []
    keys: list[Any] = []
    for index, (group, values) in enumerate(zip(groups, scores, strict=True)):
        ascending, steps = sorted(values), _reachable(group, round_to)
        starts = accumulate(steps, initial=0)
        if uniform:
            keys += [Fraction(2 * start + step, 2 * len(ascending)) for start, step in zip(starts, steps, strict=False)]
        else:
            blocks = (ascending[start : start + step] for start, step in zip(starts, steps, strict=False))
            keys += [block[0] if len(block) == 1 else math.fsum(block) / len(block) for block in blocks]
        of += [index] * len(steps)
        units += steps
    ranked = sorted(range(len(keys)), key=keys.__getitem__)
    is_last = (not uniform or keys[one] != keys[other] for one, other in pairwise(ranked))
    levels = [number for number, ends in enumerate(is_last, 1) if ends] + [len(ranked)] * bool(ranked)
    places = torch.tensor(ranked, dtype=torch.long)
    return Order(torch.tensor(of, dtype=torch.long)[places], torch.tensor(units, dtype=torch.long)[places], levels)


def smallest_counts(model: CostModel, order: Order, what: str, budget: float, *, gives_back: bool) -> list[int]:
    """Units to remove from each group: the first levels of the order whose cost is within the budget.

    All levels where none is.

    Args:
        model: What removal saves.
        order: In which blocks leave.
        what: The cost.
        budget: What it may be.
        gives_back: Whether blocks stay after all that the budget has room for, the last to leave first.
    """
    num_groups, low, high = len(model.groups), 0, len(order.levels)
    while low < high:
        middle = (low + high) // 2
        if model.cost(what, order.totals(num_groups, middle)) <= budget:
            high = middle
        else:
            low = middle + 1
    counts = order.totals(num_groups, low)
    if not gives_back or model.cost(what, counts) > budget:
        return counts
    leaving: set[int] = set()
    running = _Running(model, what, counts)
    end = order.levels[low - 1] if low else 0
    for group, units in zip(order.groups[:end].flip(0).tolist(), order.units[:end].flip(0).tolist(), strict=True):
        if group not in leaving:
            if running.remove(group, -units) <= budget:
                counts[group] -= units
            else:
                running.remove(group, units)
                leaving.add(group)
        if len(leaving) == num_groups:
            break
    return counts


def counts_for(groups: Sequence[ChannelGroup], sizes: Mapping[str, int], left_whole: Mapping[str, str]) -> list[int]:
    """Units that leave each group for it to keep so many channels; groups without a size stay whole.

    Raises:
        ValueError: a name is that of no group.
        InfeasibleTargetError: a group cannot keep so many, or lose any.
    """
    by_name = {group.name: group for group in groups}
    for name, kept in sizes.items():
        if name in left_whole:
            reason = left_whole[name].rstrip(".")
            raise InfeasibleTargetError(
                f"the sizes ask {name} to keep {kept} channels, and it cannot lose any: {reason}. Leave it out of the "
                "sizes. Nothing was changed."
            )
        if name not in by_name:
            raise ValueError(
                f"the sizes name {name!r}, which is the root layer of no group of channels; expected some of "
                f"{first_names(by_name, most=8)}. Nothing was changed."
            )
        group = by_name[name]
        step = group.unit_size * group.multiple
        if kept > group.num_channels or kept % step:
            raise InfeasibleTargetError(
                f"the sizes ask {name} to keep {kept} of its {group.num_channels} channels; expected at most that, in "
                f"multiples of {step}. Nothing was changed."
            )
    return [(group.num_channels - sizes.get(group.name, group.num_channels)) // group.unit_size for group in groups]


def count_below(
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
    floor = max(round_to, math.ceil(_FLOOR * len(group.units) * size))
    kept, steps = len(group.units), []
    while True:
        step = kept % multiple or multiple
        if (kept - step) * size < floor:
            return steps
        steps.append(step)
        kept -= step
