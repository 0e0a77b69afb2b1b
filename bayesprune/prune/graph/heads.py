"""Heads of attention as units of removal.

A dependency graph knows no heads. They are found here by what attention modules show: a number of heads among their
attributes, the linear layer behind the heads, and the axes whose size is that of all heads together. How a fused axis
is laid out cannot be seen from its size, so the layouts in use are tried, and that one holds for which removing a head
equals silencing it (`trials.py`). A module for which none holds stays whole. So does one whose heads depend on what
is computed elsewhere by a head's number (ALiBi).

With grouped-query attention a unit is a key and value head with all its query heads, so the ratio stays and the result
is an ordinary model; with one key and value head (multi-query attention) it is a query head.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.dependency import Dependency, Node
from torch_pruning.pruner import function

from bayesprune.prune.graph.attention import Attention, find_attention
from bayesprune.prune.graph.group import ChannelGroup, ChannelStructure, Member, Positions, written_down
from bayesprune.prune.graph.observe import Observed
from bayesprune.prune.graph.prunable_layers import LINEAR_PRUNER, is_linear, is_unknown_linear, layer_sizes
from bayesprune.prune.graph.trials import disagreement

# Attributes of attention modules by what they count; which are there, and hold that number, follow the heads.
COUNTS = (
    *("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "num_q_heads"),
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_key_value_groups", "n_rep"),
)
_SIZES = ("all_head_size", "all_head_dim", "attn_dim", "attention_dim", "inner_dim", "split_size")
# These name the hidden width in some modules and the size of all heads in others.
_WIDTHS = ("embed_dim", "hidden_size", "dim", "d_model", "hidden_dim")
HEADS_STAY = "its heads stay whole"
_ONE_FOR_ALL = "what it puts out serves all heads of its module"


@dataclass(frozen=True)
class Layout:
    """The arrangement of heads in what attention modules compute.

    Attributes:
        by_head: Whether a fused axis has all parts (query, key, value) of one head after another, as GPT-NeoX does;
            otherwise all heads of one part.
        with_width: Whether attributes named after the hidden width hold the size of all heads.
        outside: Whether embeddings outside the modules have a column for each head.
        interleaved: Whether the layer behind reads the first entries of all heads, then the second ones, as in NesT.
    """

    by_head: bool = False
    with_width: bool = False
    outside: bool = False
    interleaved: bool = False


_LAYOUTS = tuple(Layout(by_head, with_width) for with_width, by_head in product((False, True), repeat=2))
_LAYOUTS = (*_LAYOUTS, Layout(interleaved=True))
_OUTSIDE = Layout(outside=True)


def find_heads(observed: Observed, *, ignored_layers: Iterable[nn.Module] = ()) -> ChannelStructure:
    """The heads of a model as groups, checked by experiment; the model is as before afterwards."""
    found, left_whole = find_attention(observed, ignored_layers)
    finder = _Finder(observed.model, observed.example_inputs)
    places: dict[str, list[Attention]] = defaultdict(list)
    for attention in found:
        places[re.sub(r"\d+", "#", attention.name)].append(attention)
    groups: list[ChannelGroup] = []
    first = {name: finder.separate(place, _LAYOUTS[0]) for name, place in places.items()}
    if finder.independent([group for place in first.values() for group in place]) is None:
        groups = [group for place in first.values() for group in place]
    else:
        for place in places.values():
            solved, reasons = finder.solve(place)
            groups += solved
            left_whole |= reasons
    cut = {layer for group in groups for layer in group.layers}
    for attention in found:  # of multi-query attention, whose queries leave by themselves
        left_whole |= {layer: _ONE_FOR_ALL for layer in attention.layers if layer not in cut | left_whole.keys()}
    return ChannelStructure(tuple(groups), left_whole)


def in_every_layout(model: nn.Module, place: list[Attention]) -> Iterator[ChannelGroup]:
    """The heads of all these modules as one group, in each layout that may be theirs; nothing is checked."""
    finder = _Finder(model, None)
    for layout in _layouts(place):
        yield _group(place, finder.members(place, layout), layout)


class _Finder:
    """Tries layouts on attention modules."""

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model, self.example_inputs = model, example_inputs
        self.names = {id(module): name for name, module in model.named_modules()}

    def solve(self, place: list[Attention]) -> tuple[list[ChannelGroup], dict[str, str]]:
        """The groups of modules that stand at the same place of different blocks, and why layers stay whole."""
        layouts = _layouts(place)
        for layout in layouts:
            if self.independent(groups := self.separate(place, layout)) is None:
                return groups, {}
        if len({(a.num_heads, a.num_kv_heads, a.head_dim) for a in place}) == 1 < len(place):
            for layout in (*layouts, _OUTSIDE):  # as in T5, where one table of biases serves the heads of all blocks
                joined = _group(place, self.members(place, layout), layout)
                if self.disagreement([joined], shift=0) is None and self.disagreement([joined], shift=1) is None:
                    return [joined], {}
        alike: dict[Any, list[Attention]] = defaultdict(list)
        for attention in place:
            alike[type(attention.module), attention.num_heads, attention.num_kv_heads, attention.head_dim].append(
                attention
            )
        groups, reasons = [], {}
        for some in alike.values():
            found = self.alone(some, layouts) if len(place) > 1 else []
            groups += found
            solved = {name for group in found for name in group.attention}
            rest = [attention for attention in some if attention.name not in solved]
            problem = self.disagreement(self.separate(rest[:1], _LAYOUTS[0]), shift=0) if rest else None
            reason = f"{HEADS_STAY}: {problem or 'the heads of several modules hang together'}"
            reasons |= {layer: reason for attention in rest for layer in attention.layers}
        return groups, reasons

    def alone(self, alike: list[Attention], layouts: list[Layout]) -> list[ChannelGroup]:
        """The groups of modules of one class and size; where it works for neither the first nor the last, for none."""
        ends = dict.fromkeys((alike[0].name, alike[-1].name))
        tried = [self.first_that_works(attention, layouts) for attention in alike if attention.name in ends]
        if any(tried):
            tried = [self.first_that_works(attention, layouts) for attention in alike]
        return [group for found in tried for group in found]

    def first_that_works(self, attention: Attention, layouts: list[Layout]) -> list[ChannelGroup]:
        """Its group in the first layout that stands the experiment, or none."""
        found = (self.separate([attention], layout) for layout in layouts)
        return next((groups for groups in found if self.independent(groups) is None), [])

    def independent(self, groups: list[ChannelGroup]) -> str | None:
        """What goes wrong when every second group loses a head, another one in each, and the others keep all."""
        chosen = [(group, [group.units[(-(-n // 2)) % len(group.units)]]) for n, group in enumerate(groups)]
        parts = [part for part in (chosen[::2], chosen[1::2]) if part]
        return disagreement(self.model, chosen, self.example_inputs, parts=parts) if chosen else None

    def disagreement(self, groups: list[ChannelGroup], *, shift: int) -> str | None:
        chosen = [(group, [group.units[(index + shift) % len(group.units)]]) for index, group in enumerate(groups)]
        return disagreement(self.model, chosen, self.example_inputs)

    def separate(self, place: Iterable[Attention], layout: Layout) -> list[ChannelGroup]:
        """A group for each module."""
        return [_group([attention], self.members([attention], layout), layout) for attention in place]

    def members(self, place: list[Attention], layout: Layout) -> list[Member]:
        found = [member for attention in place for member in self._members(attention, layout)]
        if layout.outside:
            inside = {member.axis for member in found}
            for name, module in self.model.named_modules():
                if isinstance(module, nn.Embedding) and module.embedding_dim == place[0].num_heads:
                    member = _embedding(place[0], name, module)
                    found += [member] if member.axis not in inside else []
        return list({member.axis: member for member in found}.values())

    def _members(self, attention: Attention, layout: Layout) -> Iterator[Member]:
        """What has an entry for each head, the layer behind the heads first."""
        behind = self.names[id(attention.behind)]
        positions = _positions(attention, [(attention.num_heads, attention.head_dim)])
        if layout.interleaved:
            units, dim = attention.num_units, attention.head_dim
            positions = {root: [root % dim * units + root // dim] for root in positions}
        yield _linear(attention, behind, attention.behind, "in", positions)
        for path, module in attention.module.named_modules():
            name = f"{attention.name}.{path}".strip(".")
            if module is attention.behind:
                continue
            if is_linear(module):
                if positions := _axis(attention, layer_sizes(module)[1], layout):
                    yield _linear(attention, name, module, "out", positions)
            elif isinstance(module, nn.Embedding):
                if module.embedding_dim == attention.num_heads:
                    yield _embedding(attention, name, module)
            else:
                for key, tensor in (*module._parameters.items(), *module._buffers.items()):
                    if tensor is not None and (tensor.dim() > 1 or module is attention.module):
                        yield from _tensor(attention, f"{name}.{key}", tensor)


def _layouts(place: Iterable[Attention]) -> list[Layout]:
    """The layouts that differ for these modules."""
    fused = named = False
    alike = all(attention.num_heads == attention.num_units for attention in place)
    for attention in place:
        q, whole = attention.num_heads, attention.num_heads * attention.head_dim
        sizes = {layer_sizes(layer)[1] for layer in attention.module.modules() if is_linear(layer)}
        fused |= not sizes <= {q, whole, attention.num_kv_heads * attention.head_dim}
        named |= any(vars(attention.module).get(name) == whole for name in _WIDTHS)
    fits = (x for x in _LAYOUTS if (fused or not x.by_head) and (named or not x.with_width))
    return [x for x in fits if alike or not x.interleaved]


def _axis(attention: Attention, size: int, layout: Layout) -> dict[int, list[int]]:
    """Positions by root channel along an axis of this size; none where the axis does not count heads that can go."""
    q, kv, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
    if size == q:
        return _positions(attention, [(q, 1)])
    fused = ([q], [kv], [q, kv, kv], [q, q, q], [q, q], [kv, kv])
    for heads in fused:
        if size == sum(heads) * dim:
            by_head = layout.by_head and len(heads) > 1 and not sum(heads) % attention.num_units
            parts = [(attention.num_units, size // attention.num_units)] if by_head else [(n, dim) for n in heads]
            return _positions(attention, parts)
    return {}


def _positions(attention: Attention, parts: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Positions by root channel for parts of so many heads of so many entries, one after another."""
    units, dim = attention.num_units, attention.head_dim
    found: dict[int, list[int]] = defaultdict(list)
    offset = 0
    for heads, entries in parts:
        share = heads // units * entries  # one key and value head serves all query heads, and stays
        for position in range(share * units):
            unit, inside = divmod(position, share)
            found[unit * dim + (inside % dim if share % dim == 0 else 0)].append(offset + position)
        offset += heads * entries
    return dict(found)


