"""A trained model of transformers, and what prepares its inputs, by name or folder. No code is taken from either."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import has_file

from bayesprune.foundation.text import first_names

AUTO_CLASSES = {
    "text-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "image-classification": "AutoModelForImageClassification",
}
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Pretrained:
    """A model for a task.

    Attributes:
        model: In float32.
        class_order: The model's number of each class of the data.
        untrained: Why it must be trained before anything is removed; None where it need not.
    """

    model: PreTrainedModel
    class_order: list[int]
    untrained: str | None


def load_config(source: str) -> PreTrainedConfig:
    """The config of a model.

    Raises:
        ValueError: there is no such folder, or it has no config or no weights.
        OSError: the Hub has no such model, or cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"the folder {source!r} has no config.json; expected what save_pretrained writes.")
        if not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
            raise ValueError(
                f"the folder {source!r} has a config but no weights; expected model.safetensors beside config.json. "
                "Download all files of the model, or write them with model.save_pretrained(folder)."
            )
    elif source.count("/") > 1 or source.startswith((".", "/", "~")) or not source:
        raise ValueError(f"there is no folder {source!r}; expected one, or the name of a model on the Hub.")
    return AutoConfig.from_pretrained(source, trust_remote_code=False)


def load_model(
    source: str, task: str, config: PreTrainedConfig, *, class_names: Sequence[str] = (), are_numbered: bool = False
) -> Pretrained:
    """The model with a head for the task; its head is new where that of the weights is for other classes.

    Args:
        source: A folder, or a name on the Hub.
        task: One of `AUTO_CLASSES`.
        config: Of `source`; gets the classes' names where the head is new.
        class_names: Of the data, by number; none for a language model.
        are_numbered: Whether the data's numbers may be those of the model's classes.

    Raises:
        ValueError: transformers has no such head for the architecture.
        OSError: the weights cannot be read.
    """
    untrained, order = None, class_order(config, class_names, are_numbered=are_numbered)
    if class_names and order is None:
        untrained = f"its classes are {first_names(_classes(config))}, those of the data {first_names(class_names)}"
        _name_classes(config, class_names)
    if class_names:
        config.problem_type = "single_label_classification"
    with _quiet():
        model, info = getattr(transformers, AUTO_CLASSES[task]).from_pretrained(
            source,
            config=config,
            trust_remote_code=False,
            dtype=torch.float32,
            ignore_mismatched_sizes=bool(class_names),
            output_loading_info=True,
        )
    fresh = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if fresh and untrained is None:
        untrained = f"its weights have no {first_names(sorted(fresh))}"
        if class_names and _are_nameless(config):
            _name_classes(model.config, class_names)
    return Pretrained(model, order or list(range(len(class_names))), untrained)


def class_order(config: PreTrainedConfig, class_names: Sequence[str], *, are_numbered: bool) -> list[int] | None:
    """The model's number of each class of the data; None where the model's classes are others.

    Classes are the same where their names are; where one side has numbers only, where there are as many of them.
    """
    names = [name.strip().lower() for name in _classes(config)]
    wanted = [name.lower() for name in class_names]
    if len(set(names)) == len(names) and sorted(names) == sorted(wanted):
        return [names.index(name) for name in wanted]
    numbers = [str(number) for number in range(len(names))]
    are_plain = wanted == numbers or (are_numbered and _are_nameless(config))
    return list(range(len(names))) if are_plain and len(names) == len(wanted) else None


def load_tokenizer(source: str) -> Any:
    """The tokenizer, with a token for padding.

    Raises:
        ValueError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source!r} has no tokenizer that can be read ({str(error).splitlines()[0]}); save the one that the model "
            "was trained with to the same folder, by tokenizer.save_pretrained(folder)."
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {source!r} has neither a pad_token nor an eos_token; set one and save it."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_processor(source: str) -> Any | None:
    """The image processor; None where the model comes without one."""
    if not has_file(source, "preprocessor_config.json"):
        return None
    return AutoImageProcessor.from_pretrained(source, trust_remote_code=False)


def longest_input(config: PreTrainedConfig, tokenizer: Any, asked: int | None, *, default: int) -> int:
    """Tokens of an input at most: as asked for, else `default` or what the model takes where that is less.

    Raises:
        ValueError: more is asked for than the model takes, or less than two.
    """
    positions = getattr(config, "max_position_embeddings", None)
    limit = min(tokenizer.model_max_length, positions if isinstance(positions, int) and positions > 0 else 1 << 30)
    if asked is None:
        return min(default, limit)
    if not 2 <= asked <= limit:
        raise ValueError(f"--max-length is {asked}; expected 2 to {limit} tokens, the most that this model takes.")
    return asked


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers draws no bars, and does not list what it initialises, which is said by us."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.set_verbosity(logging.ERROR)
        transformers_logging.disable_progress_bar()
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _are_nameless(config: PreTrainedConfig) -> bool:
    return _classes(config) == [f"LABEL_{number}" for number in range(len(_classes(config)))]


def _classes(config: PreTrainedConfig) -> list[str]:
    return [str(name) for _, name in sorted((config.id2label or {}).items())]


def _name_classes(config: PreTrainedConfig, names: Sequence[str]) -> None:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
