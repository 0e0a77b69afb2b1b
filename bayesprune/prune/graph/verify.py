"""Checks channel groups by experiment: channels put in another order, everywhere, must change nothing but the order.

A wrong index in the dependency graph, as where channels are put in reverse, often gives a model that still runs
once channels are gone, on the wrong ones. A permutation shows it at the cost of a few forwards.

Compared is what every layer reads, and the outputs. So a small branch beside a large stream is judged by its own size,
outputs that are constant or no numbers hide nothing, and it is known what the comparison could have shown: a group
whose order makes no difference to what reads it is tried again with random weights, and not offered if that does not
help.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.foundation.kinds import kind_of
from bayesprune.foundation.model import run_forward
from bayesprune.layers.stacks import select
from bayesprune.prune.graph.cuts import Axis, Member, cut_parameters, is_depthwise, num_blocks, num_stacked
from bayesprune.prune.graph.links import moving
from bayesprune.prune.graph.removal import SHAPE_ERRORS, snapshot
from bayesprune.prune.graph.roots import is_root
from bayesprune.prune.graph.silenced import randomise
from bayesprune.prune.graph.steady import steady
from bayesprune.prune.graph.structure import ChannelGroup
from bayesprune.prune.graph.trace import tensors_in

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Largest difference, relative to what an order that nothing follows changes; 0.1 in lower precision."""

UNCHECKED = (
    "its place in the dependency graph cannot be checked: on these example_inputs nothing that reads its channels "
    "depends on their order (all zero, all equal, or not finite); pass example_inputs from the data, or leave it whole"
)

_FEW = 8  # units; the orders of fewer may be alike by chance
_MARGIN = 10.0  # over what rounding does, which is known by its size alone

_Key = tuple[str, int]  # a layer and the number of its call; "" and a number for an output of the model


def unverified(model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: Any) -> dict[ChannelGroup, str]:
    """The groups whose channels do not hang together as the graph says, or may not, with the reason.

    The model is as before afterwards. A few wrong ones among many are found by halves, in a number of forwards that
    grows with the logarithm of the many.
    """
    if not groups:
        return {}
    experiment = _Experiment(model, example_inputs)
    reasons = experiment.wrong(groups)
    rest = [group for group in groups if group not in reasons and not experiment.tells(group, every_reader=True)]
    if rest:
        undo = snapshot(model)
        try:
            generator = torch.Generator().manual_seed(0)
            for group in rest:
                randomise(model, group, generator)
            experiment = _Experiment(model, example_inputs)
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
        """What the layer of this axis reads, in this order."""
        return tensor.index_select(_dim(self.member.layer, tensor), self.order.to(tensor.device))


def permute(model: nn.Module, groups: Iterable[ChannelGroup], *, linked: bool = True) -> dict[Axis, Order]:
    """Puts the channels of all groups in another order, in place, by new parameters.

    Args:
        model: That the groups are of.
        groups: Each gets an order of its own, in which no unit stays where it is.
        linked: Whether what makes the channels and what reads them follow alike; otherwise the readers alone move.
    """
    orders = _orders(groups)
    for order in orders.values():
        if linked or _reads(order.member):
            _permute(model, order.member, order.order)
    return orders


def _orders(groups: Iterable[ChannelGroup]) -> dict[Axis, Order]:
    orders: dict[Axis, Order] = {}
    for number, group in enumerate(groups):
        shuffled = torch.tensor(_without_fixed_points(len(group.units), f"{group.name} {group.attention}"))
        for member in group.members:
            size = member.size
            start = Order(member, torch.arange(size), torch.full((size,), -1))
            found = orders.setdefault(member.axis, start)
            by_unit = _by_unit(group, member)
            found.order[by_unit] = by_unit[shuffled]
            found.owner[by_unit] = number
    return orders


def _rounds(groups: Sequence[ChannelGroup]) -> list[list[ChannelGroup]]:
    """Groups that are tried together: all with many units, and of any two with few in one round one alone."""
    few = [group for group in groups if len(group.units) < _FEW]
    rounds = [[g for n, g in enumerate(few, 1) if n >> bit & 1] for bit in range(len(few).bit_length())]
    many = [group for group in groups if len(group.units) >= _FEW]
    return [*rounds[:-1], many + rounds[-1]] if rounds else [many]


