"""The readers of layers' outputs: a batch norm, which can take up a shift, or a sum with another stream.

Seen while a forward runs: `torch.overrides.TorchFunctionMode` shows every function of torch, and a layer's output is
followed through batch norms, dropout and products with a number by channel, until it is added to something. A `Walk` is
a forward that halts behind a layer, so that the layer can change before the forward goes on.
"""

import math
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from bayesprune.foundation.batches import device_of, split
from bayesprune.foundation.device import present_autocast
from bayesprune.foundation.kinds import kind_of
from bayesprune.foundation.model import eval_mode
from bayesprune.laplace.calls import Again, LayerCall
from bayesprune.layers import VariationalLayer

_IN_PLACE = ("add_", "__iadd__")
_ADDS = ("add", "__add__", "__radd__", *_IN_PLACE)
_PRODUCTS = ("mul", "__mul__", "__rmul__")
_SAME = ("dropout", "contiguous", "to", "clone")
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


@torch.no_grad()
def layer_calls(
    model: nn.Module,
    batch: Any,
    layers: Mapping[str, VariationalLayer],
    *,
    with_values: bool = True,
    behind: Collection[Tensor] = (),
) -> list[LayerCall]:
    """The runs of these layers in one forward of a batch in evaluation mode, as they, or the sums they met, came.

    Args:
        model: The model.
        batch: As `bayesprune.foundation.batches` reads them, on the model's device.
        layers: What is watched, by name.
        with_values: False leaves tensors without values in the calls, on torch's meta device, so that the forward holds
            no more than it does by itself.
        behind: Weights; runs that are over before one of these is first used are left out.
    """
    watch = _Watch(model, with_values=with_values, behind=behind)
    with eval_mode(model), watched(layers), watch.running():
        split(model, batch).run(model)
    for call in watch.times:
        if call.num_uses != 1:
            call.norm = None
    own_runs = Counter((call.norm, call.name) for call in watch.times)
    for call in watch.times:
        if own_runs[call.norm, call.name] != watch.norm_runs[call.norm]:
            call.norm = None
    return sorted((c for c, time in watch.times.items() if time >= watch.start), key=watch.times.__getitem__)