def _tensor(attention: Attention, name: str, tensor: Tensor) -> Iterator[Member]:
    """A parameter with an entry for each head, as a table of position biases, or a bias of all heads together."""
    dims = [dim for dim, size in enumerate(tensor.shape) if size == attention.num_heads]
    whole = attention.num_heads * attention.head_dim
    if len(dims) == 1 < tensor.dim() and isinstance(tensor, nn.Parameter):
        positions = _positions(attention, [(attention.num_heads, 1)])
    elif tensor.shape == (whole,):
        dims, positions = [0], _positions(attention, [(attention.num_heads, attention.head_dim)])
    else:
        return
    node = Node(tensor, None, name)  # type: ignore[arg-type]
    node.pruning_dim = dims[0]
    node.type = ops.OPTYPE.PARAMETER
    cut = function.prune_parameter_out_channels
    yield Member((name, "out"), Dependency(cut, cut, node, node), tensor.shape[dims[0]], Positions.by_root(positions))


def _embedding(attention: Attention, name: str, layer: nn.Embedding) -> Member:
    cut, node = function.prune_embedding_out_channels, Node(layer, None, name)  # type: ignore[arg-type]
    positions = _positions(attention, [(attention.num_heads, 1)])
    return Member((name, "out"), Dependency(cut, cut, node, node), attention.num_heads, Positions.by_root(positions))


