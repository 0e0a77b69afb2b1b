"""Which channels of a model must leave together, and which layers have to stay whole, with the reason.

torch-pruning's dependency graph says what hangs together. What it cannot know is decided here: heads of attention, the
model's outputs, tied weights, the equal blocks that grouped convolutions ask for.
"""

import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.dependency import Group

from bayesprune.convert import FROZEN
from bayesprune.foundation.text import first_names
from bayesprune.prune.graph.experts import find_experts
from bayesprune.prune.graph.group import (
    CUTTABLE,
    GRANULARITY,
    Axis,
    ChannelGroup,
    ChannelStructure,
    Member,
    Positions,
    axis_size,
    cut_parameters,
    misfit,
    num_blocks,
    overflows,
    side,
    tied_parameters,
)
from bayesprune.prune.graph.heads import find_heads
from bayesprune.prune.graph.internals import ElementwiseOperation
from bayesprune.prune.graph.observe import Observed
from bayesprune.prune.graph.prunable_layers import Layers, is_frozen, is_root, layer_names
from bayesprune.prune.graph.residual import Streams, attention_left, with_heads, with_sizes
from bayesprune.prune.graph.state_space import find_mixers
from bayesprune.prune.graph.trace import moving, quiet
from bayesprune.prune.graph.uncalled import whole_for_uncalled
from bayesprune.prune.graph.verify import unverified
from bayesprune.prune.graph.walk import Reached, largest_axis, walk

# Parts of the names that autograd gives products of activations, which mix channels in a way that no graph shows.
_PRODUCTS = ("Bmm", "Baddbmm", "ttention", "Einsum")

_INSIDE_ATTENTION = 'its outputs are dimensions of attention heads; whole heads go with "heads" in granularity'
_IN_A_PRODUCT = (
    "its outputs enter a product of activations, as in attention; whole heads go where the module of a product names "
    "their number, as num_heads"
)
_SHARED_BY_HEADS = "grouped-query attention shares its outputs among heads"
_NOT_CALLED = (
    "it is not called with example_inputs in evaluation mode: pass example_inputs with which it is, or delete it from "
    "the model if it is not needed"
)
_NO_HISTORY = "its outputs have no history, as under torch.inference_mode; torch.no_grad in the forward hides none"
_DEAD_END = (
    "what is made of its outputs is not seen, as where they are sorted, compared or turned into integers or NumPy, so "
    "they count as outputs of the model"
)
_OF_HEADS = (_INSIDE_ATTENTION, _IN_A_PRODUCT, _SHARED_BY_HEADS)


def find_groups(
    model: nn.Module,
    example_inputs: Any,
    *,
    granularity: Collection[str] = GRANULARITY,
    ignored_layers: Layers = (),
) -> ChannelStructure:
    """The channel groups, heads and units of experts of a model, checked by experiment; it is as before afterwards.

    Args:
        model: With variational layers or without.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        granularity: Which of "heads", "mlp" and "width" may go. With "heads" alone torch-pruning traces nothing.
        ignored_layers: Layers, or their names, with everything inside them, whose output channels all stay.

    Raises:
        UnsupportedModelError: torch-pruning cannot trace the model.
        ValueError: a layer to ignore is not in the model.
    """
    return groups_in(Observed(model, example_inputs), granularity=granularity, ignored_layers=ignored_layers)


