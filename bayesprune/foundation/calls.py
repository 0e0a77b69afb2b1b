"""Calls of layers whose weights a forward gives to a function by itself, as the Swin transformers of torchvision do."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

_FUNCTIONS = frozenset((F.linear, F.conv1d, F.conv2d, F.conv3d))


@contextmanager
def layers_called(model: nn.Module) -> Iterator[None]:
    """Inside, a function that is given the weight of a layer runs as a call of that layer, with the same result.

    So hooks on the layer run, and what looks at the layers of a model sees it at work.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> seen = []
        >>> _ = net[0].register_forward_hook(lambda layer, args, output: seen.append(output))
        >>> with layers_called(net):
        ...     output = torch.nn.functional.linear(torch.ones(1, 3), net[0].weight)
        >>> seen[0] is output
        True
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, _ConvNd))]
    running: list[nn.Module] = []

    def enter(layer: nn.Module, _: Any) -> None:
        running.append(layer)

    def leave(layer: nn.Module, *_: Any) -> None:
        if layer in running:
            running.remove(layer)

    handles: list[Any] = [layer.register_forward_pre_hook(enter, prepend=True) for layer in layers]
    handles += [layer.register_forward_hook(leave, always_call=True) for layer in layers]
    try:
        with _Calls(layers, running):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Calls(TorchFunctionMode):
    """Calls layers that are not running when a function is given their weight."""

    def __init__(self, layers: Sequence[nn.Module], running: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers, self.running = layers, running

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if not _holder(self.running, weight) and (layer := _holder(self.layers, weight)):
                return _call(layer, func, args, kwargs)
        return func(*args, **kwargs)


def _holder(layers: Sequence[nn.Module], weight: Any) -> nn.Module | None:
    return next((layer for layer in layers if layer._parameters.get("weight") is weight), None)


def _call(layer: nn.Module, func: Any, args: Any, kwargs: Any) -> Any:
    """Calls a layer whose forward is this function meanwhile."""
    attributes = vars(layer)
    own = {"forward": attributes["forward"]} if "forward" in attributes else {}
    if args:
        given, attributes["forward"] = args[0], lambda tensor: func(tensor, *args[1:], **kwargs)
    else:
        given, attributes["forward"] = kwargs["input"], lambda tensor: func(**{**kwargs, "input": tensor})
    try:
        return layer(given)
    finally:
        attributes.pop("forward", None)
        attributes.update(own)
