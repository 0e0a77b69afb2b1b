"""What `prune_channels` did or would do."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from rich.table import Table
from torch import nn

from bayesprune.foundation.macs import COUNTER
from bayesprune.foundation.text import as_text, first_names
from bayesprune.prune.graph.group import ChannelGroup

_CUT = "channels leave it, of which every group keeps a tenth at least"
# By whether the module has weights of its own.
_OF_NO_LAYER = (
    "it multiplies activations by each other, which no layer's channels stand for",
    "it computes with weights of its own, and is no layer whose channels are known",
)


@dataclass(frozen=True)
class ChannelRow:
    """Output channels of one layer before and after, and the layers that lose the same channels with it.

    Of heads, the channels are those of its keys, the layer is the attention module, and `heads` and `kept_heads` count
    its query heads; both are 0 where the row is not about heads. Where heads leave with the width, it is about both.
    """

    layer: str
    channels: int
    kept: int
    along: tuple[str, ...] = ()
    heads: int = 0
    kept_heads: int = 0


@dataclass(frozen=True)
class Holding:
    """Modules that hold a part of the cost that stays, and why.

    Attributes:
        modules: Their names.
        share: Of the cost of the dense model.
        reason: Why it stays.
    """

    modules: tuple[str, ...]
    share: float
    reason: str

    def __str__(self) -> str:
        """The first modules, the share and the reason."""
        return f"{first_names(self.modules)} ({self.share:.4f}, {self.reason})"


@dataclass(frozen=True)
class ChannelReport:
    """The report of `prune_channels`: what it did, or would do with `dry_run=True`; prints as a table.

    Attributes:
        rows: Every group of channels that could be cut, under its root layer.
        macs_before: MACs on the example inputs, all examples together, counted on the dense model.
        macs_after: The same, counted on the cut model.
        params_before: Parameters of the dense model, stds apart.
        params_after: Parameters of the cut model, stds apart.
        target: As asked for, in the words of `prune_channels`.
        left_whole: Why a layer keeps all its output channels, by name.
        removed: Indices of the removed channels, by root layer, in the dense model's numbering.
        removed_heads: Indices of the removed query heads, by attention module, in the dense model's numbering.
        config: What the model's config says now, by field, where it follows a uniform cut; None where none was asked
            for, the model has no config, or its config cannot say the new sizes.
        latency: The share of the dense model's time that a forward takes, measured before weights were fitted; None
            where the target was no latency.
        dry_run: Whether the model was left as it was.
        counter: What counted the MACs.
        holdings: Which modules hold the MACs that stay, by reason, the most first.
        how: What ranked the channels, divided the budget and made up for what went, in one line.
        keeps_statistics: Whether batch norms keep the statistics that they had, because with statistics of `data` the
            outputs would be further from the dense model's. Fine-tune with `prune.freeze_batch_norm` then.
    """

    rows: tuple[ChannelRow, ...]
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    target: str
    left_whole: dict[str, str]
    removed: dict[str, tuple[int, ...]]
    removed_heads: dict[str, tuple[int, ...]] = field(default_factory=dict)
    config: dict[str, int] | None = None
    latency: float | None = None
    dry_run: bool = False
    counter: str = COUNTER
    holdings: tuple[Holding, ...] = ()
    how: str = ""
    keeps_statistics: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """Channels that each group keeps, by its root layer: a target for another model with the same layers."""
        return {row.layer: row.kept for row in self.rows}

    @property
    def achieved(self) -> dict[str, float]:
        """Kept fractions of the MACs and of the parameters, and of the time where that was the target."""
        found = {"macs": self.macs_after / self.macs_before, "params": self.params_after / self.params_before}
        return found if self.latency is None else found | {"latency": self.latency}

    def __str__(self) -> str:
        """The table as plain text."""
        macs, params = self.achieved["macs"], self.achieved["params"]
        title = (
            f"{'would keep' if self.dry_run else 'kept'} {macs:.1%} of {self.macs_before:,} MACs ({self.counter}) and "
            f"{params:.1%} of {self.params_before:,} parameters; target {self.target}"
        )
        title += "" if self.latency is None else f", {self.latency:.3f} as measured"
        table = Table()
        for heading in ("layer", "channels", "kept", "share", "along with it"):
            table.add_column(heading, overflow="fold")
        for row in self.rows:
            counts = (f"{row.heads} heads", f"{row.kept_heads} heads") if row.heads else (row.channels, row.kept)
            share = f"{row.kept / row.channels:.0%}"
            table.add_row(row.layer, *map(str, counts), share, first_names(row.along))
        layers: dict[str, list[str]] = defaultdict(list)
        for layer, reason in self.left_whole.items():
            layers[reason].append(layer)
        notes = [f"left whole: {first_names(names)}: {reason}" for reason, names in layers.items()]
        products = [holding for holding in self.holdings if holding.reason in _OF_NO_LAYER and holding.share >= 0.01]
        notes += [
            f"kept: {first_names(held.modules)}: {held.reason} ({held.share:.1%} of the MACs)" for held in products
        ]
        if self.config:
            fields = ", ".join(f"{name}={value}" for name, value in self.config.items())
            notes.insert(0, f"the config says so: {fields}")
        if self.keeps_statistics:
            notes.insert(0, "batch norms keep their statistics: fine-tune with bp.prune.freeze_batch_norm(model)")
        notes = [self.how, *notes] if self.how else notes
        return as_text(title, table, *notes)


def holdings(
    model: nn.Module, parts: Mapping[str, int], dense: int, cut: Collection[str], left_whole: Mapping[str, str]
) -> tuple[Holding, ...]:
    """Modules that hold a cost, by the reason why it stays.

    Args:
        model: The model.
        parts: The cost that stays, by module.
        dense: The cost of the dense model.
        cut: Modules that lose channels.
        left_whole: Why others do not.
    """
    modules = dict(model.named_modules())
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, cost in parts.items():
        if not cost:
            continue
        if name in left_whole:
            by_reason[left_whole[name]].append(name)
        elif name in cut:
            by_reason[_CUT].append(name)
        else:
            has_weights = any(parameter is not None for parameter in modules[name]._parameters.values())
            by_reason[_OF_NO_LAYER[has_weights]].append(name)
    found = (Holding(tuple(n), sum(parts[name] for name in n) / dense, reason) for reason, n in by_reason.items())
    return tuple(sorted(found, key=lambda holding: -holding.share))


def row_of(group: ChannelGroup, num_removed: int) -> ChannelRow:
    """The row of a group that loses so many units."""
    kept = group.num_channels - group.unit_size * num_removed
    along = tuple(name for name in group.layers if name != group.name)
    heads = len(group.units) * group.heads_per_unit
    return ChannelRow(group.name, group.num_channels, kept, along, heads, heads - num_removed * group.heads_per_unit)


def heads_in(group: ChannelGroup, units: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The query heads in these units."""
    if group.heads:
        of = dict(zip(group.units, group.heads, strict=True))
        return tuple(sorted(head for unit in units for head in of[unit]))
    first = [unit[0] // group.unit_size * group.heads_per_unit for unit in units]
    return tuple(sorted(start + head for start in first for head in range(group.heads_per_unit)))
