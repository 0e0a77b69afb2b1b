"""How a model is run to be measured: on which inputs, in eval mode without gradients."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bayesprune.foundation.model import eval_mode

ExampleInputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
"""A tensor, a sequence of positional arguments, the list of images of a detector, or a mapping of keyword arguments."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and records no gradients; after it, each module has its own mode again."""
    with eval_mode(model), torch.no_grad():
        yield
