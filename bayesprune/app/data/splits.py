"""Which examples are held out where a data set lacks a split: the same ones in every run, whatever its seed."""

import torch
from torch import Tensor


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
