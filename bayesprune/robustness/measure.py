"""Models beside each other on corrupted images: accuracy, calibration, and whether foreign images look foreign."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.batches import (
    IGNORED_LABEL,
    Batch,
    check_batches,
    check_labels,
    device_of,
    logits_of,
    on_device,
    split,
)
from bayesprune.foundation.text import as_text
from bayesprune.layers import variational_layers
from bayesprune.prediction import predict
from bayesprune.reports.measure import check_classes, evaluating
from bayesprune.reports.measurement import ExtraTable
from bayesprune.robustness.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from bayesprune.robustness.scores import auroc, calibration_error, negative_log_likelihood


@dataclass(frozen=True)
class CorruptionRow:
    """The accuracy of each model under one corruption, "none" at severity 0 for images as they are."""

    corruption: str
    severity: int
    accuracies: tuple[float, ...]


@dataclass(frozen=True)
class Robustness:
    """Models beside each other; prints as tables.

    Attributes:
        labels: What the models are called, in order.
        rows: Accuracy by corruption and severity, images as they are first.
        ece: Expected calibration error of each on images as they are.
        nll: Mean negative log-likelihood there, in nats.
        auroc: Chance that the predictive entropy of a foreign image is above that of a known one.
    """

    labels: tuple[str, ...]
    rows: tuple[CorruptionRow, ...]
    ece: tuple[float, ...]
    nll: tuple[float, ...]
    auroc: tuple[float, ...]

    def errors(self, corruption: str, severity: int | None = None) -> tuple[float, ...]:
        """Error of each model; without a severity the mean over those that were measured."""
        found = [
            row.accuracies for row in self.rows if row.corruption == corruption and severity in (None, row.severity)
        ]
        if not found:
            raise ValueError(f"{corruption!r} at severity {severity} was not measured; see the rows.")
        return tuple(1 - statistics.fmean(values) for values in zip(*found, strict=True))

    def tables(self) -> tuple[ExtraTable, ExtraTable]:
        """Accuracy by corruption, a mean over severities and the worst; and what probabilities are worth."""
        names = list(dict.fromkeys(row.corruption for row in self.rows))
        rows = []
        for name in names:
            of_name = [row for row in self.rows if row.corruption == name]
            means = [f"{1 - error:.1%}" for error in self.errors(name)]
            worst = [f"{min(values):.1%}" for values in zip(*(row.accuracies for row in of_name), strict=True)]
            rows.append((name, *means, *worst))
        heads = ("corruption", *self.labels, *(f"{label}, worst" for label in self.labels))
        first = ExtraTable(
            "Accuracy on corrupted images", "The mean over the severities, and the worst.", heads, tuple(rows)
        )
        kinds = {"ECE": self.ece, "NLL in nats": self.nll, "AUROC of foreign images": self.auroc}
        scores = tuple((name, *(f"{value:.4f}" for value in values)) for name, values in kinds.items())
        said = "On images as they are. Foreign images are told by predictive entropy; 0.5 is chance."
        return first, ExtraTable("What the probabilities are worth", said, ("", *self.labels), scores)

    def __str__(self) -> str:
        """Both tables as plain text."""
        parts: list[Any] = []
        for table in self.tables():
            drawn = Table(*table.heads, title=table.title)
            for cells in table.rows:
                drawn.add_row(*cells)
            parts += [drawn, table.remark]
        return as_text(*parts)


def robustness(
    models: Mapping[str, nn.Module],
    batches: Iterable[Any],
    *,
    foreign: Iterable[Any] | None = None,
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
) -> Robustness:
    """Measures classifiers of images, the unpruned one and those made from it, on the same corrupted examples.

    A model with posteriors predicts by one pass that propagates mean and variance, any other by its own output.
    Images may be normalised in any way: the smallest and largest value of each channel over all batches count as 0
    and 1 of a pixel.

    Args:
        models: By what they are called.
        batches: Images (N, C, H, W) and labels, in any form that `bayesprune.foundation.batches` names; -100 is the
            label of what does not count.
        foreign: Batches of images that belong to no class; by default those of `batches` with their pixels in
            random order.
        corruptions: Some of `CORRUPTIONS`.
        severities: Some of 1 to 5.
        seed: Of noise, directions and orders.

    Raises:
        ValueError: there is no model or no batch with labels that count, a corruption or severity is unknown, or a
            model has no output for each class.
        UnsupportedModelError: a batch has no images, or no tensor of labels.
    """
    if not isinstance(models, Mapping):
        raise TypeError(
            f"robustness got a {type(models).__name__}; expected models by name, such as {{'dense': dense}}."
        )
    check_batches(batches, "batches")
    if not models:
        raise ValueError("robustness got no model; expected a mapping such as {'dense': dense, 'pruned': pruned}.")
    first = next(iter(models.values()))
    known = [_checked(split(first, batch)) for batch in batches]
    if not known:
        raise ValueError("robustness got no batch; pass batches of images and labels.")
    low, high = _ends([_images(batch) for batch in known])

    def changed(name: str, severity: int) -> Iterator[Batch]:
        for number, batch in enumerate(known):
            yield _with_images(batch, lambda x, n=number: _corrupted(x, low, high, name, severity, seed + n))

    def shuffled() -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        for batch in known:
            yield _with_images(batch, lambda x: x.flatten(2)[..., _order(x, generator)].view_as(x))

    every = torch.cat([batch.labels.cpu() for batch in known])
    counts = every != IGNORED_LABEL
    if not counts.any():
        raise ValueError("robustness got no batch with a label that counts; pass batches of images and labels.")

    def of_labelled(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
        return _probabilities(model, batches)[counts]

    clean, labels = [of_labelled(model, known) for model in models.values()], every[counts]
    check_labels(labels, min(found.shape[1] for found in clean))
    rows = [CorruptionRow("none", 0, tuple(_accuracy(found, labels) for found in clean))]
    for name in corruptions:
        for severity in severities:
            these = list(changed(name, severity))
            found = tuple(_accuracy(of_labelled(model, these), labels) for model in models.values())
            rows.append(CorruptionRow(name, severity, found))
    others = list(shuffled()) if foreign is None else [split(first, batch) for batch in foreign]
    strange = [_probabilities(model, others) for model in models.values()]
    return Robustness(
        tuple(models),
        tuple(rows),
        tuple(calibration_error(found, labels) for found in clean),
        tuple(negative_log_likelihood(found, labels) for found in clean),
        tuple(auroc(_entropy(inside), _entropy(outside)) for inside, outside in zip(clean, strange, strict=True)),
    )


def _probabilities(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Class probabilities (N, C), on the CPU."""
    has_posteriors, found = any(True for _ in variational_layers(model)), []
    with evaluating(model):
        for batch in batches:
            args, kwargs, _ = on_device(tuple(batch), device_of(model))
            if has_posteriors:
                predicted = predict(model, *args, method="moments", **kwargs)
                check_classes(predicted.mean)
                found.append(predicted.classify().probabilities.cpu())
            else:
                logits = logits_of(model(*args, **kwargs))
                check_classes(logits)
                found.append(logits.float().softmax(1).cpu())
    return torch.cat(found)


