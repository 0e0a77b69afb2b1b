"""The plots of a report as SVG to put inside a page, drawn by matplotlib.

Text stays text, and takes the colour and the font of the page around it.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bayesprune.prune.search import UNITS, Compression
from bayesprune.reports.layers import SNR_LOG10_EDGES, LayerRow, LayerSNR
from bayesprune.reports.measurement import Comparison
from bayesprune.reports.summary import short, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_INK = "#010203"  # becomes the colour of the page's text
_BLUE = "#3b82c4"
_ORANGE = "#d9822b"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bayesprune",
    "font.size": 10,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "figure.facecolor": "none",
}
_WIDTH_INCHES = 5.4
_LONGEST_NAME = 30


def kept_channels(rows: Sequence[LayerRow]) -> str:
    """SVG of one bar per layer: the share of its channels that is kept, with the counts beside it."""
    with _style():
        figure, axes = _rows_figure([row.name for row in rows], inches_per_row=0.21)
        shares = [row.channels_kept / row.channels if row.channels else 1.0 for row in rows]
        axes.barh(range(len(rows)), [1.0] * len(rows), color=_BLUE, alpha=0.18, height=0.7)
        axes.barh(range(len(rows)), shares, color=_BLUE, height=0.7)
        for position, row in enumerate(rows):
            axes.text(1.015, position, f"{row.channels_kept:,} / {row.channels:,}", va="center", fontsize=9)
        axes.set_xlim(0, 1.33)
        axes.spines["bottom"].set_bounds(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        axes.set_xlabel("channels kept", loc="left")
        return _svg(figure, "Channels kept in each layer")


def snr_histograms(layers: Sequence[LayerSNR]) -> str:
    """SVG of one histogram per layer over the SNR on a logarithmic scale, each as high as its highest bin."""
    low, high = int(SNR_LOG10_EDGES[0]), int(SNR_LOG10_EDGES[-1])
    columns = high + 1.3, high + 3.0
    with _style():
        figure, axes = _rows_figure([layer.name for layer in layers], inches_per_row=0.28)
        for position, layer in enumerate(layers):
            floor = position + 0.42
            heights = [floor - 0.84 * count / max(1, *layer.counts) for count in layer.counts]
            axes.stairs(heights, SNR_LOG10_EDGES, baseline=floor, fill=True, color=_BLUE)
            cells = significant(layer.median, 2), f"{100 * layer.fraction_below_one:.1f} %"
            for x, cell in zip(columns, cells, strict=True):
                axes.text(x, position, cell, va="center", ha="right", fontsize=9)
        for x, head in zip(columns, ("median", "below 1"), strict=True):
            axes.text(x, -0.75, head, va="bottom", ha="right", fontsize=9, style="italic")
        axes.axvline(0, color=_ORANGE, linewidth=1)
        axes.set_xlim(low, columns[-1])
        axes.spines["bottom"].set_bounds(low, high)
        axes.set_xticks(range(low, high + 1), [f"{10.0**power:g}" for power in range(low, high + 1)])
        axes.set_xlabel("SNR = |mean| / std", loc="left")
        return _svg(figure, "Signal-to-noise ratios of the weights of each layer")


def score_against_size(report: Comparison) -> str | None:
    """SVG of the metric over the non-zero parameters of all models that it was measured of; None without any."""
    ends = [
        (model.nonzero_parameters, model.accuracy, model.label)
        for model in (report.before, report.after)
        if model.accuracy is not None
    ]
    points = sorted({(x, y) for x, y, _ in ends} | {(p.nonzero_parameters, p.accuracy) for p in report.history})
    if not points:
        return None
    is_fraction = not report.metric.is_lower_better and all(0 <= y <= 1 for _, y in points)
    with _style():
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        figure, axes = _figure(3.4)
        axes.plot(*zip(*points, strict=True), color=_BLUE, marker="o", markersize=4, linewidth=1.2)
        for x, y, label in ends:
            axes.plot(x, y, color=_ORANGE, marker="D", markersize=7, linestyle="none")
            axes.annotate(label, (x, y), xytext=(0, 9), textcoords="offset points", ha="center")
        if points[0][0] > 0 and points[-1][0] >= 20 * points[0][0]:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.4g} %" if is_fraction else f"{y:.4g}"))
        axes.margins(0.09, 0.16)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_xlabel("non-zero parameters")
        axes.set_ylabel(report.metric.name)
        return _svg(figure, f"{report.metric.name.capitalize()} against non-zero parameters")


def compression_curve(found: Compression) -> str:
    """SVG of the score over the size of all that `compress` tried: accepted, rejected, and the line between the two."""
    with _style():
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        figure, axes = _figure(3.4)
        accepted = [(trial.kept, trial.score) for trial in found.curve if trial.accepted]
        rejected = [(trial.kept, trial.score) for trial in found.curve if not trial.accepted]
        axes.axhline(found.reference - found.tolerance, color=_INK, linewidth=0.8, linestyle="dashed")
        if accepted:
            axes.plot(*zip(*accepted, strict=True), color=_BLUE, marker="o", markersize=4, linewidth=1.2)
            axes.plot(*accepted[-1], color=_ORANGE, marker="D", markersize=7, linestyle="none")
        if rejected:
            axes.plot(*zip(*rejected, strict=True), color=_ORANGE, marker="x", markersize=5, linestyle="none")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g} %"))
        axes.margins(0.09, 0.16)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_xlabel(f"{UNITS[found.by]} kept")
        axes.set_ylabel("score")
        return _svg(figure, f"Score against {UNITS[found.by]} kept")


def require_matplotlib() -> ModuleType:
    """The library itself.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            'the plots of the HTML report need matplotlib, which is not installed: pip install "bayesprune[report]"'
        ) from error
    return matplotlib


@contextmanager
def _style() -> Iterator[None]:
    with require_matplotlib().rc_context(_STYLE):
        yield


def _figure(height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    return figure, figure.add_subplot()


def _rows_figure(names: Sequence[str], *, inches_per_row: float) -> "tuple[Figure, Axes]":
    """Axes with one row per name, the first on top."""
    figure, axes = _figure(inches_per_row * len(names) + 0.75)
    shown = [name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}" for name in names]
    axes.set_yticks(range(len(names)), [name or "(model)" for name in shown], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(names) - 0.45, -0.55)
    return figure, axes


def _svg(figure: "Figure", title: str) -> str:
    """The figure as an element of an HTML page: no XML prologue, namespaces, metadata or fixed size."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    view_box = re.search(r'viewBox="[^"]*"', text)
    assert view_box is not None
    head = f'<svg role="img" aria-label="{escape(title)}" {view_box[0]}>'
    text = re.sub(r"<svg[^>]*>", lambda _: head, text, count=1)
    return re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text.replace(_INK, "currentColor"))
