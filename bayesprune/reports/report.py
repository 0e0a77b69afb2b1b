"""The report on a compression: one model before and after, side by side, as a table, JSON, CSV and an HTML page."""

import dataclasses
import json
import platform
import reprlib
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bayesprune.errors import StorageError
from bayesprune.foundation.text import first_names
from bayesprune.reports import html, summary, table
from bayesprune.reports.layers import SNR_LOG10_EDGES, layer_snr
from bayesprune.reports.measure import REPORT_FILES, ExampleInputs, file_bytes, latencies
from bayesprune.reports.measurement import ACCURACY, Comparison, HistoryPoint, Measurement, Metric, measure
from bayesprune.storage.parsing import decode, parse_json
from bayesprune.storage.state import write_whole

if TYPE_CHECKING:
    from rich.console import Group

SCHEMA_VERSION = 1


class Report(Comparison):
    """A comparison that prints, and is written as JSON, CSV and an HTML page."""

    def table(self) -> "Group":
        """Tables for `rich.print`: coloured on a terminal, plain text in a file or a pipe."""
        return table.render(self)

    def __str__(self) -> str:
        """The tables as plain text."""
        return table.plain_text(self)

    def to_json(self) -> str:
        """The report as JSON; `ratios` and `snr_log10_edges` are there for other readers."""
        ratios = {row.name: row.after_over_before for row in summary.quantities(self)}
        document = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        document |= {"after_over_before": ratios, "snr_log10_edges": SNR_LOG10_EDGES}
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Report":
        """The report that `to_json` wrote. Its texts are made printable, whatever the file says.

        Raises:
            StorageError: the text is no such report, of another schema version, or larger than one is.
        """
        data = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
        try:
            document = parse_json(data, "it")
            version = document.get("schema_version") if isinstance(document, dict) else None
            if version != SCHEMA_VERSION:
                raise ValueError(
                    f"its schema_version is {reprlib.repr(version)}; expected {SCHEMA_VERSION}. Read it with the "
                    "version of bayesprune that wrote it."
                )
            return decode(cls, document)
        except ValueError as error:
            raise StorageError(f"this is no report that can be read: {error}") from error

    def to_csv(self) -> str:
        """One line per quantity of the whole model and of each layer."""
        return summary.to_csv(self)

    def to_html(self) -> str:
        """A page that needs no other file and no network, with three plots.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return html.page(self)

    def save(self, directory: str | Path) -> None:
        """Writes `report.json`, `report.csv` and `report.html`; each appears whole or not at all.

        Raises:
            ImportError: matplotlib is not installed; nothing is written then.
        """
        texts = dict(zip(REPORT_FILES, (self.to_json(), self.to_csv(), self.to_html()), strict=True))
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_whole(directory / name, lambda partial, text=text: partial.write_bytes(text.encode()))


def report(
    before: nn.Module | Measurement,
    after: nn.Module | Measurement,
    example_inputs: ExampleInputs | None = None,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    snr: Mapping[str, Tensor] | None = None,
    history: Iterable[HistoryPoint] = (),
    metric: Metric = ACCURACY,
    paths: tuple[str | Path | None, str | Path | None] = (None, None),
    num_repeats: int = 15,
    title: str = "Compression report",
) -> Report:
    """The report on two models; two modules are timed in turns, so that the ratio of their latencies is fair.

    Args:
        before: The model before, or its `measure`ment where it was changed in place since.
        example_inputs: As for `measure`; needed unless both are measurements.
        evaluate: From a model to its accuracy, a fraction, or the value of another metric; not called for measurements.
        snr: `signal_to_noise(model)`, taken before anything was removed.
        history: Models seen on the way, for the plot of accuracy against size.
        metric: What `evaluate` returns, and which way is better.
        paths: Where the two models are saved, for the bytes on disk.
        num_repeats: Repeats of the timing; 0 leaves it out.

    Raises:
        ValueError: before and after are one module, example inputs are missing, or `snr` names no layer of the models.
    """
    if before is after:
        raise ValueError(
            "report got the same model as before and after; take `measure(model, example_inputs)` before changing the "
            "model in place, and pass that as before."
        )
    pair = before, after
    modules = [model for model in pair if isinstance(model, nn.Module)]
    side_by_side = len(modules) == 2 and num_repeats > 0
    old, new = (
        _measured(model, example_inputs, label, evaluate, path, 0 if side_by_side else num_repeats)
        for model, label, path in zip(pair, ("before", "after"), paths, strict=True)
    )
    if side_by_side and example_inputs is not None:
        times = latencies(modules, example_inputs, num_repeats=num_repeats)
        old, new = (dataclasses.replace(m, latency=time) for m, time in zip((old, new), times, strict=True))
    ratios = layer_snr(snr or {})
    layers = dict.fromkeys(layer.name for layer in (*old.layers, *new.layers))
    if ratios and not {layer.name for layer in ratios} & layers.keys():
        known = first_names(map(repr, layers)) or "none"
        raise ValueError(
            f"snr names no layer of the models: it has {first_names(map(repr, snr or {}))}, the layers are {known}. "
            "Pass signal_to_noise of the model itself, not of a wrapper."
        )
    remarks = summary.remarks(old, new, ratios, side_by_side=side_by_side)
    return Report(title, old, new, ratios, tuple(history), remarks, _versions(), metric)


def _measured(
    model: nn.Module | Measurement,
    example_inputs: ExampleInputs | None,
    label: str,
    evaluate: Callable[[nn.Module], float] | None,
    path: str | Path | None,
    num_repeats: int,
) -> Measurement:
    if isinstance(model, Measurement):
        return model if path is None else dataclasses.replace(model, disk_bytes=file_bytes(path))
    if example_inputs is None:
        raise ValueError("report got a module but no example_inputs; pass a batch such as torch.randn(1, 3, 224, 224).")
    return measure(model, example_inputs, label=label, evaluate=evaluate, path=path, num_repeats=num_repeats)


def _versions() -> dict[str, str]:
    names = {distribution.metadata["Name"] for distribution in metadata.distributions(name="bayesprune")}
    own = metadata.version("bayesprune") if names else "not installed"
    return {"bayesprune": own, "torch": torch.__version__, "python": platform.python_version()}