def groups_in(
    observed: Observed, *, granularity: Collection[str] = GRANULARITY, ignored_layers: Layers = ()
) -> ChannelStructure:
    """Finds the groups, as `find_groups` does, of a model that was observed already."""
    model, example_inputs = observed.model, observed.example_inputs
    ignored_layers = [model.get_submodule(name) for name in layer_names(model, ignored_layers)]
    heads = experts = ChannelStructure((), {})
    if "heads" in granularity:
        heads = find_heads(observed, ignored_layers=ignored_layers)
        mixers = find_mixers(model, ignored_layers=ignored_layers)
        heads = _without_frozen(ChannelStructure((*heads.groups, *mixers.groups), heads.left_whole | mixers.left_whole))
    groups = {group.name: group for group in heads.groups}
    if "mlp" in granularity:
        experts = _without_frozen(find_experts(model, example_inputs, ignored_layers=ignored_layers))
        groups |= {group.name: group for group in experts.groups}
    if set(granularity) == {"heads"}:
        others = {n: _not_asked_for("heads") for n, module in model.named_modules() if is_root(module)}
        left_whole = others | heads.left_whole
    else:
        finder = _Finder(observed, ignored_layers, heads.groups)
        found, left_whole = finder.find(granularity)
        if set(granularity) >= {"heads", "width"}:
            attention = attention_left(observed, heads, ignored_layers)
            found = with_heads(model, example_inputs, found, attention, finder.members_of)
        groups |= {group.name: group for group in with_sizes(model, example_inputs, found)}
        left_whole |= {n: reason for n, reason in heads.left_whole.items() if left_whole.get(n) in _OF_HEADS}
    left_whole |= experts.left_whole
    for group, reason in unverified(observed, list(groups.values())).items():
        left_whole |= dict.fromkeys(group.layers, reason)
        del groups[group.name]
    covered = {layer for group in groups.values() for layer in (group.name, *(group.layers if group.attention else ()))}
    left_whole |= {name: FROZEN for name in left_whole if is_frozen(model.get_submodule(name))}
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    return ChannelStructure(
        tuple(sorted(groups.values(), key=lambda group: order[group.name])),
        {name: left_whole[name] for name in sorted(left_whole.keys() - covered, key=order.__getitem__)},
    )


def _without_frozen(found: ChannelStructure) -> ChannelStructure:
    """The same heads or experts, without those of modules with a frozen layer."""
    reasons = {group: reason for group in found.groups if (reason := _frozen(group.members))}
    left_whole = found.left_whole | {layer: reason for group, reason in reasons.items() for layer in group.layers}
    return ChannelStructure(tuple(group for group in found.groups if group not in reasons), left_whole)


def _frozen(members: Iterable[Member]) -> str | None:
    """Why these stay whole, where one of them is frozen: its inputs do not go either."""
    name = next((member.axis[0] for member in members if is_frozen(member.layer)), None)
    return None if name is None else f"{name}, which would lose channels too, is frozen (requires_grad=False)"


def _not_asked_for(what: str) -> str:
    return f"granularity asks for {what} alone"


class _LeftWholeError(Exception):
    """Some layers keep all their channels."""

    def __init__(self, reason: str, layers: Iterable[nn.Module] = ()) -> None:
        super().__init__(reason)
        self.reason, self.layers = reason, list(layers)


