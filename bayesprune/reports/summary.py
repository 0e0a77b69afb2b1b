"""What the table, the CSV and the HTML page of a report share: its rows, and the remarks beside the numbers."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bayesprune.foundation.text import first_names
from bayesprune.reports.layers import LayerSNR
from bayesprune.reports.measure import Latency
from bayesprune.reports.measurement import Comparison, Measurement

_HUGE = 1e6
_MOST_DIGITS = 20


@dataclass(frozen=True)
class Quantity:
    """One quantity of two models: numbers in `unit`, and texts rounded in `shown_unit`.

    Attributes:
        method: How it was measured: counter, device, batch, dtype.
        after_over_before: What is left of the quantity; None where the two cannot be compared.
        change: The ratio in words, such as "4.00x fewer".
    """

    name: str
    unit: str
    shown_unit: str
    method: str
    before: float | None
    after: float | None
    before_text: str
    after_text: str
    after_over_before: float | None
    change: str

    @property
    def terms(self) -> str:
        """The shown unit and the method, in one text."""
        return ", ".join(text for text in (self.shown_unit, self.method) if text)


def quantities(report: Comparison) -> list[Quantity]:
    """The quantities that were measured on at least one of the models."""
    before, after = report.before, report.after
    counter = before.macs_counter if before.macs_counter == after.macs_counter else "different counters"
    batch = f"batch {before.batch}" if before.batch == after.batch else f"batch {before.batch} and {after.batch}"
    mac_unit, mac_scale = _metric(before.macs, "MACs", ("", "k", "M", "G", "T"))
    rows = [
        _counted("parameters", before.parameters, after.parameters),
        _counted("non-zero parameters", before.nonzero_parameters, after.nonzero_parameters),
        _cost(
            ("MACs", "MACs", mac_unit, f"{counter}, {batch}"),
            (before.macs, after.macs),
            mac_scale,
            ("fewer", "more"),
            is_comparable=before.macs_counter == after.macs_counter and before.batch == after.batch,
        ),
        _size("weights and buffers", "uncompressed", before.tensor_bytes, after.tensor_bytes),
        _size("files on disk", "as saved", before.disk_bytes, after.disk_bytes),
        _latency(before.latency, after.latency),
        _score(report),
    ]
    return [row for row in rows if row.before is not None or row.after is not None]


def to_csv(report: Comparison) -> str:
    """One line per quantity: of the whole model where `layer` is empty, else of that layer."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["layer", "quantity", "unit", "method", "before", "after", "after_over_before"])
    for row in quantities(report):
        writer.writerow(["", row.name, row.unit, row.method, row.before, row.after, row.after_over_before])
    for layer in report.layers:
        for name, unit, old, new in (
            ("channels", "count", layer.channels, layer.channels_kept),
            ("parameters", "count", layer.parameters, layer.parameters_kept),
            ("MACs", "MACs", layer.macs, layer.macs_kept),
        ):
            writer.writerow([layer.name, name, unit, "", old, new, _ratio(old, new)])
        if layer.snr is not None:
            writer.writerow([layer.name, "median SNR", "1", "", layer.snr.median, None, None])
            writer.writerow([layer.name, "fraction of SNR below 1", "1", "", layer.snr.fraction_below_one, None, None])
    return stream.getvalue()


def percent(fraction: float) -> str:
    """A fraction as text in percent: 0.9312 is "93.12 %"."""
    return f"{100 * fraction:.2f} %" if abs(fraction) < _HUGE else f"{100 * fraction:.2e} %"


def significant(value: float, digits: int = 4) -> str:
    """A number rounded to this many significant digits, with thousands separators, and no exponent if it can be."""
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    if abs(magnitude) > _MOST_DIGITS:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def short(count: float) -> str:
    """A count in three digits with its metric prefix: 11_440_128 is "11.4 M"."""
    unit, scale = _metric(count, "", ("", "k", "M", "G", "T"))
    text = significant(count / scale, 3)
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {unit}".rstrip()


def _counted(name: str, before: int, after: int) -> Quantity:
    ratio = _ratio(before, after)
    change = _words(ratio, "fewer", "more")
    return Quantity(name, "count", "", "", before, after, f"{before:,}", f"{after:,}", ratio, change)


def _size(name: str, method: str, before: int | None, after: int | None) -> Quantity:
    unit, scale = _metric(before or after or 0, "B", ("", "k", "M", "G", "T"))
    return _cost((name, "bytes", unit, method), (before, after), scale, ("smaller", "larger"))


def _latency(before: Latency | None, after: Latency | None) -> Quantity:
    known = [latency for latency in (before, after) if latency is not None]
    conditions = " / ".join(dict.fromkeys(_conditions(latency) for latency in known))
    return _cost(
        ("latency", "seconds", "ms", conditions),
        (before and before.median_seconds, after and after.median_seconds),
        1e-3,
        ("faster", "slower"),
        is_comparable=len({latency.conditions for latency in known}) == 1,
    )


def _conditions(latency: Latency) -> str:
    threads = f"{latency.num_threads} thread{'s' * (latency.num_threads != 1)}"
    where = f"{latency.device}, {threads}, batch {latency.batch}, {latency.dtype}"
    return f"median of {latency.num_repeats} on {where}"


