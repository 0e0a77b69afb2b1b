"""What a report is about: the measurement of one model, and the comparison of two with those seen between."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from bayesprune.foundation.batches import given
from bayesprune.foundation.macs import COUNTER
from bayesprune.foundation.numbers import as_number
from bayesprune.foundation.sharding import check_module
from bayesprune.reports.layers import LayerRow, LayerSize, LayerSNR, layer_sizes, pair_layers
from bayesprune.reports.measure import (
    ExampleInputs,
    Latency,
    count_parameters,
    evaluating,
    file_bytes,
    latency,
    macs_by_module,
    tensor_bytes,
    uncounted_layers,
)


@dataclass(frozen=True)
class Metric:
    """The number that `evaluate` returns.

    Attributes:
        name: As readers of a report know it.
        is_lower_better: Whether a smaller number is a better model.
    """

    name: str
    is_lower_better: bool = False

    def shown(self, value: float) -> str:
        """The value with its name; an accuracy in percent."""
        return f"{self.name} {value:.2%}" if self == ACCURACY else f"{self.name} {value:.4g}"


ACCURACY = Metric("accuracy")
PERPLEXITY = Metric("perplexity", is_lower_better=True)


@dataclass(frozen=True)
class Measurement:
    """The cost of one model, and how good it is; None where that was not measured.

    MACs are of the whole batch, without those of `uncounted_layers`, which torch's counter does not know. `accuracy` is
    what `evaluate` returned; a report with another metric than accuracy says so.
    """

    label: str
    parameters: int
    nonzero_parameters: int
    macs: int
    macs_counter: str
    batch: int
    tensor_bytes: int
    disk_bytes: int | None
    latency: Latency | None
    accuracy: float | None
    layers: tuple[LayerSize, ...]
    uncounted_layers: tuple[str, ...]


def measure(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    label: str = "model",
    evaluate: Callable[[nn.Module], float] | None = None,
    path: str | Path | None = None,
    num_repeats: int = 15,
) -> Measurement:
    """Measures the cost and quality of a model: call it before an in-place change, for `report` to compare with.

    Args:
        example_inputs: A tensor, a sequence of arguments or a mapping of keyword arguments, on any device; of a
            detector the list of images.
        evaluate: From the model to its accuracy, a fraction, or the value of another metric; called in eval mode
            without gradients.
        path: The file or directory that the model is saved in, for the bytes on disk.
        num_repeats: Repeats of the timing; 0 leaves it out.

    Raises:
        ValueError: `evaluate` returned no finite number.
    """
    check_module(model, "measure")
    counts = macs_by_module(model, example_inputs)
    count = count_parameters(model)
    return Measurement(
        label=label,
        parameters=count.total,
        nonzero_parameters=count.nonzero,
        macs=sum(counts.values()),
        macs_counter=COUNTER,
        batch=given(model, example_inputs).num_examples,
        tensor_bytes=tensor_bytes(model),
        disk_bytes=None if path is None else file_bytes(path),
        latency=latency(model, example_inputs, num_repeats=num_repeats) if num_repeats else None,
        accuracy=None if evaluate is None else _evaluated(model, evaluate),
        layers=layer_sizes(model, counts),
        uncounted_layers=tuple(uncounted_layers(model, counts)),
    )


def _evaluated(model: nn.Module, evaluate: Callable[[nn.Module], float]) -> float:
    with evaluating(model):
        value = as_number(evaluate(model), "evaluate")
    if not math.isfinite(value):
        raise ValueError(f"evaluate returned {value}; expected a finite number, such as the fraction that is right.")
    return value


@dataclass(frozen=True)
class HistoryPoint:
    """A model seen on the way: its non-zero parameters and its accuracy, or the value of the report's metric."""

    nonzero_parameters: int
    accuracy: float
    label: str = ""


@dataclass(frozen=True)
class ExtraTable:
    """A table that somebody else measured: its heads, its rows, and a sentence beside it."""

    title: str
    remark: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Comparison:
    """Two measurements, the SNRs by layer, the models seen between, and what to know when reading them."""

    title: str
    before: Measurement
    after: Measurement
    snr: tuple[LayerSNR, ...]
    history: tuple[HistoryPoint, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    metric: Metric = ACCURACY
    tables: tuple[ExtraTable, ...] = ()

    @property
    def layers(self) -> tuple[LayerRow, ...]:
        """One row per layer: kept channels, sizes and SNR."""
        return pair_layers(self.before.layers, self.after.layers, self.snr)
