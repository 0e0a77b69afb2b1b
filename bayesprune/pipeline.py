"""The main job as one function: train or load, convert, learn the posteriors, remove, fine-tune, save, report."""

import copy
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bayesprune.convert import check_options, conversion_table, to_deterministic, to_variational
from bayesprune.data import Data
from bayesprune.evaluate import HistoryPoint, Report, accuracy, count_parameters, report
from bayesprune.predictive import sampling
from bayesprune.prune import compress, prune_channels, signal_to_noise
from bayesprune.storage import save
from bayesprune.train import attach


class Progress(Protocol):
    """Tells a person where the job is."""

    def stage(self, title: str) -> None:
        """A new stage begins."""

    def say(self, text: str) -> None:
        """One line about the present stage."""

    def batches(self, loader: DataLoader[Any], num_epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All batches of all epochs, shown as they go by."""
        ...

    def loss(self, value: float) -> None:
        """The loss of the present batch."""


@dataclass(frozen=True)
class Recipe:
    """How to compress.

    Attributes:
        target: Target of `prune_channels`; None searches for the smallest model within `tolerance`.
        tolerance: Largest accepted loss of validation accuracy, a fraction.
        num_epochs: Epochs of each training stage.
        train_lr: Learning rate where the model is trained first.
        lr: Learning rate of the variational and the last fine-tuning.
        std: Structure of the stds.
        relative_std: Initial std as a fraction of the root mean square of the layer's weights.
        estimator: Estimator of the variational fine-tuning.
    """

    target: dict[str, float] | None
    tolerance: float | None
    num_epochs: int
    train_lr: float
    lr: float
    std: str
    estimator: str
    relative_std: float = 0.1

    def __post_init__(self) -> None:
        """Refuses now what would be refused after minutes of training."""
        check_options(self.std, self.relative_std, self.estimator)
        if self.tolerance is not None and self.tolerance < 0:
            raise ValueError(f"tolerance is {self.tolerance!r}; expected the largest accepted loss, 0 or more.")


NUM_STAGES = 5
_RECALIBRATION_BATCHES = 50


def run(
    model: nn.Module, data: Data, recipe: Recipe, out: Path, progress: Progress, *, name: str, is_trained: bool
) -> Report:
    """Compresses the model, saves it to `out` with a report, and returns the report.

    Accuracies that decide anything are measured on `data.validation`; `data.test` gives the report's two figures.

    Args:
        model: A model for `data`; changed in place.
        data: Loaders.
        recipe: What to do.
        out: Directory of the result.
        progress: Hears of every stage.
        name: The model's name, for the report's title.
        is_trained: Whether the model needs no training before it is converted.
    """
    device = next(model.parameters()).device
    example = next(iter(data.validation))[0][:1].to(device)

    def validate(candidate: nn.Module) -> float:
        return accuracy(candidate, data.validation, device)

    if recipe.target is not None:  # a target out of reach is told now, not after the training
        with torch.random.fork_rng(devices=[]):  # torch-pruning draws random numbers
            prune_channels(to_variational(copy.deepcopy(model)), example, target=recipe.target, dry_run=True)

    progress.stage("Use the trained model" if is_trained else "Train the dense model")
    if not is_trained:
        train(model, data, progress, num_epochs=recipe.num_epochs, lr=recipe.train_lr)
    dense, dense_accuracy = copy.deepcopy(model).eval(), validate(model)
    progress.say(f"validation accuracy {dense_accuracy:.2%}")

    progress.stage("Learn how certain each weight is")
    to_variational(model, std=recipe.std, relative_std=recipe.relative_std, estimator=recipe.estimator)
    progress.say(f"layers: {conversion_table(model).summary()}")
    train(model, data, progress, num_epochs=recipe.num_epochs, lr=recipe.lr, learn_stds=True)
    ratios = signal_to_noise(model)
    progress.say(f"validation accuracy {validate(model):.2%}")

    progress.stage("Remove channels")
    history = [HistoryPoint(count_parameters(dense).nonzero, dense_accuracy, "dense")]
    if recipe.target is not None:
        removal = prune_channels(model, example, target=recipe.target, data=_some(data, device))
        progress.say(str(removal))
        history.append(HistoryPoint(count_parameters(model).nonzero, validate(model), "removed"))
    else:
        assert recipe.tolerance is not None, "a recipe has a target or a tolerance"

        def fine_tune(candidate: nn.Module) -> None:
            with sampling(candidate, "mean"):  # as it will be used; the stds stay as they were learned
                train(candidate, data, progress, num_epochs=max(1, recipe.num_epochs // 2), lr=recipe.lr)

        def score(candidate: nn.Module) -> float:
            value = validate(candidate)
            history.append(HistoryPoint(count_parameters(candidate).nonzero, value, f"cut {len(history)}"))
            progress.say(f"validation accuracy {value:.2%} with {history[-1].nonzero_parameters:,} parameters")
            return value

        found = compress(
            model,
            example,
            evaluate=score,
            tolerance=recipe.tolerance,
            fine_tune=fine_tune,
            reference=dense_accuracy,
            data=_some(data, device),
        )
        model = found.model

    progress.stage("Fine-tune the smaller model")
    to_deterministic(model)
    train(model, data, progress, num_epochs=recipe.num_epochs, lr=recipe.lr)
    final = validate(model)
    history.append(HistoryPoint(count_parameters(model).nonzero, final, "fine-tuned"))
    progress.say(f"validation accuracy {final:.2%}")

    progress.stage("Save and report")
    save(model, out, history=[vars(point) for point in history])
    with tempfile.TemporaryDirectory() as directory:
        save(dense, directory)  # for its size
        result = report(
            dense,
            model,
            example,
            evaluate=lambda candidate: accuracy(candidate, data.test, device),
            snr=ratios,
            history=history,
            paths=(directory, out),
            title=f"{name} on {data.description}",
        )
    result.save(out)
    return result


def train(
    model: nn.Module, data: Data, progress: Progress, *, num_epochs: int, lr: float, learn_stds: bool = False
) -> None:
    """Trains with AdamW, one cycle of the learning rate and cross-entropy; with the KL attached to learn the stds.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    num_steps = num_epochs * len(data.train)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps)
    if learn_stds:
        attach(optimizer, model, num_data=data.num_data, warmup_steps=num_steps // 5)
    model.train()
    for images, labels in progress.batches(data.train, num_epochs):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the training loss is {float(loss)}; try a smaller learning rate than {lr:g}.")
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.loss(float(loss.detach()))
    model.eval()


def _some(data: Data, device: torch.device) -> list[Tensor]:
    """Training images for recalibrating batch norm."""
    return [images.to(device) for images, _ in itertools.islice(data.train, _RECALIBRATION_BATCHES)]
