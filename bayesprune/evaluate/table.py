"""A report as tables for the terminal, by rich."""

import io
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from bayesprune.evaluate.layers import LayerRow
from bayesprune.evaluate.summary import percent, quantities, short, significant

if TYPE_CHECKING:
    from bayesprune.evaluate.report import Report

LAYER_COLUMNS = ("layer", "type", "channels kept", "parameters kept", "non-zero", "MACs kept", "median SNR", "SNR < 1")


def render(report: "Report") -> Group:
    """Before, after and ratio; the notes; one line per layer."""
    parts: list[RenderableType] = [_summary(report)]
    parts += [Text(f"note: {note}") for note in report.notes]
    parts.append(_layers(report))
    return Group(*parts)


def plain_text(report: "Report", width: int = 140) -> str:
    """The tables without colours or control characters."""
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=False, no_color=True).print(render(report))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def layer_cells(row: LayerRow) -> tuple[str, ...]:
    """The texts of one layer, in the order of `LAYER_COLUMNS`."""
    snr = row.snr
    median, below = (significant(snr.median, 3), percent(snr.fraction_below_one)) if snr else ("", "")
    return (
        row.name or "(model)",
        row.type,
        f"{row.channels_kept:,} / {row.channels:,}",
        f"{row.parameters_kept:,} / {row.parameters:,}",
        f"{row.nonzero_parameters_kept:,}",
        f"{short(row.macs_kept)} / {short(row.macs)}",
        median,
        below,
    )


def _summary(report: "Report") -> Table:
    table = Table(title=Text(report.title), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("unit and method", style="dim", overflow="fold")
    for label in (report.before.label, report.after.label):
        table.add_column(Text(label), justify="right", no_wrap=True)
    table.add_column("ratio", justify="right", style="bold", no_wrap=True)
    for row in quantities(report):
        table.add_row(*map(Text, (row.name, row.terms, row.before_text, row.after_text, row.change)))
    return table


def _layers(report: "Report") -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for i, title in enumerate(LAYER_COLUMNS):
        table.add_column(title, justify="left" if i < 2 else "right", overflow="fold")
    for row in report.layers:
        table.add_row(*map(Text, layer_cells(row)))
    return table
