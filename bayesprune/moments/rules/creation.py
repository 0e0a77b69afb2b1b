"""Rules for tensors made in the likeness of another: plain ones, which are certain, as are masks that a model draws."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesprune.moments.registry import follows_directions, register_rule
from bayesprune.moments.tensor import Moments


def _register(*functions: Callable[..., Any]) -> None:
    for function in functions:

        def rule(input: Moments, *args: Any, _function: Callable[..., Any] = function, **kwargs: Any) -> Tensor:
            return _function(input.source.like, *args, **kwargs)

        register_rule(function)(follows_directions(rule))


_register(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like)
_register(torch.rand_like, torch.randn_like, torch.randint_like)
_register(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor)