def _score(report: Comparison) -> Quantity:
    metric, old, new = report.metric, report.before.accuracy, report.after.accuracy
    is_fraction = not metric.is_lower_better and all(value is None or 0 <= value <= 1 for value in (old, new))
    old_text, new_text = (
        "not measured" if value is None else percent(value) if is_fraction else significant(value)
        for value in (old, new)
    )
    change = "-"
    if old is not None and new is not None:
        change = f"{100 * (new - old):+.2f} points" if is_fraction else f"{new - old:+.4g}"
    ratio = _ratio(old, new) if old is not None and old > 0 else None
    change = change if ratio is None else f"{ratio:.3f}x, {change}"
    method = "as evaluated, lower is better" if metric.is_lower_better else "as evaluated"
    return Quantity(metric.name, "1", "", method, old, new, old_text, new_text, ratio, change)


def _cost(
    labels: tuple[str, str, str, str],
    values: tuple[float | None, float | None],
    scale: float,
    words: tuple[str, str],
    *,
    is_comparable: bool = True,
) -> Quantity:
    before, after = values
    old_text, new_text = ("not measured" if value is None else significant(value / scale) for value in values)
    ratio = _ratio(before, after) if is_comparable else None
    return Quantity(*labels, before, after, old_text, new_text, ratio, _words(ratio, *words))


def _ratio(before: float | None, after: float | None) -> float | None:
    if before is None or after is None or not before:
        return None
    ratio = after / before
    return ratio if math.isfinite(ratio) else None


def _words(after_over_before: float | None, less: str, more: str) -> str:
    if after_over_before is None:
        return "-"
    if after_over_before == 1:
        return "same"
    if after_over_before == 0:
        return "nothing left"
    return f"{1 / after_over_before:.2f}x {less}" if after_over_before < 1 else f"{after_over_before:.2f}x {more}"


def _metric(value: float, unit: str, prefixes: tuple[str, ...]) -> tuple[str, float]:
    """The unit with the largest prefix that leaves at least one of it, and its size."""
    power = min(int(math.log10(value) // 3), len(prefixes) - 1) if value >= 1 else 0
    return prefixes[power] + unit, 1000.0**power


def remarks(before: Measurement, after: Measurement, snr: Sequence[LayerSNR], *, side_by_side: bool) -> tuple[str, ...]:
    """The sentences that hold for these two measurements."""
    return (
        *_on_zeros(before, after),
        *_on_comparison(before, after, side_by_side),
        *_on_uncounted(before, after),
        *_on_names(before, after),
        *_on_snr(snr),
    )


def _on_zeros(before: Measurement, after: Measurement) -> Iterator[str]:
    (old_zeros, old_total), (zeros, total) = (_zeros(measurement) for measurement in (before, after))
    if zeros * old_total > old_zeros * total:
        yield (
            f"{zeros:,} of the {total:,} parameters in layers ({percent(zeros / total)}) are zeros: zeros make files "
            "smaller when compressed, removed channels make the model faster."
        )


def _zeros(measurement: Measurement) -> tuple[int, int]:
    """Zeros and all parameters in layers; norms start with zeros that say nothing."""
    total = sum(layer.parameters for layer in measurement.layers)
    return total - sum(layer.nonzero_parameters for layer in measurement.layers), total


def _on_comparison(before: Measurement, after: Measurement, side_by_side: bool) -> Iterator[str]:
    if before.macs_counter != after.macs_counter or before.batch != after.batch:
        yield "The MACs have no ratio: counter or batch differ."
    if before.latency is None or after.latency is None:
        return
    quartiles = [(latency.q25_seconds, latency.q75_seconds) for latency in (before.latency, after.latency)]
    if max(low for low, _ in quartiles) <= min(high for _, high in quartiles):
        old, new = (f"{1e3 * low:.3g} to {1e3 * high:.3g} ms" for low, high in quartiles)
        yield f"The latencies overlap (quartiles {old} before, {new} after): their ratio is within the scatter."
    if side_by_side:
        return
    if before.latency.conditions != after.latency.conditions:
        yield "The latencies have no ratio: device, threads, batch or dtype differ."
    else:
        yield "The latencies were not taken in turns: what else the machine did then is in their ratio."


def _on_uncounted(before: Measurement, after: Measurement) -> Iterator[str]:
    if uncounted := list(dict.fromkeys((*before.uncounted_layers, *after.uncounted_layers))):
        listed = first_names(uncounted, most=10)
        yield f"The MACs leave out layers that never ran or that the counter does not know: {listed}."


def _on_names(before: Measurement, after: Measurement) -> Iterator[str]:
    old, new = ({layer.name: None for layer in measurement.layers} for measurement in (before, after))
    if gone := [name for name in old if name not in new]:
        yield f"Layers that only the model before has: {first_names(gone, most=10)}."
    if added := [name for name in new if name not in old]:
        yield f"Layers that only the model after has: {first_names(added, most=10)}."


def _on_snr(snr: Sequence[LayerSNR]) -> Iterator[str]:
    if collapsed := [layer.name for layer in snr if layer.fraction_below_one == 1]:
        yield f"The posterior carries no signal, SNR below 1 for every weight, in: {first_names(collapsed, most=10)}."
