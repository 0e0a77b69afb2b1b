"""Layers of a model as a report lists them: sizes, kept channels, and histograms of signal-to-noise ratios."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesprune.foundation.kinds import kind_of
from bayesprune.reports.measure import deterministic_parameters, matrix_of

SNR_LOG10_EDGES = tuple(step / 4 for step in range(-12, 13))
"""Edges of the bins of every SNR histogram, as log10 of the SNR; what lies beyond them counts in the outer bins."""


@dataclass(frozen=True)
class LayerSize:
    """Size of one layer: a module with a weight matrix, kernel or lookup table of its own."""

    name: str
    type: str
    channels: int
    parameters: int
    nonzero_parameters: int
    macs: int


@dataclass(frozen=True)
class LayerSNR:
    """Signal-to-noise ratios of the weights of one layer, biases left out; `counts` are of `SNR_LOG10_EDGES`."""

    name: str
    median: float
    fraction_below_one: float
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        bins = len(SNR_LOG10_EDGES) - 1
        if len(self.counts) != bins:
            raise ValueError(f"the SNR histogram of {self.name!r} has {len(self.counts)} bins; expected {bins}.")


@dataclass(frozen=True)
class LayerRow:
    """One layer before and after; a layer that one of the models lacks has zeros there."""

    name: str
    type: str
    channels: int
    channels_kept: int
    parameters: int
    parameters_kept: int
    nonzero_parameters_kept: int
    macs: int
    macs_kept: int
    snr: LayerSNR | None


def layer_sizes(model: nn.Module, macs: Mapping[str, int]) -> tuple[LayerSize, ...]:
    """The layers in the order of the model, with these MACs by module name."""
    sizes = []
    for name, module in model.named_modules():
        own = dict(deterministic_parameters(module, recurse=False))
        weight = matrix_of(module)
        if weight is not None:
            total = sum(parameter.numel() for parameter in own.values())
            nonzero = sum(int(torch.count_nonzero(parameter.detach())) for parameter in own.values())
            sizes.append(LayerSize(name, _type_name(module), _channels(module, weight), total, nonzero, macs[name]))
    return tuple(sizes)


def layer_snr(snr: Mapping[str, Tensor]) -> tuple[LayerSNR, ...]:
    """Histograms by layer of signal-to-noise ratios by parameter name; ratios that are NaN are left out."""
    by_layer: dict[str, list[Tensor]] = {}
    for parameter, values in snr.items():
        layer, _, name = parameter.rpartition(".")
        if not name.endswith("bias"):
            flat = values.detach().flatten().float()
            by_layer.setdefault(layer, []).append(flat[~flat.isnan()].clamp(max=torch.finfo(torch.float32).max))
    ratios = ((layer, torch.cat(values)) for layer, values in by_layer.items())
    return tuple(_summary(layer, values) for layer, values in ratios if len(values))


def pair_layers(
    before: Iterable[LayerSize], after: Iterable[LayerSize], snr: Iterable[LayerSNR]
) -> tuple[LayerRow, ...]:
    """Rows by layer name, in the order of the model before; layers that only the model after has come last."""
    old, new = ({size.name: size for size in sizes} for sizes in (before, after))
    ratios = {layer.name: layer for layer in snr}
    rows = []
    for name in {**old, **new}:
        kind = (old.get(name) or new[name]).type
        missing = LayerSize(name, kind, 0, 0, 0, 0)
        a, b = old.get(name, missing), new.get(name, missing)
        sizes = (a.channels, b.channels, a.parameters, b.parameters, b.nonzero_parameters, a.macs, b.macs)
        rows.append(LayerRow(name, kind, *sizes, ratios.get(name)))
    return tuple(rows)


def _summary(layer: str, values: Tensor) -> LayerSNR:
    low, high, num_bins = SNR_LOG10_EDGES[0], SNR_LOG10_EDGES[-1], len(SNR_LOG10_EDGES) - 1
    positions = (values.log10() - low) * (num_bins / (high - low))
    counts = positions.floor().clamp(0, num_bins - 1).long().bincount(minlength=num_bins)
    return LayerSNR(layer, float(values.median()), float((values < 1).float().mean()), tuple(counts.tolist()))


def _type_name(module: nn.Module) -> str:
    """The stock class's name, also of a variational layer."""
    return getattr(module, "stock_type", type(module)).__name__


def _channels(module: nn.Module, weight: Tensor) -> int:
    """Number of output channels or units; of a lookup table, the length of its entries."""
    return kind_of(module).sizes(weight.shape)[1]
