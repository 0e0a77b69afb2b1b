"""Where the outputs of layers go: into a batch norm, which can take up a shift, and into a sum with another stream.

Seen while a forward runs: `torch.overrides.TorchFunctionMode` shows every function of torch, and a layer's output is
followed through batch norms, dropout and products with a number by channel, until it is added to something.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from bayesprune.batches import split
from bayesprune.layers import VariationalLayer
from bayesprune.macs import eval_mode

_ADDS = ("add", "add_", "__add__", "__radd__", "__iadd__")
_PRODUCTS = ("mul", "mul_", "__mul__", "__rmul__", "__imul__")
_SAME = ("dropout", "dropout_", "contiguous", "to", "clone")
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


@dataclass
class LayerCall:
    """One run of a layer.

    Attributes:
        name: The layer's name.
        layer: The layer.
        inputs: What went in.
        output: What came out.
        addend: What its output was added to, of the output's shape; None where it was added to nothing.
        gain: By what its output was multiplied on the way there, of a shape that broadcasts; None for 1.
        norm: The batch norm in evaluation mode that its output went into, and into nothing else.
    """

    name: str
    layer: VariationalLayer
    inputs: Tensor
    output: Tensor
    addend: Tensor | None = None
    gain: Tensor | None = None
    norm: nn.Module | None = None


@torch.no_grad()
def layer_calls(
    model: nn.Module, batch: Any, layers: Mapping[str, VariationalLayer], *, num_calls: int = 0, num_sums: int = 0
) -> list[LayerCall]:
    """The runs of these layers in one forward of a batch in evaluation mode, in their order.

    Args:
        model: The model.
        batch: As `bayesprune.batches` reads them, on the model's device.
        layers: What is watched, by name.
        num_calls: The forward ends after so many runs, `num_sums` of which met their sum; 0 lets it run to its end,
            and only then is `LayerCall.norm` to be trusted.
        num_sums: See `num_calls`.
    """
    watch = _Watch(model, num_calls, num_sums)
    try:
        with eval_mode(model), _hooked(layers, watch), watch:
            split(model, batch).run(model)
    except _DoneError:
        return watch.calls
    for call in watch.calls:
        if watch.uses.get(id(call.output), 0) != 1:
            call.norm = None
    return watch.calls


class _DoneError(Exception):
    """Ends a forward of which no more is needed."""


class _Watch(TorchFunctionMode):
    """Follows outputs of layers by the identity of tensors, all of which are kept meanwhile."""

    def __init__(self, model: nn.Module, num_calls: int, num_sums: int) -> None:
        super().__init__()
        self.calls: list[LayerCall] = []
        self.uses: dict[int, int] = {}
        self._num_calls, self._num_sums = num_calls, num_sums
        self._followed: dict[int, tuple[LayerCall, Tensor]] = {}
        self._norms = {id(m.running_mean): m for m in model.modules() if isinstance(m, _BatchNorm)}

    def add(self, call: LayerCall) -> None:
        """Begins to follow the output of a run."""
        self.calls.append(call)
        self._followed[id(call.output)] = call, call.output
        self._end()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a function of torch, and looks at what it takes and gives."""
        kwargs = kwargs or {}
        found = [self._followed[id(each)] for each in (*args, *kwargs.values()) if id(each) in self._followed]
        name = getattr(func, "__name__", "")
        if found and name in _ADDS and len(args) == 2:
            self._meet(*args)
        result = func(*args, **kwargs)
        for call, tensor in found if isinstance(result, Tensor) else ():
            self.uses[id(tensor)] = self.uses.get(id(tensor), 0) + 1
            if name == "batch_norm":
                self._through_norm(call, tensor, dict(zip(_BATCH_NORM, args, strict=False)) | kwargs, result)
            elif name in (*_PRODUCTS, *_ADDS) and len(args) == 2 and result.shape == tensor.shape:
                other = args[1] if args[0] is tensor else args[0]
                if not isinstance(other, Tensor) or _is_by_channel(other, call):
                    self._go_on(call, result, other if name in _PRODUCTS else 1.0)
            elif name in _SAME and result.shape == tensor.shape:
                self._go_on(call, result, 1.0)
        return result

    def _meet(self, one: Any, other: Any) -> None:
        for own, addend in ((one, other), (other, one)):
            call = self._followed[id(own)][0] if id(own) in self._followed else None
            if call is None or call.addend is not None or not isinstance(addend, Tensor):
                continue
            if addend.shape == call.output.shape == own.shape:
                call.addend = addend.clone()  # the sum may be written to it
                self._end()

    def _through_norm(self, call: LayerCall, tensor: Tensor, given: dict[str, Any], result: Tensor) -> None:
        if given.get("training") or given.get("running_var") is None:
            return
        if tensor is call.output:
            call.norm = self._norms.get(id(given["running_mean"]))
        gain = (given["running_var"] + given.get("eps", 1e-5)).rsqrt()
        gain = gain if given.get("weight") is None else gain * given["weight"]
        self._go_on(call, result, gain.view(-1, *[1] * (tensor.dim() - 2)))

    def _go_on(self, call: LayerCall, result: Tensor, factor: Any) -> None:
        if isinstance(factor, Tensor) or factor != 1.0:
            factor = torch.as_tensor(factor, device=result.device)
            call.gain = factor if call.gain is None else call.gain * factor
        self._followed[id(result)] = call, result

    def _end(self) -> None:
        num_sums = sum(call.addend is not None for call in self.calls)
        if 0 < self._num_calls <= len(self.calls) and num_sums >= self._num_sums:
            raise _DoneError


def _is_by_channel(factor: Tensor, call: LayerCall) -> bool:
    """Whether a tensor has one number for each output channel, or one for all."""
    num_dims = call.output.dim()
    sizes = [1] * (num_dims - factor.dim()) + list(factor.shape)
    return len(sizes) == num_dims and all(
        size == 1 or dim == call.layer.feature_dim % num_dims for dim, size in enumerate(sizes)
    )


@contextmanager
def _hooked(layers: Mapping[str, VariationalLayer], watch: _Watch) -> Iterator[None]:
    """Inside, every run of a layer is followed."""

    def hook(name: str, layer: VariationalLayer) -> Any:
        def keep(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(output, Tensor):
                watch.add(LayerCall(name, layer, args[0] if args else next(iter(kwargs.values())), output))

        return keep

    handles = [layer.register_forward_hook(hook(n, layer), with_kwargs=True) for n, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
