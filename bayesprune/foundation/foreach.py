"""torch's functions of many tensors at once; its optimizers rest on them, but type checkers know none of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def foreach(name: str, tensors: Sequence[Tensor], *operands: Any, **options: Any) -> Any:
    """torch's `_foreach_` function of this name: one kernel for all where the lists hold tensors alike.

    Its result is a list of tensors, or None of a name with an underscore at its end.
    """
    return getattr(torch, f"_foreach_{name}")(tensors, *operands, **options)
