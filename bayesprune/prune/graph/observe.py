"""A model looked at once: what its layers read and make, what each module costs, and autograd's graph of it all.

One forward in evaluation mode serves the counting of MACs, the search for attention, torch-pruning's graph and the
reference of every experiment; each of them used to run the model by itself.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.calls import layers_called
from bayesprune.foundation.macs import counting_macs
from bayesprune.foundation.model import eval_mode, requires_grad, run_forward, tensors_in
from bayesprune.prune.graph.history import Call, Made
from bayesprune.prune.graph.roots import is_linear, is_root
from bayesprune.prune.graph.seeing import buffers_as_parameters, everything_seen
from bayesprune.prune.graph.steady import even_noise, without_cache
from bayesprune.prune.graph.trace import Trace, trace

_LOGGER = logging.getLogger(__name__)
_ERRORS = (AssertionError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

Key = tuple[str, int]
"""A layer and the number of its call; "" and a number for an output of the model."""


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
        reads: What every layer with channels of its own making read, call by call, and the outputs, as far as they are
            real numbers.
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
        model, layers = self.model, {name: m for name, m in self.model.named_modules() if is_root(m)}
        with ExitStack() as stack:
            for context in (torch.enable_grad(), eval_mode(model), requires_grad(model, True), without_cache(model)):
                stack.enter_context(context)
            for context in (_out_of_place(model), even_noise(model), layers_called(model)):
                stack.enter_context(context)
            macs = stack.enter_context(counting_macs(model))
            stack.enter_context(self._recording())
            see = stack.enter_context(reading(layers, self._keep))
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
                "autograd, not wrapped, compiled or scripted. Single weights can be removed with prune_weights."
            ) from error


See = Callable[[Key, Tensor], Tensor | None]
"""Called with what a layer reads, or the model puts out; what it returns is read in its place."""


@contextmanager
def reading(layers: Mapping[str, nn.Module], see: See) -> Iterator[Callable[[str, Any], Tensor | None]]:
    """Inside, `see` is shown what layers read, as far as they are real numbers; yields how to show it more.

    Args:
        layers: Those watched, by name.
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

    handles = [
        layer.register_forward_pre_hook(lambda _, args, kwargs, name=name: read(name, args, kwargs), with_kwargs=True)
        for name, layer in layers.items()
    ]
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
