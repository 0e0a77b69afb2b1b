"""A model's moments as one compiled program: the rules are followed once, what they computed is compiled.

`torch.compile` does not look through tensor classes that wrap others, and need not: below the rules there are plain
tensor operations only. They are recorded (`make_fx`) with the model's parameters as inputs, and that graph is compiled.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from bayesprune.moments.memory import KnownMoments, LazyMoments
from bayesprune.moments.settings import current
from bayesprune.moments.tensor import Moments, known
from bayesprune.prediction.predict import sampling


def compile_moments(model: nn.Module, **options: Any) -> Callable[..., Any]:
    """The model under `sampling(model, "moments")`, compiled: a function of what its forward takes.

    Its output has the structure of the model's own, with `Moments` for tensors; gradients reach the model's
    parameters, its buffers are updated. A graph is recorded and compiled for every combination of input shapes, modes
    (training, gradients, autocast) and `settings` when it is first met. As in any recorded graph, what else the forward
    does beside computing happens then only, and numbers among the inputs are constants.

    Args:
        model: A variational model, not wrapped for distributed training.
        **options: What `torch.compile` takes: backend, mode, ...

    Examples:
        >>> import torch
        >>> import bayesprune as bp
        >>> model = bp.to_variational(torch.nn.Linear(3, 2))
        >>> forward = bp.prediction.compile_moments(model, backend="eager")
        >>> forward(torch.randn(5, 3)).variance.shape
        torch.Size([5, 2])

    Raises:
        ValueError: when called, the model has no variational layer.
        TypeError: when called, an input or output holds an object that is neither a tensor, nor a constant, nor a
            container that torch knows.
    """
    programs: dict[Hashable, _Program] = {}

    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_inference_mode_enabled():  # its tensors have no versions, by which written buffers are told
            with torch.inference_mode(False), torch.no_grad():
                return forward(*args, **kwargs)
        given = _Flat.of((args, kwargs), "input")
        buffers = dict(model.named_buffers())
        tensors = [*model.parameters(), *buffers.values(), *given.tensors]
        key = _key(model, tensors, given)
        if key not in programs:
            programs[key] = _record(model, tensors, given, options)
        program = programs[key]
        with _without_autocast(tensors):
            results = program.run(*tensors)
        with torch.no_grad():
            for name in program.written:
                buffers[name].copy_(results.pop(0))
        return program.output.rebuilt(results)

    return forward


class _Flat(NamedTuple):
    """A nested structure taken apart.

    Attributes:
        tensors: Its tensors; those with moments as what is known of them.
        constants: Its leaves, None in place of tensors.
        is_tensor: Which leaves are tensors.
        spec: The structure, with `KnownMoments` in place of tensors with moments.
    """

    tensors: list[Tensor]
    constants: tuple[Any, ...]
    is_tensor: tuple[bool, ...]
    spec: TreeSpec

    @classmethod
    def of(cls, tree: Any, role: str) -> "_Flat":
        leaves, spec = tree_flatten(tree_map(lambda leaf: known(leaf) if isinstance(leaf, Moments) else leaf, tree))
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *_CONSTANTS)):
                raise TypeError(
                    f"compile_moments got an {role} with a {type(leaf).__name__} in it; expected tensors, numbers and "
                    "containers that torch knows. Leave it out (a cache: use_cache=False), or register its type with "
                    "torch.utils._pytree.register_pytree_node."
                )
        is_tensor = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return cls([leaf for leaf in leaves if isinstance(leaf, Tensor)], constants, is_tensor, spec)

    def rebuilt(self, tensors: list[Tensor]) -> Any:
        """The structure with other tensors in it."""
        rest = iter(tensors)
        leaves = [next(rest) if here else c for here, c in zip(self.is_tensor, self.constants, strict=True)]
        tree = tree_unflatten(leaves, self.spec)
        return tree_map(lambda x: Moments.of(LazyMoments(x)) if _is_known(x) else x, tree, is_leaf=_is_known)


class _Program(NamedTuple):
    """A compiled graph.

    Attributes:
        run: Maps parameters, buffers and inputs to a list: new values of the buffers `written`, the output's tensors.
        written: Names of the buffers that the forward writes to.
        output: The output, taken apart.
    """

    run: Callable[..., list[Tensor]]
    written: list[str]
    output: _Flat


def _record(model: nn.Module, tensors: list[Tensor], given: _Flat, options: dict[str, Any]) -> _Program:
    parameter_names = [name for name, _ in model.named_parameters()]
    buffer_names = [name for name, _ in model.named_buffers()]
    found: list[tuple[list[str], _Flat]] = []

    def flat(*values: Tensor) -> list[Tensor]:
        rest = iter(values)
        parameters = {name: next(rest) for name in parameter_names}
        # Of copies, since a graph that writes to its inputs would have the buffers depend on the parameters for ever.
        buffers = {name: next(rest).clone() for name in buffer_names}
        versions = {name: buffer._version for name, buffer in buffers.items()}
        args, kwargs = given.rebuilt(list(rest))
        with _DetachingWithoutGrad() if torch.is_grad_enabled() else nullcontext(), sampling(model, "moments"):
            output = _Flat.of(functional_call(model, (parameters, buffers), args, kwargs), "output")
        written = [name for name, buffer in buffers.items() if buffer._version != versions[name]]
        found.append((written, output))
        return [buffers[name].detach() for name in written] + output.tensors

    # Without a table of decompositions, even an empty one, make_fx forgets `detach`.
    graph = make_fx(flat, decomposition_table={}, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
    (written, output), *_ = found
    defaults: dict[str, Any] = {"dynamic": False}
    if not {"backend", "mode", "options"} & set(options) and _device_types(tensors) == ["cpu"]:
        # Channels last, inductor's choice for convolutions, copies every gradient of a kernel on a CPU.
        defaults["options"] = {"layout_optimization": False}
    return _Program(torch.compile(graph, **(defaults | options)), written, output._replace(tensors=[]))


class _DetachingWithoutGrad(TorchDispatchMode):
    """Records `torch.no_grad`, which operators below autograd do not show, as detached operands."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The forward of an autograd.Function is without gradients too, but is recorded to be differentiated.
        in_function = not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()
        if not torch.is_grad_enabled() and not in_function and func is not torch.ops.aten.detach.default:
            args, kwargs = tree_map(_detached, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _detached(leaf: Any) -> Any:
    return torch.ops.aten.detach.default(leaf) if isinstance(leaf, Tensor) and leaf.requires_grad else leaf


def _key(model: nn.Module, tensors: list[Tensor], given: _Flat) -> Hashable:
    """All that a recorded graph depends on, as far as it can be seen from outside the model."""
    return (
        tuple(name for name, _ in model.named_parameters()),
        tuple(name for name, _ in model.named_buffers()),
        tuple((t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors),
        *(given.constants, given.is_tensor, repr(given.spec)),  # a spec with a dict has no hash in torch 2.7
        tuple(module.training for module in model.modules()),
        torch.is_grad_enabled(),
        tuple((name, _autocast_dtype(name)) for name in _device_types(tensors)),
        current(),
    )


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _device_types(tensors: list[Tensor]) -> list[str]:
    return sorted({tensor.device.type for tensor in tensors})


@contextmanager
def _without_autocast(tensors: list[Tensor]) -> Iterator[None]:
    """A recorded graph has its casts in it; more of them would lower the precision of the variances."""
    with ExitStack() as stack:
        for name in _device_types(tensors):
            stack.enter_context(torch.autocast(name, enabled=False))
        yield


def _is_known(x: Any) -> bool:
    return isinstance(x, KnownMoments)


_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device)
