"""Forwards that can be compared: evaluation mode, and random numbers that neither a second run nor an order changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bayesprune.foundation.calls import layers_called
from bayesprune.foundation.model import eval_mode, run_forward, without_fast_path

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
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices), _EvenNoise():
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
