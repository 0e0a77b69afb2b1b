"""A model looked at once: what its layers read and make, what each module costs, and autograd's graph of it all.

torch-pruning reads which layers hang together off autograd's graph. A model that stops gradients somewhere, by detached
tensors, checkpoints or reversible layers, is no other model for that, so nothing stops them here.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.macs import counting_macs
from bayesprune.foundation.model import (
    eval_mode,
    even_noise,
    layers_called,
    requires_grad,
    run_forward,
    tensors_in,
    without_cache,
)
from bayesprune.layers.stacks import stack_of
from bayesprune.prune.graph.prunable_layers import is_linear, is_root
from bayesprune.prune.graph.trace import Call, Made, Trace, trace

_LOGGER = logging.getLogger(__name__)
_ERRORS = (AssertionError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

Key = tuple[str, int]
"""A layer and the number of its call; "" and a number for what the model, or experts in it, put out."""


class Observed:
    """A model and what one evaluation forward of it on example inputs showed.

    Frozen parameters and buffers are in autograd's graph, and what stops gradients in the forward does not, unless the
    model runs only as it is. The model, its modes and its `requires_grad` are as before afterwards.

    Attributes:
        model: The model, which may be changed and put back while this is in use.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        macs: MACs by the innermost module that ran the operation.
        calls: Beginnings and ends of calls, in their order.
        ends: The outputs of the model.
        reads: What every layer with channels of its own making read, call by call, and the outputs of experts and the
            model, as far as they are real numbers.
        buffers: Names of buffers, by the parameters that stand for them in the graph.

    Raises:
        UnsupportedModelError: the model does not run on these inputs.
    """

    def __init__(self, model: nn.Module, example_inputs: Any) -> None:
        self.model, self.example_inputs = model, example_inputs
        with self._refusing():
            try:
                self._run(sees_everything=True)
            except _ERRORS as error:  # a forward that writes into buffers, or relies on detached tensors
                self._run_as_it_is(error)

    @cached_property
    def trace(self) -> Trace:
        """torch-pruning's dependency graph, and what it says about layers.

        Raises:
            UnsupportedModelError: torch-pruning fails on the model.
        """
        with self._refusing():
            try:
                return trace(self.model, self.calls, self.ends, self.buffers)
            except _ERRORS as error:
                if not self._sees_everything:
                    raise
                self._run_as_it_is(error)
                return trace(self.model, self.calls, self.ends, self.buffers)

    def _run_as_it_is(self, error: Exception) -> None:
        _LOGGER.debug("run again, as autograd sees the model: %s", error)
        self._run(sees_everything=False)

    def _run(self, *, sees_everything: bool) -> None:
        self._sees_everything = sees_everything
        self.calls: list[Call] = []
        self.reads: dict[Key, Tensor] = {}
        model = self.model
        with ExitStack() as stack:
            for context in (torch.enable_grad(), eval_mode(model), requires_grad(model, True), without_cache(model)):
                stack.enter_context(context)
            for context in (_out_of_place(model), even_noise(model), layers_called(model)):
                stack.enter_context(context)
            macs = stack.enter_context(counting_macs(model))
            stack.enter_context(self._recording())
            see = stack.enter_context(reading(model, self._keep))
            self.buffers: dict[nn.Parameter, str] = {}
            if sees_everything:
                stack.enter_context(saved_tensors_hooks(_forgotten, _forgotten))
                stack.enter_context(everything_seen())
                self.buffers = stack.enter_context(buffers_as_parameters(model))
            output = run_forward(model, self.example_inputs)
            found = list(tensors_in(output))
            for tensor in found:
                see("", tensor)
            self.ends = [Made(tensor.grad_fn, tensor.shape) for tensor in found if tensor.grad_fn is not None]
        self.macs = {name: count for name, count in macs.items() if count}

    def _keep(self, key: Key, tensor: Tensor) -> None:
        self.reads[key] = _copy(tensor)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.calls.append(Call(module, False, _made(args[:1]), False))

        def end(module: nn.Module, _: Any, output: Any) -> None:
            self.calls.append(Call(module, True, _made(output), isinstance(output, Tensor)))

        handles = [module.register_forward_pre_hook(begin) for module in self.model.modules() if is_linear(module)]
        handles += [module.register_forward_hook(end) for module in self.model.modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except _ERRORS as error:
            raise UnsupportedModelError(
                f"torch-pruning {version('torch-pruning')} cannot trace {type(self.model).__name__} "
                f"({type(error).__name__}: {error}); expected a model whose forward runs on example_inputs under "
                "autograd, not wrapped, compiled or scripted. Single weights can be removed all the same, by "
                'prune_weights or a target such as "weights=0.2".'
            ) from error


See = Callable[[Key, Tensor], Tensor | None]
"""Called with what a layer reads, or what is put out; what it returns is read in its place."""


@contextmanager
def reading(model: nn.Module, see: See) -> Iterator[Callable[[str, Any], Tensor | None]]:
    """Inside, `see` is shown what layers read, as far as they are real numbers; yields how to show it more.

    Of stacked experts, which read their channels themselves, it is shown what they put out.

    Args:
        model: That has the layers.
        see: What is done with each tensor, before anything writes into it.
    """
    counts: Counter[str] = Counter()

    def show(name: str, tensor: Any) -> Tensor | None:
        if not (isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel()):
            return None
        counts[name] += 1
        return see((name, counts[name] - 1), tensor)

    def read(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:
            show(name, next(iter(kwargs.values()), None))
        elif (other := show(name, args[0])) is not None:
            return (other, *args[1:]), kwargs
        return None

    def put_out(_: nn.Module, __: Any, output: Any) -> None:
        for tensor in tensors_in(output):
            show("", tensor)

    handles = [
        layer.register_forward_pre_hook(lambda _, args, kwargs, name=name: read(name, args, kwargs), with_kwargs=True)
        for name, layer in model.named_modules()
        if is_root(layer)
    ]
    handles += [module.register_forward_hook(put_out) for module in model.modules() if stack_of(module) is not None]
    try:
        yield show
    finally:
        for handle in handles:
            handle.remove()


def _forgotten(_: Any) -> Any:
    """Nothing of what autograd saves for a backward, which is not run: its graph alone is read."""


def _copy(tensor: Tensor) -> Tensor:
    return torch.ops.aten.detach.default(tensor).clone()  # the method detaches nothing while everything is seen


def _made(value: Any) -> tuple[Made, ...]:
    return tuple(Made(tensor.grad_fn, tensor.shape) for tensor in tensors_in(value))


@contextmanager
def _out_of_place(model: nn.Module) -> Iterator[None]:
    """Inside, activations write into no output of a layer: autograd forgets the layer where that is a view."""
    writing: list[Any] = [module for module in model.modules() if getattr(module, "inplace", None) is True]
    try:
        for module in writing:
            module.inplace = False
        yield
    finally:
        for module in writing:
            module.inplace = True


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
