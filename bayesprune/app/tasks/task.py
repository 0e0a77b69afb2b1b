"""What the command line's pipeline needs to know of a model's data and training, whichever library has the loop."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from bayesprune.bits import Quantization
from bayesprune.foundation import defaults
from bayesprune.foundation.progress import progress_bar
from bayesprune.foundation.target import Target
from bayesprune.reports import Metric
from bayesprune.train import Distillation

Split = Literal["validation", "test"]

_LOGGER = logging.getLogger(__name__)


class Progress(Protocol):
    """Tells a person where the job is."""

    def stage(self, title: str) -> None:
        """A new stage begins."""

    def say(self, text: str) -> None:
        """One line about the present stage."""

    def training(self, num_epochs: int, steps_per_epoch: int) -> AbstractContextManager[Callable[[float], None]]:
        """Inside, a training runs; what it gives is to be called after each step, with the loss."""
        ...


class LoggedProgress:
    """Says where the job is in the log, at level INFO."""

    def stage(self, title: str) -> None:
        """A new stage begins."""
        _LOGGER.info("compress: %s", title)

    def say(self, text: str) -> None:
        """One line about the present stage."""
        _LOGGER.info("compress: %s", text)

    @contextmanager
    def training(self, num_epochs: int, steps_per_epoch: int) -> Iterator[Callable[[float], None]]:
        """Shows a bar of the steps on a terminal."""
        with progress_bar(None, "fine-tuning", "step", total=num_epochs * steps_per_epoch) as bar:

            def advance(loss: float) -> None:
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                bar.update()

            yield advance


class Checkpoint(Protocol):
    """Keeps the state of one training, so that it goes on after a kill."""

    def saved(self) -> dict[str, Any] | None:
        """The state that `keep` got last, and the `step`; None where this training had not come so far."""
        ...

    def restore_random_state(self) -> None:
        """Random numbers go on as they would have; to be called when everything else is where it was."""

    def is_due(self, step: int) -> bool:
        """Whether it is time to keep the state after this step, counted from 1."""
        ...

    def keep(self, step: int, state: Mapping[str, Any]) -> None:
        """Keeps the state after this step: tensors, names and numbers."""


@dataclass(frozen=True)
class Training:
    """One training of a model.

    Attributes:
        num_epochs: Passes over the training data.
        lr: The highest learning rate.
        learn_stds: Attach the KL, so that the stds of a variational model are learned.
        target: "weights=...", the fraction of single weights that is kept: the others are removed on the way,
            gradually, leaving time to recover; with `learn_stds` alone.
        temperature: Weight of the KL, as for `attach`; with `learn_stds` alone.
        distill: What the model learns from beside the labels.
        rounded: What `quantize` said of the model, whose weights are held to their grids; of a stock model.
    """

    num_epochs: int
    lr: float
    learn_stds: bool = False
    target: Target | None = None
    temperature: float | Literal["auto"] = defaults.TEMPERATURE
    distill: Distillation | None = None
    rounded: Quantization | None = None


class Task(Protocol):
    """Data, and how a model is trained and judged on them.

    Attributes:
        description: The data in one line.
        metric: What `score` returns.
        example_inputs: One example, as the model's forward takes it.
        calibration: Batches of training inputs, each time from the start.
        generators: Random generators of the task's own, which a checkpoint keeps beside the global ones.
        is_main: Whether this process writes files and speaks; one of several does.
        is_sharded: Whether weights are cut over processes while they train (FSDP).
    """

    description: str
    metric: Metric
    example_inputs: Any
    calibration: Iterable[Any]
    generators: Sequence[torch.Generator]
    is_main: bool
    is_sharded: bool

    def train(
        self, model: nn.Module, progress: Progress, training: Training, *, checkpoint: Checkpoint | None = None
    ) -> None:
        """Trains the model in place and leaves it in evaluation mode.

        Args:
            model: On the device it is to stay on.
            progress: Hears of every step.
            training: How long, how fast, and what is learned.
            checkpoint: Where a loop that can go on in the middle keeps its state, and finds it after a kill.

        Raises:
            FloatingPointError: the loss is not finite.
        """

    def score(self, model: nn.Module, split: Split) -> float:
        """The metric on all of a split."""
        ...

    def examples(self, split: Split) -> Iterable[Any]:
        """Batches of a split with their labels, in any form that `bayesprune.foundation.batches` names."""
        ...

    def save_preparation(self, directory: Path) -> None:
        """Adds what prepares the model's inputs, where the library has files for it."""

    def loading_instructions(self, directory: Path) -> str:
        """The Python that loads the saved model in a fresh process."""
        ...

    def close(self) -> None:
        """Ends what the task holds; the last call."""


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's forward is its own again, in place of the one of mixed precision that accelerate sets.

    accelerate's `extract_model_from_parallel` would take off the decorators of the model's own forward as well.
    """
    names = ("forward", "_original_forward", "_is_accelerate_prepared")
    own = {name: vars(model)[name] for name in names if name in vars(model)}
    try:
        yield
    finally:
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(own)


def check_finite(loss: float, lr: float) -> float:
    """Returns the loss if it is finite.

    Raises:
        FloatingPointError: it is not.
    """
    if not abs(loss) < float("inf"):
        raise FloatingPointError(f"the training loss is {loss}; try a smaller learning rate than {lr:g}.")
    return loss
