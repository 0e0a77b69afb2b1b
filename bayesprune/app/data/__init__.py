"""Data sets of the command line, in three splits: which examples are held out is the same in every run."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader


@dataclass(frozen=True)
class Loaders:
    """Batches of three splits, in any form that `bayesprune.foundation.batches` names.

    Attributes:
        train: Training batches; what a pass takes is drawn anew each time.
        validation: Batches that decide.
        test: Batches that give the last figures.
        num_data: Training examples.
        description: The data in one line.
    """

    train: DataLoader[Any]
    validation: Iterable[Any]
    test: Iterable[Any]
    num_data: int
    description: str


def last_tenth_of_each_class(labels: Tensor, *, what: str) -> tuple[list[int], list[int]]:
    """(the others, the last tenth of each class, at least one), both in order: folders list class after class.

    Args:
        labels: Of all examples, 0 or more.
        what: An example, for the message.

    Raises:
        ValueError: a class has one example.
    """
    kept: list[int] = []
    held_out: list[int] = []
    counts = torch.bincount(labels).tolist()
    for label, members in enumerate(torch.argsort(labels, stable=True).split(counts)):
        if len(members) == 1:
            raise ValueError(
                f"there is one training {what} of class {label}; it takes two or more per class to hold out some "
                "for validation, or a validation split beside the test split"
            )
        cut = len(members) - max(1, len(members) // 10) if len(members) else 0
        kept += members[:cut].tolist()
        held_out += members[cut:].tolist()
    return sorted(kept), sorted(held_out)
