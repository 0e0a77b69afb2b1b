"""A model run and held in a mode: its forward on example inputs, evaluation, even noise, gradients, and its values."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bayesprune.foundation.batches import given

Number = TypeVar("Number", int, float)


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and DistributedDataParallel."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


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


@contextmanager
def booked_by_module(model: nn.Module, read: Callable[[], Number]) -> Iterator[dict[str, Number]]:
    """Inside, forwards of the model book on what is yielded by how much a meter rises, by the innermost module.

    Args:
        model: Its modules are hooked meanwhile.
        read: What the meter shows, called as each module is entered and left.
    """
    booked: dict[str, Number] = {}
    inside: list[Any] = [0]  # of each module that runs: what the modules in it booked
    handles: list[Any] = []

    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        entered: list[Number] = []

        def enter(*_: Any) -> None:
            entered.append(read())
            inside.append(0)

        def leave(*_: Any) -> None:
            total = read() - entered.pop()
            own = total - inside.pop()
            booked[name] = booked[name] + own if name in booked else own
            inside[-1] += total

        return enter, leave

    try:
        for name, module in model.named_modules():
            enter, leave = hooks(name)
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        yield booked
    finally:
        for handle in handles:
            handle.remove()


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


def restore_values(model: nn.Module, before: nn.Module, *names: str) -> None:
    """Gives these modules, or all, the values of their own that they have in a copy of the same structure."""
    modules, others = dict(model.named_modules()), dict(before.named_modules())
    for name in names or modules:
        for key, parameter in modules[name]._parameters.items():
            if parameter is not None:
                parameter.data.copy_(others[name].get_parameter(key))
        for key, buffer in others[name]._buffers.items():
            modules[name]._buffers[key] = None if buffer is None else buffer.clone()


@contextmanager
def undone_on_error(undo: Callable[[], None]) -> Iterator[None]:
    """Inside, an error calls this before it goes on."""
    try:
        yield
    except BaseException:
        undo()
        raise


def restored_on_error(model: nn.Module, before: nn.Module) -> AbstractContextManager[None]:
    """Inside, an error leaves the model with the values that it has in a copy of the same structure."""
    return undone_on_error(partial(restore_values, model, before))


# Operations of torch whose result is noise alone.
_NOISE = frozenset(
    ("rand", "randn", "rand_like", "randn_like", "normal_", "uniform_", "exponential_", "log_normal_", "cauchy_")
)


def steady_forward(model: nn.Module, example_inputs: Any) -> Any:
    """The output of a `steady` model, whose layers are seen at work also where a function is given their weights."""
    with steady(model), layers_called(model):
        return run_forward(model, example_inputs)


@contextmanager
def steady(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode, without gradients and cache, and what noise it draws is one number."""
    with torch.no_grad(), eval_mode(model), without_cache(model), even_noise(model), without_fast_path():
        yield


@contextmanager
def even_noise(model: nn.Module) -> Iterator[None]:
    """Inside, what noise a model draws is one number, and random integers are the same each time.

    Noise that differed between channels would make each order of them another model: the latent channels of a
    variational autoencoder, or a dropout that evaluation mode does not switch off.
    """
    with same_random_numbers(model), _EvenNoise():
        yield


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Inside, torch's generators of the model's devices and of the CPU begin at 0; afterwards they are as before."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[d.index] for d in devices)):
            generator.manual_seed(0)
        yield


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Inside, a model of transformers keeps no keys and values: torch-pruning fails on the concatenation."""
    holders = [vars(module) for module in model.modules()]  # the stacks of T5 have configs of their own
    configs: list[Any] = [attributes["config"] for attributes in holders if "config" in attributes]
    before = [(config, config.use_cache) for config in configs if isinstance(getattr(config, "use_cache", None), bool)]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, was in reversed(before):
            config.use_cache = was


class _EvenNoise(TorchDispatchMode):
    """Noise is one half everywhere, and nothing is dropped."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return result
        name, _, overload = func.__name__.partition(".")
        if name in _NOISE and result.is_floating_point():
            result.fill_(0.5)
        elif name == "normal" and "Tensor" in overload:  # of means, deviations, or both
            result.copy_(args[0] + 0.5 * (args[1] if len(args) > 1 else 1.0))
        elif name == "bernoulli_" and overload == "float":
            result.fill_(1.0)
        elif name == "bernoulli" and overload == "default":
            result.copy_(args[0] >= 0.5)
        elif name == "native_dropout":
            result[0].copy_(args[0])
            result[1].fill_(True)
        return result


_FUNCTIONS = frozenset((F.linear, F.conv1d, F.conv2d, F.conv3d))


@contextmanager
def layers_called(model: nn.Module) -> Iterator[None]:
    """Inside, a function that is given the weight of a layer runs as a call of that layer, with the same result.

    So hooks on the layer run, and what looks at the layers of a model sees it at work.

    Examples:
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