def _by_unit(group: ChannelGroup, member: Member) -> Tensor:
    """Positions along the member's axis, (units, positions of each), which are equally many."""
    roots = (root for unit in group.units for root in unit)
    return torch.tensor([p for root in roots for p in member.positions.get(root, ())]).view(len(group.units), -1)


def _without_fixed_points(size: int, seed: str) -> list[int]:
    """A random cyclic order (Sattolo's)."""
    order, numbers = list(range(size)), random.Random(seed)
    for last in range(size - 1, 0, -1):
        other = numbers.randrange(last)
        order[last], order[other] = order[other], order[last]
    return order


def _reads(member: Member) -> bool:
    return member.axis[1] == "in"


def _permute(model: nn.Module, member: Member, order: Tensor) -> None:
    layer = member.layer
    if isinstance(layer, Tensor):
        path, _, name = member.axis[0].rpartition(".")
        _replace(model.get_submodule(path), name, member.dependency.target.pruning_dim, order)
        return
    for name, dim in cut_parameters(layer, member.axis[1]):
        # The blocks of a grouped convolution all have the same order inside.
        inside = order[: member.size // num_blocks(member)] if _reads(member) else order
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

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model, self.example_inputs = model, example_inputs
        self.layers = {name: module for name, module in model.named_modules() if is_root(module)}
        self.seen = self._run()
        self.known_rounding: dict[_Key, Tensor] | None = None

    @property
    def rounding(self) -> dict[_Key, Tensor]:
        """What a change of one unit in the last place, in all that layers read, does to each observation."""
        if self.known_rounding is None:
            self.known_rounding = self._changes(lambda: None, jitter=True)
        return self.known_rounding

    def wrong(self, groups: Sequence[ChannelGroup]) -> dict[ChannelGroup, str]:
        """The groups that are not left alone by another order of their channels, and who is not."""
        unlinked = self._changes(lambda: permute(self.model, groups, linked=False))
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
            for key in self._keys(order.member.axis) if _reads(order.member) else ():
                before = self.seen[key]
                change = (order.of(before) - before).abs().max()
                found.append(self._is_visible(key, change))
        if found:
            return all(found) if every_reader else any(found)
        changes = self._changes(lambda: self._move_one_axis(group))  # it is read by operations alone
        return any(self._is_visible(key, changes[key].max()) for key in self.seen if self.seen[key].isfinite().all())

    def _move_one_axis(self, group: ChannelGroup) -> None:
        order = next(iter(_orders([group]).values()))
        _permute(self.model, order.member, order.order)

    def _keys(self, axis: Axis) -> list[_Key]:
        return [key for key, seen in self.seen.items() if key[0] == axis[0] and seen.isfinite().all()]

    def _is_visible(self, key: _Key, change: Tensor) -> bool:
        seen = self.seen[key]
        floor = 100 * torch.finfo(seen.dtype).eps * seen.abs().max()
        if self.known_rounding is not None:
            floor = torch.maximum(floor, 10 * _MARGIN * self.known_rounding[key].max())
        return bool(change > floor)

    def _differs(self, groups: Sequence[ChannelGroup], unlinked: dict[_Key, Tensor]) -> str | None:
        """What sees more than another order when these groups get one; None where nothing does."""
        undo = snapshot(self.model)
        try:
            orders = permute(self.model, groups)
            found = self._run()
        except SHAPE_ERRORS as error:  # as where two groups ask for orders that no layer can have
            return f"the model does not run with its channels in another order ({type(error).__name__})"
        finally:
            undo()
        for key, before in self.seen.items():
            name, layer = key[0], self.layers.get(key[0])
            order = orders.get((name, "out" if layer is not None and is_depthwise(layer) else "in"))
            if before.isfinite().all() and not self._is_right(key, found.get(key), order, unlinked[key]):
                who = f"{name} does not read" if layer is not None else "the model does not give"
                return (
                    f"with its channels in another order {who} the same, so the dependency graph is wrong about it: "
                    f"{moving(groups[0].group)} in between moves or counts channels in a way that no graph shows; do "
                    "that by reshape, cat and split with the channels first"
                )
        return None

    def _is_right(self, key: _Key, found: Tensor | None, order: Order | None, unlinked: Tensor) -> bool:
        before = self.seen[key]
        if found is None or found.shape != before.shape:  # another number of proposals, say, after the least change
            return bool(self.rounding[key].isinf().any())
        if not unlinked.isfinite().all():
            unlinked = (before - before.mean()).abs().max()[None]
        if order is None:
            pairs = [((found - before).abs().max(), unlinked.max())]
        else:
            expected = order.of(before)
            errors, moved = (_by_channel(order.member.layer, x) for x in (found - expected, expected - before))
            owner = order.owner.to(errors.device)
            reference = torch.where(owner < 0, unlinked, moved)
            pairs = [(errors[part].max(), reference[part].max()) for part in (owner == n for n in owner.unique())]
        tolerance = TOLERANCE.get(before.dtype, 0.1)
        # A difference that is not a number passes neither.
        return all(e <= tolerance * r or e <= _MARGIN * self.rounding[key].max() for e, r in pairs)

    def _changes(self, prepare: Callable[[], Any], *, jitter: bool = False) -> dict[_Key, Tensor]:
        """The change of each observation, by channel where a layer reads it; infinite where it cannot be compared."""
        undo = snapshot(self.model)
        try:
            prepare()
            found = self._run(jitter=jitter)
        except SHAPE_ERRORS:
            found = {}
        finally:
            undo()
        changes = {}
        for key, before in self.seen.items():
            after, layer = found.get(key), self.layers.get(key[0])
            if after is None or after.shape != before.shape:
                changes[key] = torch.full((1,), torch.inf, device=before.device)
            else:
                change = (after - before).nan_to_num(torch.inf)
                changes[key] = change.abs().flatten() if layer is None else _by_channel(layer, change)
        return changes

    def _run(self, *, jitter: bool = False) -> dict[_Key, Tensor]:
        """What every layer reads, call by call, and the outputs, as far as they are real numbers."""
        seen: dict[_Key, Tensor] = {}
        calls: Counter[str] = Counter()

        def see(name: str, tensor: Any) -> bool:
            is_seen = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() > 0
            if is_seen:
                seen[name, calls[name]] = tensor.clone()  # what reads it may write into it
                calls[name] += 1
            return is_seen

        def read(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args and see(name, args[0]) and jitter:
                return (_jittered(args[0]), *args[1:]), kwargs
            if not args:
                see(name, next(iter(kwargs.values()), None))
            return None

        handles = [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: read(name, args, kwargs), with_kwargs=True
            )
            for name, layer in self.layers.items()
        ]
        try:
            with steady(self.model):
                for tensor in tensors_in(run_forward(self.model, self.example_inputs)):
                    see("", tensor)
        finally:
            for handle in handles:
                handle.remove()
        return seen


def _jittered(tensor: Tensor) -> Tensor:
    """The same up to one unit in the last place."""
    signs = (torch.arange(tensor.numel(), device=tensor.device) * 7919 % 5 % 3 - 1).view(tensor.shape)
    return tensor * (1 + signs * torch.finfo(tensor.dtype).eps).to(tensor.dtype)


def _by_channel(layer: Any, difference: Tensor) -> Tensor:
    """The largest value for each channel that a layer reads."""
    return difference.abs().movedim(_dim(layer, difference), 0).unsqueeze(-1).flatten(1).amax(1)  # (O,) alone, too


def _dim(layer: Any, tensor: Tensor) -> int:
    """The dimension of the channels in what a layer reads; a convolution of one's own may move it itself."""
    kind = kind_of(layer)
    usual = tensor.dim() + kind.feature_dim
    if not kind.num_spatial_dims:
        return usual
    others = [dim for dim, size in enumerate(tensor.shape) if size == layer.in_channels]
    return usual if usual in others or not others else others[-1]
