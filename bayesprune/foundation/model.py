"""A model run and held in a mode: its forward on example inputs, evaluation mode, gradients, and its values."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.foundation.batches import given


def run_forward(model: nn.Module, inputs: Any) -> Any:
    """The model's output for a tensor, a tuple of positional arguments, or a mapping of keyword arguments."""
    return given(model, inputs).run(model)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors of a model's output, which may nest them in mappings, tuples, lists, dataclasses and objects."""
    pending, seen = [output], set()
    while pending:
        part = pending.pop()
        if isinstance(part, Tensor):
            yield part
        elif id(part) not in seen and not isinstance(part, (nn.Module, type, str, bytes)) and not _is_cache(part):
            seen.add(id(part))  # an object may hold itself
            if isinstance(part, (list, tuple, Mapping)):
                inside = list(part.values() if isinstance(part, Mapping) else part)
            else:
                inside = list(getattr(part, "__dict__", {}).values())
            pending += reversed(inside)


def _is_cache(part: Any) -> bool:
    """Whether something holds keys and values of transformers for the next token, which no one reads as outputs."""
    return hasattr(part, "get_seq_length")


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


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Inside, attention of torch runs layer by layer, not as one fused operator that calls none of its layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


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
