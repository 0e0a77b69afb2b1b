"""What a reader of a report must know beside its numbers, one sentence each."""

from collections.abc import Iterator, Sequence

from bayesprune.foundation.text import first_names
from bayesprune.reports.layers import LayerSNR
from bayesprune.reports.measurement import Measurement
from bayesprune.reports.summary import percent


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