def _linear(attention: Attention, name: str, layer: nn.Module, side: str, positions: Mapping[int, list[int]]) -> Member:
    pruner: Any = LINEAR_PRUNER if is_unknown_linear(layer) else function.PrunerBox[ops.OPTYPE.LINEAR]
    cut = pruner.prune_in_channels if side == "in" else pruner.prune_out_channels
    node = Node(layer, None, name)  # type: ignore[arg-type]
    size = layer_sizes(layer)[side == "out"]
    return Member((name, side), Dependency(cut, cut, node, node), size, Positions.by_root(positions))


def _group(place: list[Attention], members: list[Member], layout: Layout) -> ChannelGroup:
    first = place[0]
    units = [tuple(range(u * first.head_dim, (u + 1) * first.head_dim)) for u in range(first.num_units)]
    return ChannelGroup(
        name=first.name,
        group=written_down([m for m in members if is_linear(m.layer)], first.num_units * first.head_dim),
        units=tuple(units),
        members=tuple(members),
        attention=tuple(attention.name for attention in place),
        attributes=tuple(
            (m, name, vars(m)[name] // first.num_units)
            for a in place
            for m in a.module.modules()
            for name in _attributes(a, m, layout)
        ),
        heads_per_unit=first.num_heads // first.num_units,
    )


def _attributes(attention: Attention, module: nn.Module, layout: Layout) -> Iterator[str]:
    q, kv, units = attention.num_heads, attention.num_kv_heads, attention.num_units
    counts = {q} | ({kv} if kv == units else set())
    for name in (*COUNTS, *_SIZES, *(_WIDTHS if layout.with_width else ())):
        value = vars(module).get(name)
        if type(value) is not int:
            continue
        if name not in COUNTS:
            if value == q * attention.head_dim:
                yield name
        elif value in counts and not (name in ("num_key_value_groups", "n_rep") and units == kv):
            yield name
