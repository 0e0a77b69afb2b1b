"""The number of terms that the training loss is a mean over, by which the KL is divided."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from bayesprune.foundation.batches import IGNORED_LABEL

_MAX_EXAMPLES = 4096  # read at most; the count of a larger data set is extrapolated, to about 1 %
_CHUNK = 32


def count_terms(loader: DataLoader, model: nn.Module) -> int:
    """Number of labels that the loss of one pass over the training data has: label tokens, or examples.

    A label of -100 does not count, nor does the first token of a causal language model, which predicts nothing. Where
    the collator makes no tensor of labels, each example is one term. Of more than 4,096 examples so many, evenly
    spaced, are read. The random generators stay as they are.

    Args:
        loader: The Trainer's training data loader.
        model: The model, whose kind of loss says whether labels are shifted.

    Raises:
        ValueError: the data have no length.
    """
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"the number of training examples is unknown: {type(dataset).__name__} has no length. Pass "
            "BayesPruneCallback(num_data=...): examples, or label tokens for a language model."
        )
    total = len(dataset)
    read = min(total, _MAX_EXAMPLES)
    indices = [position * total // read for position in range(read)]
    count = 0
    with _same_random_numbers():
        for start in range(0, read, _CHUNK):
            chunk = indices[start : start + _CHUNK]
            assert loader.collate_fn is not None, "a DataLoader always has one"
            labels = _labels(loader.collate_fn([dataset[index] for index in chunk]), model)
            if labels is None or labels.dim() < 2:
                return total
            count += int(labels.ne(IGNORED_LABEL).sum())
    return round(count * total / read)


def _labels(batch: Any, model: nn.Module) -> Tensor | None:
    """The labels that the loss of this batch uses."""
    if not isinstance(batch, Mapping):
        return None
    labels = batch.get("shift_labels")
    if labels is None:
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.dim() > 1 and _shifts_labels(model):
            labels = labels[..., 1:]
    return labels if isinstance(labels, Tensor) else None


def _shifts_labels(model: nn.Module) -> bool:
    is_causal = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "") is ForCausalLMLoss
    return is_causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Afterwards the generators that collators draw from are where they were."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  (collators use the legacy generator)
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
