"""How a model is run to be measured: on which inputs, on which device, in eval mode without gradients."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bayesprune.macs import eval_mode

ExampleInputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
"""A tensor, a sequence of positional arguments, or a mapping of keyword arguments."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and records no gradients; after it, each module has its own mode again."""
    with eval_mode(model), torch.no_grad():
        yield


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is; the CPU for a model without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def on_device(inputs: ExampleInputs, device: torch.device) -> Tensor | tuple[Any, ...] | dict[str, Any]:
    """The same inputs with their tensors on this device.

    Raises:
        TypeError: the inputs are no tensor, sequence or mapping.
    """
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {name: _moved(value, device) for name, value in inputs.items()}
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return tuple(_moved(value, device) for value in inputs)
    raise TypeError(
        f"the inputs are a {type(inputs).__name__}; expected a tensor, a sequence of positional arguments or a mapping "
        "of keyword arguments."
    )


def batch_size(inputs: ExampleInputs) -> int:
    """Size of the first dimension of the first tensor among the inputs.

    Raises:
        ValueError: there is no such tensor.
    """
    values = [inputs] if isinstance(inputs, Tensor) else inputs.values() if isinstance(inputs, Mapping) else inputs
    for value in values:
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    raise ValueError(
        "the inputs hold no tensor with a batch dimension; expected one, such as torch.randn(1, 3, 224, 224)."
    )


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