def _accuracy(probabilities: Tensor, labels: Tensor) -> float:
    return float((probabilities.argmax(1) == labels).double().mean())


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(1)


def _checked(batch: Batch) -> Batch:
    if not isinstance(batch.labels, Tensor) or batch.labels.dim() != 1:
        raise UnsupportedModelError("a batch has no labels (N); expected images and a class number for each of them.")
    _images(batch)
    return batch


def _images(batch: Batch) -> Tensor:
    for value in (*batch.args, *batch.kwargs.values()):
        if isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point():
            return value
    raise UnsupportedModelError("a batch has no images; expected a tensor of floats (N, C, H, W) among its inputs.")


def _with_images(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    images = _images(batch)

    def of(value: Any) -> Any:
        return change(value) if value is images else value

    return Batch(tuple(map(of, batch.args)), {name: of(value) for name, value in batch.kwargs.items()}, batch.labels)


def _ends(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each channel (C, 1, 1)."""
    low = torch.stack([one.amin((0, 2, 3)) for one in images]).amin(0)
    high = torch.stack([one.amax((0, 2, 3)) for one in images]).amax(0)
    return low[:, None, None], torch.where(high > low, high, low + 1)[:, None, None]


def _corrupted(images: Tensor, low: Tensor, high: Tensor, name: str, severity: int, seed: int) -> Tensor:
    return corrupt((images - low) / (high - low), name, severity, seed=seed) * (high - low) + low


def _order(images: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randperm(images[0, 0].numel(), generator=generator)