@contextmanager
def watched(layers: Mapping[str, VariationalLayer]) -> Iterator[None]:
    """Inside, walks over the model halt behind these layers."""

    def hook(name: str, layer: VariationalLayer) -> Any:
        def meet(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if (watch := _WATCH.get()) is None or not isinstance(output, Tensor):
                return None
            inputs = args[0] if args else next(iter(kwargs.values()))
            again = Again(layer, args, kwargs, present_autocast(output.device))
            return watch.meet(LayerCall(name, layer, inputs, output, again))

        return meet

    handles = [layer.register_forward_hook(hook(n, layer), with_kwargs=True) for n, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Walk:
    """One forward of a batch, in a thread of its own, that halts behind the layers that it is asked for.

    No two walks run at the same time: `advance` returns once its own has halted. They run inside `watched` and
    `eval_mode`, without gradients.

    Args:
        model: The model.
        batch: As `bayesprune.foundation.batches` reads them, on the model's device.
        at_sum: Names of layers behind which the forward halts where their output meets its sum, so that
            `LayerCall.addend` and `gain` are known; behind others it halts at once.
    """

    def __init__(self, model: nn.Module, batch: Any, at_sum: Collection[str] = ()) -> None:
        self.is_over = False
        self._watch = _Watch(model, at_sum, self._halt)
        self._wanted = ""
        self._call: LayerCall | None = None
        self._error: BaseException | None = None
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        forward = partial(self._forward, model, batch, torch.get_default_device())
        run = partial(_under, present_autocast(device_of(model)), partial(copy_context().run, forward))
        self._thread = threading.Thread(target=run, name="bayesprune-walk", daemon=True)
        self._thread.start()

    def advance(self, name: str, *, stay: bool = False) -> LayerCall | None:
        """Advances to the next run of the layer of this name; None where the forward ends without one.

        Args:
            name: The layer's.
            stay: Whether the run that it halted behind last will do.
        """
        if self.is_over:
            return None
        if stay and self._call is not None and self._call.name == name:
            return self._call
        self._wanted, self._call = name, None
        self._go.release()
        self._halted.acquire()
        if self._error is not None:
            raise self._error
        return self._call

    def change(self, shift: Tensor | None = None) -> None:
        """Makes the forward go on with what the layer that it halted behind gives with its present weights.

        Args:
            shift: What the running mean of the batch norm behind the layer has become smaller by, (R,).
        """
        call = self._call
        assert call is not None, "the walk has halted"
        output = call.again()
        if call.addend is None:
            self._watch.replacement = output
            return
        change, call.output = output - call.output, output
        if shift is not None:
            change += shift.to(change).view(-1, *[1] * (change.dim() - 2))
        self._watch.summand.add_(change if call.gain is None else change * call.gain)

    def close(self) -> None:
        """Ends the forward where it is."""
        if not self.is_over:
            self.is_over = True
            self._go.release()
        self._thread.join()

    def _forward(self, model: nn.Module, batch: Any, device: torch.device) -> None:
        self._go.acquire()
        try:
            if not self.is_over:
                with torch.no_grad(), nullcontext() if device.type == "cpu" else device, self._watch.running():
                    split(model, batch).run(model)
        except _DoneError:
            pass
        except BaseException as error:  # noqa: BLE001 (raised by `advance`)
            self._error = error
        self._call, self.is_over = None, True
        self._halted.release()

    def _halt(self, call: LayerCall) -> None:
        if call.name == self._wanted:
            self._call = call
            self._halted.release()
            self._go.acquire()
            if self.is_over:
                raise _DoneError


class _DoneError(BaseException):
    """Ends a forward of which no more is needed; no `except Exception` in a model's forward keeps it running."""


class _Watch(TorchFunctionMode):
    """Follows outputs of layers by the identity of tensors, which are kept for as long as they are followed.

    Attributes:
        times: Where nothing halts, every run of a layer with when it was over: at its sum, or at once.
        norm_runs: How often each batch norm ran.
        start: When a weight of `behind` was first used; the beginning where there are none.
        replacement: What a layer is to give in place of its output.
        summand: What is about to be added to a stream.
    """

    def __init__(
        self,
        model: nn.Module,
        at_sum: Collection[str] = (),
        halt: Callable[[LayerCall], None] | None = None,
        *,
        with_values: bool = True,
        behind: Collection[Tensor] = (),
    ) -> None:
        super().__init__()
        self.times: dict[LayerCall, int] = {}
        self.norm_runs: Counter[nn.Module | None] = Counter()
        self.start = math.inf if behind else 0
        self._behind = {id(weight) for weight in behind}
        self.replacement: Tensor | None = None
        self.summand = torch.empty(0)
        self._clock = count()
        self._at_sum, self._halt, self._with_values = at_sum, halt, with_values
        self._sources: Any = WeakIdKeyDictionary()
        self._outputs: Any = WeakIdKeyDictionary()
        self._followed: dict[int, tuple[LayerCall, Tensor]] = {}
        self._taken: set[int] = set()
        self._norms = {id(m.running_mean): m for m in model.modules() if isinstance(m, _BatchNorm)}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, functions of torch and layers that are `watched` are seen."""
        token = _WATCH.set(self)
        try:
            with self:
                yield
        finally:
            _WATCH.reset(token)

    def meet(self, call: LayerCall) -> Tensor | None:
        """Takes note of a run; what is to replace its output."""
        if self._halt is not None and call.name not in self._at_sum:
            self._halt(call)
            replacement, self.replacement = self.replacement, None
            return replacement
        if self._halt is None:
            self.times[call] = next(self._clock)
            call.source = self._sources.setdefault(call.inputs, len(self.times))
            self._outputs[call.output] = call
        self._follow(call, call.output)
        if self._halt is None and self._with_values:
            call.copy_values()
        return None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs a function of torch, and looks at what it takes and gives."""
        kwargs = kwargs or {}
        keys = {id(value): value for value in (*args, *kwargs.values())}
        found = [self._followed[key] for key in keys if key in self._followed]
        name = getattr(func, "__name__", "")
        if name in _ADDS and len(args) == 2 and not kwargs:
            found = [(call, tensor) for call, tensor in found if not self._is_sum(call, tensor, args)]
        if name == "batch_norm":
            self.norm_runs[self._norms.get(id(_of_batch_norm(args, kwargs)["running_mean"]))] += 1
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) or (isinstance(result, tuple | list) and not isinstance(result, torch.Size)):
            if self.start == math.inf and not self._behind.isdisjoint(keys):
                self.start = next(self._clock)
            for value in (keys[key] for key in keys if isinstance(keys[key], Tensor)):
                if value in self._outputs:
                    self._outputs[value].num_uses += 1
            for call, tensor in found:
                is_first = id(tensor) not in self._taken
                self._taken.add(id(tensor))
                if not (is_first and self._goes_on(name, call, tensor, args, kwargs, result)):
                    self._forget(call)
        return result

    def _is_sum(self, call: LayerCall, tensor: Tensor, args: tuple) -> bool:
        """Whether the layer's output is added to a tensor of its shape that is made without it; halts there."""
        addend = args[1] if args[0] is tensor else args[0]
        if id(tensor) in self._taken or addend is tensor or not isinstance(addend, Tensor):
            return False
        if not addend.shape == call.output.shape == tensor.shape:
            return False
        call.addend = addend.clone() if self._halt is None and self._with_values else addend
        self._forget(call)
        if self._halt is None:
            self.times[call] = next(self._clock)
        else:
            self.summand = tensor
            self._halt(call)
        return True

    def _goes_on(
        self, name: str, call: LayerCall, tensor: Tensor, args: tuple, kwargs: dict[str, Any], result: Any
    ) -> bool:
        """Whether the result is the layer's output times a number by channel, plus another; it is followed then."""
        if not isinstance(result, Tensor) or result.shape != tensor.shape:
            return False
        factor: Any = 1.0
        if name == "batch_norm":
            given = _of_batch_norm(args, kwargs)
            if given.get("training") or given.get("running_var") is None:
                return False
            if self._outputs.get(tensor) is call:
                call.norm = self._norms.get(id(given["running_mean"]))
            factor = (given["running_var"] + given.get("eps", 1e-5)).rsqrt()
            factor = factor if given.get("weight") is None else factor * given["weight"]
            factor = factor.view(-1, *[1] * (tensor.dim() - 2))
        elif name in (*_PRODUCTS, *_ADDS) and name not in _IN_PLACE and len(args) == 2 and not kwargs:
            other = args[1] if args[0] is tensor else args[0]
            if isinstance(other, Tensor) and not _is_by_channel(other, call):
                return False
            factor = other if name in _PRODUCTS else 1.0
        elif name not in _SAME:
            return False
        if isinstance(factor, Tensor) or factor != 1.0:
            factor = torch.as_tensor(factor, device=result.device)
            call.gain = factor if call.gain is None else call.gain * factor
        self._follow(call, result)
        return True

    def _follow(self, call: LayerCall, tensor: Tensor) -> None:
        self._followed[id(tensor)] = call, tensor
        self._taken.discard(id(tensor))

    def _forget(self, call: LayerCall) -> None:
        for key in [key for key, (other, _) in self._followed.items() if other is call]:
            del self._followed[key]
        if not self._with_values:
            call.lose_values()


def _under(autocast: Callable[[], torch.autocast], run: Callable[[], Any]) -> Any:
    with autocast():
        return run()


def _of_batch_norm(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(_BATCH_NORM, args, strict=False)) | kwargs


_WATCH: ContextVar[_Watch | None] = ContextVar("bayesprune_watch", default=None)
"""What watches the forward that runs in this context."""


def _is_by_channel(factor: Tensor, call: LayerCall) -> bool:
    """Whether a tensor has one number for each output channel, or one for all."""
    num_dims = call.output.dim()
    sizes = [1] * (num_dims - factor.dim()) + list(factor.shape)
    return len(sizes) == num_dims and all(
        size == 1 or dim == kind_of(call.layer).feature_dim % num_dims for dim, size in enumerate(sizes)
    )
