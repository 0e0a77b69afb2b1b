"""What a model does that the one rebuilt from its files does not: told before anything is written.

What decides the output (classes, forwards, functions) is an error; what may or may not matter (hooks, dicts, data
classes, tensors that are no buffers) is named in a warning.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bayesprune.foundation.model import eval_mode, run_forward, tensors_in
from bayesprune.storage.spec import FOR_TRAINING, stock_class
from bayesprune.storage.values import callable_name, hooks, is_method, is_record, is_same_code, replaced_methods, word

# What hosts save by other ways.
_NOT_COMPARED = FOR_TRAINING | {"all_tied_weights_keys", "hf_device_map"}
_NOT_COMPARED |= {"pretrained_cfg", "default_cfg", "_model_args"}
_OUTPUT_EPS = 200  # units in the last place of the largest output: other kernels, other orders of summation


def lost(model: nn.Module, rebuilt: nn.Module) -> list[str]:
    """Classes, forwards and functions of a model that the rebuilt one has otherwise, as text."""
    found: list[str] = []
    for name, module, other in _pairs(model, rebuilt):
        kind, built = _own_class(module), _own_class(other)
        is_leaf = next(module.children(), None) is None
        if kind is not built and (kind.__name__ == built.__name__ or not is_leaf):  # the spec has names of leaves
            found.append(f"{name or '(model)'}: {_path(kind)} in the model, {_path(built)} when it is rebuilt")
        methods, others = replaced_methods(module), replaced_methods(other)
        found += [
            f"{_joined(name, key)}: a method that was replaced on the module itself"
            for key in methods.keys() | others.keys()
            if not is_same_code(methods.get(key), others.get(key))
        ]
        for key, value, built in _attributes(module, other):
            if callable_name(value) is not None and not is_same_code(value, built):
                found.append(f"{_joined(name, key)}: {word(value)} in the model, {word(built)} when it is rebuilt")
    return found


def doubtful(model: nn.Module, rebuilt: nn.Module) -> list[str]:
    """Hooks and attributes of a model that no file keeps and that the rebuilt one has otherwise, as text."""
    found: list[str] = []
    for name, module, other in _pairs(model, rebuilt):
        if (names := hooks(module)) != hooks(other):
            found.append(f"{_joined(name, 'hooks')}: {', '.join(names) or 'none'}")
        for key, value, built in _attributes(module, other):
            if isinstance(value, (Tensor, np.ndarray)):
                differs = not _are_equal(value, built)
            else:
                differs = (is_record(value) or is_record(built)) and word(value) != word(built)
            if differs:
                found.append(f"{_joined(name, key)}: {type(value).__name__}")
    return found


@torch.no_grad()
def outputs_differ(model: nn.Module, rebuilt: nn.Module, example_inputs: Any) -> str | None:
    """How the outputs of the two on the same input and with the same random numbers differ; None where they do not."""
    found = []
    devices = [tensor.device for tensor in model.parameters() if tensor.is_cuda][:1]
    for network in (model, rebuilt):
        with torch.random.fork_rng(devices=devices), eval_mode(network):
            torch.manual_seed(0)
            found.append(list(tensors_in(run_forward(network, example_inputs))))
    kinds = [[(tuple(tensor.shape), tensor.dtype) for tensor in outputs] for outputs in found]
    if not kinds[0]:
        return "no tensors were found in them, so that nothing could be compared"
    if kinds[0] != kinds[1]:
        return f"they are {kinds[0][:4]}, rebuilt {kinds[1][:4]}"
    for number, (output, again) in enumerate(zip(*found, strict=True)):
        if not output.is_floating_point():
            if not torch.equal(output, again):
                return f"output {number} has other values"
            continue
        scale = output[output.isfinite()].abs().max().item() if output.isfinite().any() else 0.0
        tolerance = _OUTPUT_EPS * torch.finfo(output.dtype).eps * scale
        if not torch.allclose(output, again, rtol=0, atol=tolerance, equal_nan=True):
            difference = (output.double() - again.double()).abs().max().item()
            return f"output {number} by up to {difference:.3g}, where the largest is {scale:.3g}"
    return None


def _pairs(model: nn.Module, rebuilt: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    others = dict(rebuilt.named_modules(remove_duplicate=False))
    for name, module in model.named_modules(remove_duplicate=False):
        if name in others:
            yield name, module, others[name]


def _own_class(module: nn.Module) -> type:
    """The class that somebody wrote: torch makes one more for each module with parametrizations."""
    is_parametrized = parametrize.is_parametrized(module)
    return parametrize.type_before_parametrizations(module) if is_parametrized else stock_class(module)


def _attributes(module: nn.Module, other: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    values, others = vars(module), vars(other)
    for key in values.keys() & others.keys() - vars(nn.Module()).keys() - _NOT_COMPARED:
        if not is_method(module, key):
            yield key, values[key], others[key]


def _are_equal(value: Any, other: Any) -> bool:
    if type(value) is not type(other):
        return False
    if isinstance(value, np.ndarray):
        return value.shape == other.shape and bool((value == other).all())
    if value.is_meta or other.is_meta or value.dim() == 0:  # a number is a plain value, which is saved
        return True
    return value.shape == other.shape and torch.equal(value.detach().cpu(), other.detach().cpu())


def _joined(module: str, attribute: str) -> str:
    return f"{module}.{attribute}".lstrip(".")


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