class _Finder:
    """Examines one root layer after the other."""

    def __init__(self, observed: Observed, ignored_layers: Iterable[nn.Module], heads: Iterable[ChannelGroup]) -> None:
        model, trace = observed.model, observed.trace
        self.model, self.example_inputs = model, observed.example_inputs
        self.trace, self.bound = trace, largest_axis(trace.graph)
        self.names = {id(module): name for name, module in model.named_modules()}
        self.names |= {id(parameter): name for name, parameter in model.named_parameters()}
        self.names |= {id(buffer): name for buffer, name in trace.buffers.items()}
        self.ignored = {module for layer in ignored_layers for module in layer.modules()}
        self.holders = tied_parameters(model)
        self.tied = {id(module) for holders in self.holders.values() for module, _ in holders}
        self.claimed: dict[Axis, list[Tensor]] = defaultdict(list)
        for group in heads:
            self._claim(group.members)

    def find(self, granularity: Collection[str]) -> tuple[list[ChannelGroup], dict[str, str]]:
        """All groups of this kind, and why layers stay whole."""
        modules = self.trace.graph.module2node
        streams = None if set(granularity) >= {"mlp", "width"} else Streams(self.trace.graph)
        groups: list[ChannelGroup] = []
        left_whole: dict[str, str] = {}
        done: set[Any] = set()
        for root in [module for module in modules if is_root(module)]:
            if root in done:
                continue
            try:
                found = self.group_of(root)
            except _LeftWholeError as left:
                left_whole |= {self.names[id(layer)]: left.reason for layer in (root, *left.layers)}
                done |= set(left.layers)
                continue
            done |= {member.layer for member in found.members if member.axis[1] == "out"}
            if streams is None or ("width" if streams.is_width(found) else "mlp") in granularity:
                groups.append(found)
            else:
                left_whole |= dict.fromkeys(found.layers, _not_asked_for(" and ".join(granularity)))
        unseen = {m: self._why_unseen(m) for m in self.model.modules() if is_root(m) and m not in modules}
        uncalled = [layer for layer, reason in unseen.items() if reason == _NOT_CALLED]
        if uncalled and groups:
            feeding = whole_for_uncalled(self.model, self.example_inputs, groups, uncalled)
            left_whole |= {layer: reason for group, reason in feeding.items() for layer in group.layers}
            groups = [group for group in groups if group not in feeding]
            self._warn_of(uncalled, feeding)
        return groups, left_whole | {self.names[id(layer)]: reason for layer, reason in unseen.items()}

    def _why_unseen(self, layer: nn.Module) -> str:
        if layer in self.trace.called:
            return _NO_HISTORY
        if not any(parameter in self.trace.weights for parameter in layer.parameters(recurse=False)):
            return _NOT_CALLED
        holders = [m for m in self.model.modules() if layer in m.children()] or [self.model]
        holder = f"{self.names[id(holders[0])]} ({type(holders[0]).__name__})".strip()
        return f"{holder} or another module uses its weight without calling it, so no graph shows its channels"

    def _warn_of(self, uncalled: list[nn.Module], feeding: Collection[ChannelGroup]) -> None:
        whole = [layer for group in feeding for layer in group.layers]
        fed = (
            f"What may feed them stays whole: {first_names(whole)}" if whole else "No channels that feed them are known"
        )
        warnings.warn(
            f"example_inputs do not call {first_names([self.names[id(layer)] for layer in uncalled])}. {fed}. Pass "
            "example_inputs with which the model calls them, or delete them from the model if they are not needed.",
            stacklevel=2,
        )

    def group_of(self, root: nn.Module) -> ChannelGroup:
        self._check_layer(root)  # before its group is built: that does not end for some attention with rotary positions
        reached = self._reached(root)
        group = reached.group
        layers = [i.dep.layer for i in group if side(i.dep) == "out" and is_root(i.dep.layer)]
        try:
            for item in group:
                self._check_node(item.dep.target.module, side(item.dep))
            members = list(self._members(group))
            self._check_members(members, group)
            units = self._units(reached, members)
        except _LeftWholeError as left:
            raise _LeftWholeError(left.reason, layers) from None
        self._claim(members)
        return ChannelGroup(self.names[id(root)], group, tuple(units), tuple(members))

    def members_of(self, layer: nn.Module) -> list[Member]:
        """All that leaves with the outputs of a layer; nothing where that cannot be cut."""
        try:
            members = list(self._members(self._reached(layer).group))
        except _LeftWholeError:
            return []
        return [] if any(overflows(member) or misfit(member) for member in members) else members

    def _claim(self, members: Iterable[Member]) -> None:
        for member in members:
            self.claimed[member.axis].append(member.positions.places)

    def _reached(self, root: nn.Module) -> Reached:
        try:
            with quiet():
                return walk(self.trace.graph, root, bound=self.bound)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise _LeftWholeError(
                f"torch-pruning fails to follow its channels ({type(error).__name__}: {error})"
            ) from error

    def _check_layer(self, layer: nn.Module) -> None:
        if layer in self.ignored:
            raise _LeftWholeError("ignored_layers")
        if layer in self.trace.outputs:
            raise _LeftWholeError("it is an output of the model")
        if layer in self.trace.dead_ends:
            raise _LeftWholeError(_DEAD_END)
        if layer in self.trace.inside_attention:
            raise _LeftWholeError(_INSIDE_ATTENTION)

    def _check_node(self, node: Any, cut_side: str) -> None:
        if isinstance(node, ElementwiseOperation) and any(part in str(node._grad_fn) for part in _PRODUCTS):
            raise _LeftWholeError(_IN_A_PRODUCT)
        if cut_side == "out" and isinstance(node, nn.Module):
            self._check_layer(node)
        if id(node) in self.names and not isinstance(node, CUTTABLE) and not is_root(node):
            raise _LeftWholeError(
                f"{self.names[id(node)]} ({type(node).__name__}) stays whole, for no cut of such a module is known"
            )

    def _members(self, group: Group) -> Iterator[Member]:
        for item in group:
            layer = item.dep.layer
            if id(layer) not in self.names or (size := axis_size(self.trace.graph, item.dep)) is None:
                continue  # an operation, or a layer without channels of its own
            if layer in self.trace.buffers and (size := self._turned(item)) is None:
                continue
            if None in item.root_idxs:
                raise _LeftWholeError(_SHARED_BY_HEADS)
            positions = Positions(item.root_idxs, item.idxs)
            yield Member((self.names[id(layer)], side(item.dep)), item.dep, size, positions)

    @staticmethod
    def _turned(item: Any) -> int | None:
        """The size of the dimension in which a buffer has an entry for each of these channels, if one does."""
        node, count = item.dep.target, len(set(item.idxs))
        dims = [dim for dim, size in enumerate(node.module.shape) if size == count > max(item.idxs)]
        if not dims:
            return None
        node.pruning_dim = node.pruning_dim if node.pruning_dim in dims else dims[0]
        return count

    def _check_members(self, members: list[Member], group: Group) -> None:
        if reason := _frozen(members):
            raise _LeftWholeError(reason)
        for member in members:
            if overflows(member):
                raise _LeftWholeError(_overflow(member, group))
            if reason := misfit(member):
                raise _LeftWholeError(reason)
            if any(torch.isin(places, member.positions.places).any() for places in self.claimed.get(member.axis, ())):
                raise _LeftWholeError(
                    f"{member.axis[0]} would lose one channel to two groups, for several layers write to it by turns"
                )
        cuts: dict[tuple[int, str], set] = defaultdict(set)
        for member in members:
            if isinstance(member.layer, nn.Module) and id(member.layer) in self.tied:
                where = frozenset((root, *sorted(p)) for root, p in member.positions.items())
                for name, dim in cut_parameters(member.layer, member.axis[1]):
                    cuts[id(member.layer), name].add((dim, where))
        for holders in self.holders.values() if cuts else ():
            found = [cuts.get((id(module), name), set()) for module, name in holders]
            if any(cut != found[0] for cut in found):
                shown = " and ".join(f"{self.names[id(module)]}.{name}" for module, name in holders)
                raise _LeftWholeError(
                    f"{shown} are tied and would be cut differently: give each a parameter of its own to cut them"
                )

    def _units(self, reached: Reached, members: list[Member]) -> list[tuple[int, ...]]:
        channels = reached.group[0].idxs
        blocks = [member for member in members if num_blocks(member) > 1]
        if reached.linked or blocks:
            units = self._linked(channels, reached, blocks)
        else:
            units = [(channel,) for channel in channels]
        if len(units) < 2:
            raise _LeftWholeError("its channels can only leave all together, or there is one alone")
        sizes = [[len(unit) for unit in units]]
        uneven = [m for m in members if m.positions.num_roots < len(channels) or not m.positions.is_even]
        sizes += [[sum(len(m.positions.get(root, ())) for root in unit) for unit in units] for m in uneven]
        if any(len(set(counts)) > 1 for counts in sizes):
            raise _LeftWholeError(
                "its channels hang together in sets of different sizes, as where fewer are repeated to meet them"
            )
        return units

    @staticmethod
    def _linked(channels: list[int], reached: Reached, members: Iterable[Member]) -> list[tuple[int, ...]]:
        """Sets of channels that leave together: each other's, and those of one place in the blocks of members."""
        parents = {channel: channel for channel in channels}
        for member in members:
            block = member.size // num_blocks(member)
            first: dict[int, int] = {}
            for root, positions in member.positions.items():
                for position in positions:
                    _join(parents, root, first.setdefault(position % block, root))
        for one, other in reached.linked:
            _join(parents, one, other)
        found: dict[int, list[int]] = defaultdict(list)
        for channel in channels:
            found[_representative(parents, channel)].append(channel)
        return [tuple(unit) for unit in found.values()]


def _overflow(member: Member, group: Group) -> str:
    """Why the graph gives a layer channels that it has not."""
    name, length = member.axis[0], 1 + int(member.positions.places.max())
    if isinstance(member.layer, nn.Parameter):
        return (
            f"the parameter {name} meets its channels and has {member.size} entries for {len(member.positions)} of "
            "them; expected one for each"
        )
    return (
        f"{name} has {member.size} channels and the graph leads {length} to it: {moving(group)} in between selects, "
        f"repeats or pads channels; do that behind {name}, or by split and cat"
    )


def _join(parents: dict[int, int], one: int, other: int) -> None:
    parents[_representative(parents, one)] = _representative(parents, other)


def _representative(parents: dict[int, int], channel: int) -> int:
    while parents[channel] != channel:
        parents[channel] = parents[parents[channel]]
        channel = parents[channel]
    return channel
