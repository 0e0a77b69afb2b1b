"""Lets autograd's graph show what a forward hides from it, as detached tensors, checkpoints and reversible layers.

torch-pruning reads which layers hang together off autograd's graph. A model that stops gradients somewhere is no
other model for that, so nothing stops them here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

_APPLY = vars(Function)["apply"]


@contextmanager
def everything_seen() -> Iterator[None]:
    """Inside, `detach`, `no_grad` and functions that run layers stop no gradient; `inference_mode` still does."""
    try:
        CheckpointFunction.apply = staticmethod(_without_checkpoint)  # type: ignore[method-assign]
        Function.apply = classmethod(_in_the_open)  # type: ignore[method-assign,assignment]
        with torch.enable_grad(), _NothingStops():
            yield
    finally:
        Function.apply = _APPLY
        del CheckpointFunction.apply


def _in_the_open(kind: type[Function], *args: Any, **kwargs: Any) -> Any:
    """What a function of autograd gives; one that is given modules or functions runs them as if it were none."""
    given = [part for arg in (*args, *kwargs.values()) for part in (arg if isinstance(arg, (list, tuple)) else [arg])]
    if not any(map(callable, given)):
        return _APPLY.__get__(None, kind)(*args, **kwargs)
    if kind.setup_context is not Function.setup_context:
        return kind.forward(*args, **kwargs)
    return kind.forward(_Context(), *args, **kwargs)


class _Context(SimpleNamespace):
    """Takes what a forward keeps for its backward, which is not called."""

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    mark_dirty = mark_non_differentiable = set_materialize_grads = save_for_forward = save_for_backward


def _without_checkpoint(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
    return function(*args)


class _NothingStops(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            return None
        if func is Tensor.detach or func == Tensor.data.__get__:  # type: ignore[attr-defined]
            tensor = args[0]
            return tensor if tensor.grad_fn is None else torch.ops.aten.alias(tensor)
        return func(*args, **(kwargs or {}))


@contextmanager
def buffers_as_parameters(model: nn.Module) -> Iterator[dict[nn.Parameter, str]]:
    """Inside, buffers of several numbers are parameters, in autograd's eyes; yields their names by what stands in.

    Buffers may have an entry for each channel, as those of a frozen batch norm. The running statistics of torch's own
    norms go with their layer.
    """
    before = [(module, dict(module._buffers), set(module._parameters)) for module in model.modules()]
    found = {}
    try:
        for path, module in model.named_modules():
            for name, buffer in module._buffers.items() if not isinstance(module, _NormBase) else ():
                if buffer is not None and buffer.is_floating_point() and buffer.numel() > 1:
                    module._buffers[name] = stand_in = nn.Parameter(buffer)
                    found[stand_in] = f"{path}.{name}".lstrip(".")
        yield found
    finally:
        for module, buffers, parameters in before:
            for name in buffers.keys() & module._parameters.keys() - parameters:  # a forward that assigns its buffers
                del module._parameters[name]
            module._buffers.clear()
            module._buffers.update(buffers)
