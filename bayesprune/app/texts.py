"""Models of transformers with what a user has for them to do: classify texts or images, or continue texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, PreTrainedModel, default_data_collator

from bayesprune.app.data import last_tenth_of_each_class
from bayesprune.app.data.texts import Columns, LabelledTexts, classified_texts, plain_texts
from bayesprune.app.pretrained import load_config, load_model, load_processor, load_tokenizer, longest_input
from bayesprune.app.tasks.trainer import Options, TrainerTask

_DEFAULT_LENGTH = 128


@dataclass(frozen=True)
class Job:
    """A model, the task it is for, and why it must be trained first; None where it need not."""

    model: PreTrainedModel
    task: TrainerTask
    untrained: str | None


def text_classification(source: str, data: str, options: Options) -> Job:
    """The task of classifying the texts of `classified_texts`.

    Raises:
        ValueError: model, data or options do not fit each other, or are not there.
        OSError: the model cannot be read.
    """
    config = load_config(source)
    texts = classified_texts(data, Columns(options.text_column, options.label_column))
    tokenizer = load_tokenizer(source)
    length = longest_input(config, tokenizer, options.max_length, default=_DEFAULT_LENGTH)
    found = load_model(
        source,
        "text-classification",
        config,
        class_names=texts.class_names,
        are_numbered=texts.are_numbered,
    )
    found.model.config.pad_token_id = tokenizer.pad_token_id  # a decoder finds the last token of a text by it

    def examples(split: LabelledTexts) -> list[dict[str, Any]]:
        encoded = tokenizer(split.texts, truncation=True, max_length=length)
        labels = [found.class_order[label] for label in split.labels]
        return [
            {name: values[i] for name, values in encoded.items()} | {"labels": label} for i, label in enumerate(labels)
        ]

    splits = {"train": texts.train, "validation": texts.validation, "test": texts.test}
    sizes = ", ".join(f"{len(split.texts):,} {name}" for name, split in splits.items())
    task = TrainerTask(
        "text-classification",
        {name: examples(split) for name, split in splits.items()},
        DataCollatorWithPadding(tokenizer),
        options=options,
        description=f"{data}: {sizes} texts of {length} tokens at most, {len(texts.class_names)} classes",
        preparation=tokenizer,
    )
    return Job(found.model, task, found.untrained)


def causal_lm(source: str, data: str, options: Options) -> Job:
    """The task of continuing the texts of `plain_texts`, cut into blocks of equal length; the metric is perplexity.

    Where the data lack a split, the last tenth of the training split's blocks is held out for it.

    Raises:
        ValueError: model, data or options do not fit each other, or are not there.
        OSError: the model cannot be read.
    """
    config = load_config(source)
    texts = plain_texts(data, Columns(options.text_column, has_labels=False))
    tokenizer = load_tokenizer(source)
    length = longest_input(config, tokenizer, options.max_length, default=_DEFAULT_LENGTH)
    splits = {name: _blocks(split, tokenizer, length) for name, split in texts.items()}
    for split in ("test", "validation"):
        if split not in splits:
            if len(splits["train"]) < 2:
                raise ValueError(
                    f"{data!r} is too short: its training split has {len(splits['train'])} blocks of {length} tokens "
                    f"left, and some are held out for {split}. Give more text, or a smaller --max-length."
                )
            parts = last_tenth_of_each_class(torch.zeros(len(splits["train"]), dtype=torch.long), what="block")
            splits["train"], splits[split] = ([splits["train"][i] for i in part] for part in parts)
    if empty := [name for name, blocks in splits.items() if not blocks]:
        raise ValueError(f"{data!r}: the {empty[0]} split is shorter than one block of {length} tokens.")
    found = load_model(source, "causal-lm", config)
    sizes = ", ".join(f"{len(splits[name]):,} {name}" for name in ("train", "validation", "test"))
    task = TrainerTask(
        "causal-lm",
        splits,  # type: ignore[arg-type]
        default_data_collator,
        options=options,
        description=f"{data}: {sizes} blocks of {length} tokens",
        preparation=tokenizer,
    )
    return Job(found.model, task, found.untrained)


def image_classification(source: str, load: Callable[..., Any], options: Options) -> Job:
    """The task of classifying images, prepared by the image processor that the model comes with.

    Args:
        source: The model.
        load: `bayesprune.app.data.images.load_data`, but for what the model says: `config`, `transform`, `in_chans`.
        options: Batch size and seed.

    Raises:
        ValueError: model and data do not fit each other, or are not there.
        OSError: the model cannot be read.
    """
    config, processor = load_config(source), load_processor(source)
    values: dict[str, Any] = {}
    if isinstance(side := getattr(config, "image_size", None), int):
        values["input_size"] = (config.num_channels, side, side)
    if processor is not None:
        values |= {"mean": processor.image_mean, "std": processor.image_std}

    def transform(image: Any) -> Tensor:
        assert processor is not None, "it is only called where there is one"
        return processor(image, return_tensors="pt")["pixel_values"][0]

    data = load(
        config=values,
        transform=None if processor is None else transform,
        in_chans=getattr(config, "num_channels", None),
    )
    names = data.class_names
    are_numbered = list(names) == [str(number) for number in range(len(names))]
    found = load_model(source, "image-classification", config, class_names=names, are_numbered=are_numbered)
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    task = TrainerTask(
        "image-classification",
        {name: _Images(loader.dataset, found.class_order) for name, loader in splits.items()},  # type: ignore[misc]
        default_data_collator,
        options=options,
        description=data.description,
        preparation=processor,
    )
    return Job(found.model, task, found.untrained)


class _Images(Dataset[dict[str, Any]]):
    """Images and labels under the names that a model of transformers gives them."""

    def __init__(self, pairs: Any, class_order: Sequence[int]) -> None:
        self.pairs, self.class_order = pairs, class_order

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.pairs[index]
        return {"pixel_values": image, "labels": self.class_order[int(label)]}


def _blocks(texts: Sequence[str], tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """All texts one after another in blocks of so many tokens; what is left at the end is dropped."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(list(texts), verbose=False)["input_ids"]
    tokens = [token for ids in encoded for token in (*ids, *(end if ids[-1:] != end else ()))]
    starts = range(0, len(tokens) - length + 1, length)
    return [{"input_ids": tokens[start : start + length], "labels": tokens[start : start + length]} for start in starts]
