"""A task for a model of transformers: examples, the metric, and the stock Trainer, which keeps no files of its own."""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from bayesprune.app.pretrained import AUTO_CLASSES
from bayesprune.app.tasks.task import Checkpoint, Progress, Split, Training, check_finite, own_forward
from bayesprune.bits import Quantization, StraightThrough
from bayesprune.foundation.text import quoted
from bayesprune.hosts.transformers.callback import BayesPruneCallback
from bayesprune.hosts.transformers.distillation import DistillationCallback
from bayesprune.prune.weights.schedule import PruneSchedule
from bayesprune.reports import ACCURACY, PERPLEXITY, Metric, accuracy, perplexity

_LOGS_PER_EPOCH = 20


@dataclass(frozen=True)
class TrainingData:
    """Examples for a Trainer, the function that makes a batch of them, and the batch size."""

    examples: Any
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    batch_size: int
    seed: int


def train(model: PreTrainedModel, data: TrainingData, progress: Progress, training: Training) -> None:
    """As `Task.train` says: AdamW without weight decay, a tenth of the steps to warm up, then linearly to zero.

    Single weights are removed between a tenth and seven tenths of the training.
    """
    steps_per_epoch = -(-len(data.examples) // data.batch_size)
    num_steps = steps_per_epoch * training.num_epochs
    is_cpu = model.device.type == "cpu"
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            num_train_epochs=training.num_epochs,
            per_device_train_batch_size=data.batch_size,
            learning_rate=training.lr,
            weight_decay=0.0,
            warmup_steps=num_steps // 10,
            logging_steps=max(1, steps_per_epoch // _LOGS_PER_EPOCH),
            logging_first_step=True,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=data.seed,
            use_cpu=is_cpu,
            dataloader_pin_memory=not is_cpu,
        )
        callbacks: list[TrainerCallback] = []
        if training.learn_stds:
            prune = None if training.target is None else PruneSchedule(training.target)
            callbacks.append(BayesPruneCallback(temperature=training.temperature, prune=prune))
        if training.distill is not None:
            callbacks.append(DistillationCallback(training.distill))
        if training.rounded is not None:
            callbacks.append(_Grids(training.rounded))
        with progress.training(training.num_epochs, steps_per_epoch) as advance:
            callbacks.append(_Steps(advance, training.lr))
            trainer = Trainer(
                model, arguments, train_dataset=data.examples, data_collator=data.collate, callbacks=callbacks
            )
            trainer.remove_callback(PrinterCallback)
            with own_forward(model):
                trainer.train()
    model.eval()
    model.zero_grad()


class _Steps(TrainerCallback):
    """Reports each step with the most recently logged loss."""

    def __init__(self, advance: Callable[[float], None], lr: float) -> None:
        self.advance, self.lr, self.loss = advance, lr, float("nan")
        self.is_pending = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Keeps the loss that the Trainer logs."""
        if "loss" in event["logs"]:
            self.loss = check_finite(float(event["logs"]["loss"]), self.lr)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Marks the step as done; it is reported once its loss is logged."""
        self.is_pending = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Reports the step before this one."""
        if self.is_pending:
            self.advance(self.loss)
        self.is_pending = False

    on_train_end = on_step_begin


class _Grids(TrainerCallback):
    """Holds rounded weights to their grids."""

    def __init__(self, rounded: Quantization) -> None:
        self.rounded = rounded
        self.rounding: StraightThrough | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Hooks the optimizer that the Trainer made."""
        self.rounding = StraightThrough(event["optimizer"], event["model"], self.rounded)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Leaves the weights on their grids."""
        assert self.rounding is not None, "the training began"
        self.rounding.finish()


Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """Options for reading and batching a model's data.

    Attributes:
        text_column: Name of the column of texts; None finds one.
        label_column: Name of the column of labels; None finds one.
        max_length: Longest input in tokens, and the length of a language model's; None is 128, or less where the model
            takes less.
        batch_size: Examples in a batch.
        seed: Of the order of training examples.
    """

    text_column: str | None = None
    label_column: str | None = None
    max_length: int | None = None
    batch_size: int = 32
    seed: int = 0


class TrainerTask:
    """Examples of three splits that the stock Trainer learns from."""

    def __init__(
        self,
        kind: str,
        splits: dict[str, Sequence[dict[str, Any]]],
        collate: Collate,
        *,
        options: Options,
        description: str,
        preparation: Any = None,
    ) -> None:
        """Takes examples as they are.

        Args:
            kind: One of `AUTO_CLASSES`.
            splits: Arguments of the model's forward by name, with "labels", for "train", "validation" and "test".
            collate: Makes a batch of examples.
            options: Batch size and seed.
            description: The data in one line.
            preparation: Tokenizer or image processor, saved beside the model.
        """
        self.kind, self.splits, self.collate, self.options = kind, splits, collate, options
        self.description, self.preparation = description, preparation
        self.metric: Metric = PERPLEXITY if kind == "causal-lm" else ACCURACY
        loader = self._loader("train")
        self.calibration: Iterable[dict[str, Any]] = loader
        self.generators, self.is_main, self.is_sharded = [loader.generator], True, False
        example = next(iter(self._loader("validation", [_middle(splits["validation"])])))
        self.example_inputs = {name: value for name, value in example.items() if name != "labels"}

    def train(
        self, model: nn.Module, progress: Progress, training: Training, *, checkpoint: Checkpoint | None = None
    ) -> None:
        """By the stock Trainer, with `BayesPruneCallback` where stds are learned or weights removed, and distillation.

        A training that was killed begins again: the Trainer reads no checkpoint of a model whose names on disk differ.
        """
        assert isinstance(model, PreTrainedModel), "the task came with such a model"
        data = TrainingData(self.splits["train"], self.collate, self.options.batch_size, self.options.seed)
        train(model, data, progress, training)

    def score(self, model: nn.Module, split: Split) -> float:
        """Accuracy, or perplexity of a language model."""
        measure = perplexity if self.metric == PERPLEXITY else accuracy
        return measure(model, self._loader(split))

    def examples(self, split: Split) -> Iterable[Any]:
        """Mappings of inputs and labels."""
        return self._loader(split)

    def save_preparation(self, directory: Path) -> None:
        """Adds the tokenizer or image processor."""
        if self.preparation is not None:
            self.preparation.save_pretrained(directory)

    def loading_instructions(self, directory: Path) -> str:
        """By transformers itself; where the config cannot say the model's sizes, once bayesprune is imported."""
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        auto_class = AUTO_CLASSES[self.kind]
        first = "import bayesprune; " if "quantization_config" in config else ""
        return (
            f"{first}from transformers import {auto_class}; model = {auto_class}.from_pretrained({quoted(directory)})"
        )

    def close(self) -> None:
        """Nothing: each training ends what it began."""

    def _loader(self, split: str, examples: Any = None) -> DataLoader[Any]:
        is_train = split == "train"
        return DataLoader(
            self.splits[split] if examples is None else examples,  # type: ignore[arg-type]
            batch_size=self.options.batch_size,
            shuffle=is_train,
            generator=torch.Generator().manual_seed(self.options.seed),
            collate_fn=self.collate,
        )


def _middle(examples: Any) -> dict[str, Any]:
    """An example of median length."""
    if "input_ids" not in examples[0]:
        return examples[0]
    return sorted(examples, key=lambda example: len(example["input_ids"]))[len(examples) // 2]
