"""What a report is about: one model before and after, and the models seen between."""

from dataclasses import dataclass

from bayesprune.reports.layers import LayerRow, LayerSNR, pair_layers
from bayesprune.reports.measurement import Measurement
from bayesprune.reports.metric import ACCURACY, Metric


@dataclass(frozen=True)
class HistoryPoint:
    """A model seen on the way: its non-zero parameters and its accuracy, or the value of the report's metric."""

    nonzero_parameters: int
    accuracy: float
    label: str = ""


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

    @property
    def layers(self) -> tuple[LayerRow, ...]:
        """One row per layer: kept channels, sizes and SNR."""
        return pair_layers(self.before.layers, self.after.layers, self.snr)
