"""A task for a model of transformers: examples, the stock Trainer that learns from them, and the metric."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from bayesprune.app.pretrained import AUTO_CLASSES
from bayesprune.app.tasks.task import Checkpoint, Progress, Split
from bayesprune.app.tasks.training import TrainingData, train
from bayesprune.reports import ACCURACY, PERPLEXITY, Metric, accuracy, perplexity
from bayesprune.train import Distillation

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """How a model's data are read and batched.

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
        self.generators, self.is_main = [loader.generator], True
        example = next(iter(self._loader("validation", [_middle(splits["validation"])])))
        self.example_inputs = {name: value for name, value in example.items() if name != "labels"}

    def train(
        self,
        model: nn.Module,
        progress: Progress,
        *,
        num_epochs: int,
        lr: float,
        learn_stds: bool = False,
        sparsity: float | None = None,
        distill: Distillation | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """By the stock Trainer, with `BayesPruneCallback` where stds are learned or weights removed, and distillation.

        A training that was killed begins again: the Trainer reads no checkpoint of a model whose names on disk differ.
        """
        assert isinstance(model, PreTrainedModel), "the task came with such a model"
        data = TrainingData(self.splits["train"], self.collate, self.options.batch_size, self.options.seed)
        train(
            model,
            data,
            progress,
            num_epochs=num_epochs,
            lr=lr,
            learn_stds=learn_stds,
            sparsity=sparsity,
            distill=distill,
        )

    def score(self, model: nn.Module, split: Split) -> float:
        """Accuracy, or perplexity of a language model."""
        measure = perplexity if self.metric == PERPLEXITY else accuracy
        return measure(model, self._loader(split))

    def save_preparation(self, directory: Path) -> None:
        """Adds the tokenizer or image processor."""
        if self.preparation is not None:
            self.preparation.save_pretrained(directory)

    def loading_instructions(self, directory: Path) -> str:
        """By transformers itself; where the config cannot say the model's sizes, once bayesprune is imported."""
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        auto_class = AUTO_CLASSES[self.kind]
        first = "import bayesprune; " if "quantization_config" in config else ""
        return f'{first}from transformers import {auto_class}; model = {auto_class}.from_pretrained("{directory}")'

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
