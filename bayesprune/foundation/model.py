"""A model run and held in a mode: its forward on example inputs, evaluation mode, gradients, and its values."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from bayesprune.foundation.batches import given


def run_forward(model: nn.Module, inputs: Any) -> Any:
    """The model's output for a tensor, a tuple of positional arguments, or a mapping of keyword arguments."""
    return given(model, inputs).run(model)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def requires_grad(model: nn.Module, required: bool) -> Iterator[None]:
    """Inside, every parameter requires a gradient, or none does; afterwards each is as it was."""
    before = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(required)
        yield
    finally:
        for parameter, was in before:
            parameter.requires_grad_(was)


def load_values(model: nn.Module, values: Mapping[str, Any], *, strict: bool = True) -> None:
    """`model.load_state_dict(values)`, with the versions of the modules where the values have lost them.

    A state dict says in its `_metadata` which version of a module wrote each part. A dict made from its items has none,
    which modules take for a version before the first: torchvision's MNASNet refuses it, others convert its values.

    Args:
        model: It wrote the values itself, or one of the same classes did.
        values: By state-dict name.
        strict: As for `load_state_dict`.

    Raises:
        RuntimeError: the names or shapes do not fit.
    """
    state = OrderedDict(values)
    metadata = getattr(values, "_metadata", None) or getattr(model.state_dict(), "_metadata", None)
    vars(state)["_metadata"] = metadata
    model.load_state_dict(state, strict=strict)
