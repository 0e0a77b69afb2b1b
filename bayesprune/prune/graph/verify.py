"""Checks channel groups by experiment: channels put in another order, everywhere, must change nothing but the order.

A wrong index in the dependency graph, as where channels are put in reverse, often gives a model that still runs
once channels are gone, on the wrong ones. A permutation shows it at the cost of a few forwards.

Compared is what every layer reads, and the outputs. So a small branch beside a large stream is judged by its own size,
outputs that are constant or no numbers hide nothing, and it is known what the comparison could have shown: a group
whose order makes no difference to what reads it is tried again with random weights, and not offered if that does not
help.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.foundation.kinds import kind_of
from bayesprune.foundation.model import steady_forward, tensors_in
from bayesprune.layers.stacks import select
from bayesprune.prune.graph.group import (
    Axis,
    ChannelGroup,
    Member,
    cut_parameters,
    is_depthwise,
    num_blocks,
    num_stacked,
)
from bayesprune.prune.graph.observe import Key, Observed, reading
from bayesprune.prune.graph.prunable_layers import is_root
from bayesprune.prune.graph.removal import SHAPE_ERRORS, snapshot
from bayesprune.prune.graph.trace import moving
from bayesprune.prune.graph.trials import randomise

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Largest difference, relative to what an order that nothing follows changes; 0.1 in lower precision."""

UNCHECKED = (
    "its place in the dependency graph cannot be checked: on these example_inputs nothing that reads its channels "
    "depends on their order (all zero, all equal, or not finite); pass example_inputs from the data, or leave it whole"
)

_FEW = 8  # units; the orders of fewer may be alike by chance
_MARGIN = 10.0  # over what rounding does, which is known by its size alone


def unverified(observed: Observed, groups: Sequence[ChannelGroup]) -> dict[ChannelGroup, str]:
    """The groups whose channels do not hang together as the graph says, or may not, with the reason.

    The model is as before afterwards. A few wrong ones among many are found by halves, in a number of forwards that
    grows with the logarithm of the many.
    """
    if not groups:
        return {}
    model, example_inputs = observed.model, observed.example_inputs
    experiment = _Experiment(model, example_inputs, observed.reads)
    reasons = experiment.wrong(groups)
    rest = [group for group in groups if group not in reasons and not experiment.tells(group, every_reader=True)]
    if rest:
        undo = snapshot(model)
        try:
            generator = torch.Generator().manual_seed(0)
            for group in rest:
                randomise(model, group, generator)
            experiment = _Experiment(model, example_inputs, _reads(model, example_inputs))
            reasons |= experiment.wrong(rest)
            reasons |= {g: UNCHECKED for g in rest if g not in reasons and not experiment.tells(g, every_reader=False)}
        finally:
            undo()
    return reasons


@dataclass(frozen=True)
class Order:
    """Another order of the positions of one axis.

    Attributes:
        member: One that has this axis.
        order: Which position moves to each place.
        owner: The number of the group whose position stands at each place; -1 for none.
    """

    member: Member
    order: Tensor
    owner: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """The inputs of the layer of this axis, in this order."""
        dim, order = _dim(self.member.layer, tensor), self.order.to(tensor.device)
        if dim == tensor.dim() - 1 > 1:  # of a matrix torch does this ten times as fast
            return tensor.flatten(0, -2).index_select(1, order).view(tensor.shape)
        return tensor.index_select(dim, order)


def permute(model: nn.Module, groups: Iterable[ChannelGroup], *, linked: bool = True) -> dict[Axis, Order]:
    """Puts the channels of all groups in another order, in place, by new parameters.

    Args:
        model: That the groups are of.
        groups: Each gets an order of its own, in which no unit stays where it is.
        linked: Whether what makes the channels and what reads them follow alike; otherwise the readers alone move.
    """
    orders = _orders(groups)
    for order in orders.values():
        if linked or _is_reader(order.member):
            _permute(model, order.member, order.order)
    return orders


def _orders(groups: Iterable[ChannelGroup]) -> dict[Axis, Order]:
    orders: dict[Axis, Order] = {}
    for number, group in enumerate(groups):
        shuffled = _without_fixed_points(len(group.units), f"{group.name} {group.attention}")
        for member in group.members:
            size = member.size
            start = Order(member, torch.arange(size), torch.full((size,), -1))
            found = orders.setdefault(member.axis, start)
            by_unit = member.positions.of(group.roots.flatten()).view(len(group.units), -1)
            found.order[by_unit] = by_unit[shuffled]
            found.owner[by_unit] = number
    return orders


def _rounds(groups: Sequence[ChannelGroup]) -> list[list[ChannelGroup]]:
    """Groups that are tried together: all with many units, and of any two with few in one round one alone."""
    few = [group for group in groups if len(group.units) < _FEW]
    rounds = [[g for n, g in enumerate(few, 1) if n >> bit & 1] for bit in range(len(few).bit_length())]
    many = [group for group in groups if len(group.units) >= _FEW]
    return [*rounds[:-1], many + rounds[-1]] if rounds else [many]


