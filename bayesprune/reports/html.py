"""A report as one HTML page that needs no other file and no network; every text from outside is escaped."""

from collections.abc import Iterable, Sequence
from html import escape

from bayesprune.reports import plots
from bayesprune.reports.measurement import Comparison, ExtraTable
from bayesprune.reports.summary import quantities
from bayesprune.reports.table import layer_table

_CSS = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5b6675; --line: #d9dee6; --page: #ffffff; --shade: #f5f7fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --soft: #9aa5b4; --line: #39424f; --page: #14181e; --shade: #1c222b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 56rem; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p { margin: .4rem 0; }
.soft { color: var(--soft); font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; }
thead th { border-bottom-width: 2px; }
.summary td, .layers td, .layers th { white-space: nowrap; }
.summary th .soft { display: block; font-weight: 400; overflow-wrap: anywhere; }
.summary td:last-child { font-weight: 600; }
.layers { font-size: .85rem; }
.layers tbody tr:nth-child(even) { background: var(--shade); }
.left { text-align: left; }
.notes { margin: 1rem 0; padding: .6rem 1rem; border-left: 4px solid #d9822b; background: var(--shade); }
figure { margin: .5rem 0; overflow-x: auto; }
svg { display: block; width: 100%; min-width: 23rem; max-width: 40rem; height: auto; }
@media (max-width: 40rem) {
  body { font-size: 15px; padding: 1rem .7rem 2rem; }
  th, td { padding: .35rem .3rem; }
  .summary { font-size: .85rem; }
  .summary td { white-space: normal; }
}
@media print {
  :root { color-scheme: light; --ink: #000000; --soft: #444444; --line: #bbbbbb; --page: #ffffff; --shade: #f5f5f5; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .wide, figure { overflow: visible; }
  svg { min-width: 0; max-width: 16cm; }
  tr, .notes { break-inside: avoid; }
  h2, h2 + .soft { break-after: avoid; }
}
"""


def page(report: Comparison) -> str:
    """The whole page: summary, notes, three plots, the table of layers.

    Raises:
        ImportError: matplotlib is not installed.
    """
    title = escape(report.title)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    sections = [
        f"<h1>{title}</h1>",
        _summary(report),
        _notes(report.notes),
        _section(f"{report.metric.name.capitalize()} against size", *_score(report)),
        _section("Kept channels per layer", *_channels(report)),
        _section("Signal-to-noise ratio per layer", *_snr(report)),
        *(_section(given.title, _remark(given.remark), _extra(given)) for given in report.tables),
        _section("Layers", _layers(report)),
        f'<p class="soft">Written by {escape(versions)}.</p>',
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _summary(report: Comparison) -> str:
    labels = (report.before.label, report.after.label)
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in (*labels, "ratio"))
    rows = [
        f'<tr><th scope="row" class="left">{escape(row.name)}<span class="soft">{escape(row.terms)}</span></th>'
        + "".join(f"<td>{escape(text)}</td>" for text in (row.before_text, row.after_text, row.change))
        + "</tr>"
        for row in quantities(report)
    ]
    return _table("summary", f'<th class="left"></th>{head}', rows)


def _extra(given: ExtraTable) -> str:
    head = "".join(f'<th scope="col"{_left(i + 1)}>{escape(text)}</th>' for i, text in enumerate(given.heads))
    rows = [
        "<tr>" + "".join(f"<td{_left(i + 1)}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in given.rows
    ]
    return _table("layers", head, rows)


def _layers(report: Comparison) -> str:
    heads, layers = layer_table(report)
    head = "".join(f'<th scope="col"{_left(i)}>{escape(text)}</th>' for i, text in enumerate(heads))
    rows = [
        "<tr>" + "".join(f"<td{_left(i)}>{escape(text)}</td>" for i, text in enumerate(cells)) + "</tr>"
        for cells in layers
    ]
    return _table("layers", head, rows)


def _left(column: int) -> str:
    return ' class="left"' if column < 2 else ""


def _table(kind: str, head: str, rows: Iterable[str]) -> str:
    parts = [f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>', "<tbody>", *rows]
    return "\n".join([*parts, "</tbody></table></div>"])


def _notes(notes: Sequence[str]) -> str:
    lines = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f'<div class="notes">{lines}</div>' if notes else ""


def _section(title: str, *parts: str) -> str:
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(parts)


def _score(report: Comparison) -> list[str]:
    plot = plots.score_against_size(report)
    if plot is None:
        return [_remark(f"No {report.metric.name} was measured; pass evaluate=... to measure it.")]
    better = " Lower is better." if report.metric.is_lower_better else ""
    return [_figure(plot), _remark(f"Diamonds are the two models of this report, dots those seen on the way.{better}")]


def _channels(report: Comparison) -> list[str]:
    return [_figure(plots.kept_channels(report.layers))] if report.layers else [_remark("The models have no layers.")]


def _snr(report: Comparison) -> list[str]:
    if not report.snr:
        return [_remark("Not measured; pass snr=signal_to_noise(model), taken before anything is removed.")]
    return [
        _remark("Weights left of the line (SNR below 1) are those that the data did not pin down."),
        _figure(plots.snr_histograms(report.snr)),
    ]


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def _remark(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'
