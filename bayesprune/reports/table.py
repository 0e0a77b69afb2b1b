"""A report as tables for the terminal, by rich."""

import io

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from bayesprune.reports.layers import LayerRow
from bayesprune.reports.measurement import Comparison, ExtraTable
from bayesprune.reports.summary import percent, quantities, short, significant

_COLUMNS = ("layer", "type", "channels kept", "parameters kept", "non-zero", "MACs kept")
_SNR_COLUMNS = ("median SNR", "SNR < 1")


def render(report: Comparison) -> Group:
    """Before, after and ratio; the notes; one line per layer."""
    parts: list[RenderableType] = [_summary(report)]
    parts += [Text(f"note: {note}") for note in report.notes]
    parts.append(_layers(report))
    parts += map(_extra, report.tables)
    return Group(*parts)


def plain_text(report: Comparison, width: int = 140) -> str:
    """The tables without colours or control characters."""
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=False, no_color=True).print(render(report))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def layer_table(report: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of the table of layers; signal-to-noise ratios stand in it where the report has some."""
    heads, rows = _COLUMNS, [_cells(row) for row in report.layers]
    if not report.snr:
        return heads, rows
    return heads + _SNR_COLUMNS, [
        cells + ((significant(row.snr.median, 3), percent(row.snr.fraction_below_one)) if row.snr else ("", ""))
        for cells, row in zip(rows, report.layers, strict=True)
    ]


def _cells(row: LayerRow) -> tuple[str, ...]:
    return (
        row.name or "(model)",
        row.type,
        f"{row.channels_kept:,} / {row.channels:,}",
        f"{row.parameters_kept:,} / {row.parameters:,}",
        f"{row.nonzero_parameters_kept:,}",
        f"{short(row.macs_kept)} / {short(row.macs)}",
    )


def _summary(report: Comparison) -> Table:
    table = Table(title=Text(report.title), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("unit and method", style="dim", overflow="fold")
    for label in (report.before.label, report.after.label):
        table.add_column(Text(label), justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", style="bold", no_wrap=True)
    for row in quantities(report):
        table.add_row(*map(Text, (row.name, row.terms, row.before_text, row.after_text, row.change)))
    return table


def _extra(given: ExtraTable) -> Table:
    table = Table(title=Text(given.title), title_justify="left", caption=Text(given.remark), box=box.SIMPLE_HEAD)
    for number, title in enumerate(given.heads):
        table.add_column(Text(title), justify="right" if number else "left", overflow="fold")
    for cells in given.rows:
        table.add_row(*map(Text, cells))
    return table


def _layers(report: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    heads, rows = layer_table(report)
    for i, title in enumerate(heads):
        table.add_column(title, justify="left" if i < 2 else "right", overflow="fold")
    for cells in rows:
        table.add_row(*map(Text, cells))
    return table