def _without_fixed_points(size: int, seed: str) -> Tensor:
    """A random order that is one cycle."""
    cycle = torch.randperm(size, generator=torch.Generator().manual_seed(zlib.crc32(seed.encode())))
    return torch.empty_like(cycle).index_copy_(0, cycle, cycle.roll(1))


def _is_reader(member: Member) -> bool:
    return member.axis[1] == "in"


def _permute(model: nn.Module, member: Member, order: Tensor) -> None:
    layer = member.layer
    if isinstance(layer, Tensor):
        path, _, name = member.axis[0].rpartition(".")
        _replace(model.get_submodule(path), name, member.dependency.target.pruning_dim, order)
        return
    for name, dim in cut_parameters(layer, member.axis[1]):
        # The blocks of a grouped convolution all have the same order inside.
        inside = order[: member.size // num_blocks(member)] if _is_reader(member) else order
        for key in (name, f"{name}_mask") if f"{name}_mask" in layer._buffers else (name,):
            _replace(layer, key, dim, inside, num_stacked(layer))
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


class _Experiment:
    """A model, its example, and what its layers read of it."""

    def __init__(self, model: nn.Module, example_inputs: Any, seen: dict[Key, Tensor]) -> None:
        self.model, self.example_inputs, self.seen = model, example_inputs, seen
        self.layers = {name: module for name, module in model.named_modules() if is_root(module)}
        self.sizes = {key: _by_channel(self.layers.get(key[0]), tensor) for key, tensor in seen.items()}
        self.finite = {key for key, size in self.sizes.items() if size.isfinite().all()}
        self.known_rounding: dict[Key, Tensor] | None = None

    @property
    def rounding(self) -> dict[Key, Tensor]:
        """What a change of one unit in the last place, in all that layers read, does to each observation."""
        if self.known_rounding is None:
            self.known_rounding = self._changes(lambda: None, jitter=True)
        return self.known_rounding

    def wrong(self, groups: Sequence[ChannelGroup]) -> dict[ChannelGroup, str]:
        """The groups that are not left alone by another order of their channels, and who is not."""
        unlinked = cache(lambda: self._changes(lambda: permute(self.model, groups, linked=False)))
        wrong: dict[ChannelGroup, str] = {}
        pending = _rounds(groups)
        while pending:
            some = [group for group in pending.pop() if group not in wrong]
            if not some or (differs := self._differs(some, unlinked)) is None:
                continue
            if len(some) == 1:
                wrong[some[0]] = differs
            else:
                pending += [some[len(some) // 2 :], some[: len(some) // 2]]
        return wrong

    def tells(self, group: ChannelGroup, *, every_reader: bool) -> bool:
        """Whether a wrong index would have been seen: the order matters to every, or to any, layer that reads it."""
        found = []
        for order in _orders([group]).values():
            found += [self._matters(key, order) for key in self._keys(order.member.axis) if _is_reader(order.member)]
        if found:
            return all(found) if every_reader else any(found)
        changes = self._changes(lambda: self._move_one_axis(group))  # it is read by operations alone
        return any(self._is_visible(key, changes[key].max()) for key in self.finite)

    def _matters(self, key: Key, order: Order) -> bool:
        before = self.seen[key]
        dim = _dim(order.member.layer, before)
        some = before[tuple(slice(None) if d == dim else slice(2) for d in range(before.dim()))]
        return any(self._is_visible(key, (order.of(part) - part).abs().max()) for part in (some, before))

    def _move_one_axis(self, group: ChannelGroup) -> None:
        order = next(iter(_orders([group]).values()))
        _permute(self.model, order.member, order.order)

    def _keys(self, axis: Axis) -> list[Key]:
        return [key for key in self.seen if key[0] == axis[0] and key in self.finite]

    def _is_visible(self, key: Key, change: Tensor) -> bool:
        floor = 100 * torch.finfo(self.seen[key].dtype).eps * self.sizes[key].max()
        if self.known_rounding is not None:
            floor = torch.maximum(floor, 10 * _MARGIN * self.known_rounding[key].max())
        return bool(change > floor)

    def _differs(self, groups: Sequence[ChannelGroup], unlinked: Callable[[], dict[Key, Tensor]]) -> str | None:
        """What sees more than another order when these groups get one; None where nothing does."""
        undo = snapshot(self.model)
        try:
            orders = permute(self.model, groups)
            sides = {name: "out" if is_depthwise(layer) else "in" for name, layer in self.layers.items()}
            read = {name: orders[name, side] for name, side in sides.items() if (name, side) in orders}
            found = self._errors(read)
        except SHAPE_ERRORS as error:  # as where two groups ask for orders that no layer can have
            return f"the model does not run with its channels in another order ({type(error).__name__})"
        finally:
            undo()
        for key in (key for key in self.seen if key in self.finite):
            name = key[0]
            if not self._is_right(key, found.get(key), read.get(name), unlinked):
                who = f"{name} does not read" if name in self.layers else "the model does not give"
                return (
                    f"with its channels in another order {who} the same, so the dependency graph is wrong about it: "
                    f"{moving(groups[0].group)} in between moves or counts channels in a way that no graph shows; do "
                    "that by reshape, cat and split with the channels first"
                )
        return None

    def _is_right(
        self, key: Key, errors: Tensor | None, order: Order | None, unlinked: Callable[[], dict[Key, Tensor]]
    ) -> bool:
        """Whether these errors, by channel, are no more than rounding."""
        if errors is None:  # another number of proposals, say, after the least change
            return bool(self.rounding[key].isinf().any())
        before, size = self.seen[key], self.sizes[key]
        tolerance = TOLERANCE.get(before.dtype, 0.1)
        if order is None:
            owner, errors, size = torch.zeros(1, device=errors.device), errors.max()[None], size.max()[None]
        else:
            owner, size = order.owner.to(errors.device), size[order.order.to(size.device)]
        parts = [owner == number for number in owner.unique()]
        if all(errors[part].max() <= 0.1 * tolerance * size[part].max() for part in parts):
            return True
        reference = unlinked()[key]
        if not reference.isfinite().all():
            reference = (before - before.mean()).abs().max()[None]
        if order is None:
            reference = reference.max()[None]
        else:
            moved = _by_channel(order.member.layer, order.of(before) - before)
            reference = torch.where(owner < 0, reference, moved)
        # A difference that is not a number passes neither.
        return all(
            errors[part].max() <= tolerance * reference[part].max()
            or errors[part].max() <= _MARGIN * self.rounding[key].max()
            for part in parts
        )

    def _changes(self, prepare: Callable[[], Any], *, jitter: bool = False) -> dict[Key, Tensor]:
        """The change of each observation, by channel where a layer reads it; infinite where it cannot be compared."""
        undo = snapshot(self.model)
        try:
            prepare()
            found = self._errors({}, jitter=jitter)
        except SHAPE_ERRORS:
            found = {}
        finally:
            undo()
        none = {key: torch.full((1,), torch.inf, device=seen.device) for key, seen in self.seen.items()}
        return none | {key: error.nan_to_num(torch.inf) for key, error in found.items() if error is not None}

    def _errors(self, orders: Mapping[str, Order], *, jitter: bool = False) -> dict[Key, Tensor]:
        """How far what layers read now is from what they read before, in these orders, by channel; and the outputs."""
        errors: dict[Key, Tensor] = {}

        def compare(key: Key, tensor: Tensor) -> Tensor | None:
            before = self.seen.get(key)
            if before is not None and before.shape == tensor.shape:
                expected = orders[key[0]].of(before) if key[0] in orders else before
                errors[key] = _by_channel(self.layers.get(key[0]), tensor - expected)
            return _jittered(tensor) if jitter and key[0] else None

        with reading(self.model, compare) as show:
            for tensor in tensors_in(steady_forward(self.model, self.example_inputs)):
                show("", tensor)
        return errors


def _reads(model: nn.Module, example_inputs: Any) -> dict[Key, Tensor]:
    """What layers read and the model puts out, in evaluation mode."""
    seen: dict[Key, Tensor] = {}

    def keep(key: Key, tensor: Tensor) -> None:
        seen[key] = tensor.clone()  # what reads it may write into it

    with reading(model, keep) as show:
        for tensor in tensors_in(steady_forward(model, example_inputs)):
            show("", tensor)
    return seen


def _jittered(tensor: Tensor) -> Tensor:
    """The same up to one unit in the last place."""
    signs = (torch.arange(tensor.numel(), device=tensor.device) * 7919 % 5 % 3 - 1).view(tensor.shape)
    return tensor * (1 + signs * torch.finfo(tensor.dtype).eps).to(tensor.dtype)


def _by_channel(layer: Any, difference: Tensor) -> Tensor:
    """The largest size for each channel that a layer reads, or of all where no layer does."""
    if layer is None or difference.dim() < 2:
        return difference.abs().flatten() if layer is not None else difference.abs().max()[None]
    dim = _dim(layer, difference)
    return difference.abs().amax([d for d in range(difference.dim()) if d != dim])


def _dim(layer: Any, tensor: Tensor) -> int:
    """The dimension of the channels in what a layer reads; a convolution of one's own may move it itself."""
    kind = kind_of(layer)
    usual = tensor.dim() + kind.feature_dim
    if not kind.num_spatial_dims:
        return usual
    others = [dim for dim, size in enumerate(tensor.shape) if size == layer.in_channels]
    return usual if usual in others or not others else others[-1]
