"""What modules hold beside tensors and modules: plain values, as JSON and back, and words for what is not plain."""

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Mapping
from enum import Enum
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MAX_DEPTH = 8
_MAX_TEXT = 200
_WRAPPED = ("_hf_hook", "hf_device_map", "_original_forward")  # accelerate's: a device map, mixed precision
_PYTHON = f"python {sys.version_info.major}.{sys.version_info.minor}"
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_FLOATS = ("float16", "float32", "float64")
_NUMPY = {name: np.dtype(name).type for name in ("bool", *_INTEGERS, *_FLOATS)}
_TORCH = {name: getattr(torch, name) for name in ("bool", *_INTEGERS, *_FLOATS, "bfloat16")}


def is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is None, one bool, number or str (of Python, numpy or a tensor), or a tuple or list of such."""
    if type(value) in (tuple, list, torch.Size):
        return depth < MAX_DEPTH and all(is_plain(item, depth + 1) for item in value)
    if isinstance(value, np.generic):
        return type(value) in _NUMPY.values()
    if type(value) is Tensor:
        is_number = value.dim() == 0 and value.dtype in _TORCH.values() and not value.requires_grad
        return is_number and not (value.is_meta and depth)
    return value is None or type(value) in (bool, int, float, str)


def encode(value: Any) -> Any:
    """A plain value as JSON: a tuple becomes {"tuple": [...]}, a numpy number {"numpy": [dtype, number]}."""
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, np.generic):
        return {"numpy": [value.dtype.name, value.item()]}
    if isinstance(value, Tensor):
        # One on the meta device has no value, and is like no other.
        return {"tensor": [str(value.dtype).removeprefix("torch."), None if value.is_meta else value.item()]}
    return [encode(item) for item in value] if isinstance(value, list) else value


def decode(value: Any) -> Any:
    """The plain value of its JSON.

    Raises:
        TypeError, ValueError, KeyError, OverflowError, RuntimeError: it is none.
    """
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tuple":
            return tuple(decode(item) for item in content)
        name, number = content
        if type(number) not in (bool, int, float):
            raise TypeError(f"{number!r} is no number")
        if kind != "numpy":
            return torch.tensor(number, dtype=_TORCH[name], device="cpu")
        with np.errstate(all="ignore"):
            return _NUMPY[name](number)
    return [decode(item) for item in value] if isinstance(value, list) else value


def is_encoded(value: Any, depth: int = 0) -> bool:
    """Whether `decode` takes a JSON value, which may hold anything."""
    if isinstance(value, dict) and value.keys() == {"tuple"}:
        value = value["tuple"]
        if not isinstance(value, list):
            return False
    elif isinstance(value, dict):
        try:
            return value.keys() <= {"numpy", "tensor"} and decode(value) is not None
        except (TypeError, ValueError, KeyError, OverflowError, RuntimeError):
            return False
    if isinstance(value, list):
        return depth < MAX_DEPTH and all(is_encoded(item, depth + 1) for item in value)
    return True


def is_same(value: Any, other: Any) -> bool:
    """Whether two plain values are the same, types and all; NaN is itself."""
    return json.dumps(encode(value)) == json.dumps(encode(other))


def callable_name(value: Any) -> str | None:
    """The name by which a file records an enum member, function, class, method or partial function; None for others."""
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, functools.partial):
        given = [word(argument) for argument in value.args]
        given += [f"{key}={word(argument)}" for key, argument in value.keywords.items()]
        return f"partial({', '.join([word(value.func), *given])})"
    if isinstance(value, (FunctionType, BuiltinFunctionType, MethodType, type)):
        return value.__name__
    return None


def notes(module: nn.Module) -> dict[str, str]:
    """Notes on what else a module holds, in words: dicts and data classes, code without a name, hooks."""
    found: dict[str, str] = {}
    for name, value in vars(module).items():
        if isinstance(value, FunctionType) and value.__name__ == "<lambda>":
            found[f"{name} ({_PYTHON})"] = f"lambda {_code_digest(value.__code__)}"  # other versions, other code
        elif is_record(value):
            found[name] = word(value)
    if names := hooks(module):
        found["hooks"] = ", ".join(names)
    return found


def hooks(module: nn.Module) -> list[str]:
    """Names of the forward hooks of a module that no library registered."""
    registered = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return sorted(word(hook) for hook in registered if not is_of_a_library(hook))


def replaced_methods(module: nn.Module) -> dict[str, Any]:
    """Methods of the class that the module itself replaces, apart from libraries' wrappers around them."""
    if any(name in vars(module) for name in _WRAPPED):
        return {}
    return {
        name: value
        for name, value in vars(module).items()
        if callable(value) and is_method(module, name) and not hasattr(value, "_torchdynamo_orig_callable")
    }


def is_method(module: nn.Module | None, name: str) -> bool:
    """Whether the class of a module has a method of this name."""
    return callable(getattr(type(module), name, None))


def is_record(value: Any, depth: int = 0) -> bool:
    """Whether a value is a dict or data class of somebody's own, and all it holds are plain values and callables."""
    if depth >= MAX_DEPTH or isinstance(value, type):
        return False
    if type(value) is dict:
        held = list(value.values())
        return bool(value) and all(type(key) in (str, int) for key in value) and _are_contents(held, depth)
    if dataclasses.is_dataclass(value) and not is_of_a_library(type(value)):
        return _are_contents([getattr(value, field.name, None) for field in dataclasses.fields(value)], depth)
    return False


def is_of_a_library(value: Any) -> bool:
    """Whether code is torch's, a host library's or ours."""
    code = value if hasattr(value, "__module__") and not isinstance(value, functools.partial) else type(value)
    library = str(getattr(code, "__module__", "")).partition(".")[0]
    return library in ("torch", "timm", "transformers", "accelerate", "peft", "torch_pruning", "bayesprune")


def is_same_code(value: Any, other: Any, depth: int = 0) -> bool:
    """Whether two functions, methods, partial functions or classes of one process do the same."""
    if value is other or depth > MAX_DEPTH:
        return value is other
    if type(value) is not type(other):
        return False
    if isinstance(value, functools.partial):
        keys = value.keywords.keys() | other.keywords.keys()
        pairs = [(value.func, other.func), (value.args, other.args)]
        pairs += [(value.keywords.get(key), other.keywords.get(key)) for key in keys]
        return all(is_same_code(a, b, depth + 1) for a, b in pairs)
    if isinstance(value, MethodType):
        return value.__func__ is other.__func__
    if isinstance(value, FunctionType):
        held = (value.__defaults__, value.__kwdefaults__, _closure(value))
        others = (other.__defaults__, other.__kwdefaults__, _closure(other))
        return value.__code__ == other.__code__ and is_same_code(held, others, depth + 1)
    if isinstance(value, (tuple, list)):
        return len(value) == len(other) and all(
            is_same_code(a, b, depth + 1) for a, b in zip(value, other, strict=True)
        )
    if isinstance(value, Mapping):
        return value.keys() == other.keys() and all(is_same_code(value[key], other[key], depth + 1) for key in value)
    if is_plain(value) and is_plain(other):
        return is_same(value, other)
    return not isinstance(value, (type, BuiltinFunctionType)) or value == other  # objects are built anew


def _are_contents(values: list[Any], depth: int) -> bool:
    return all(is_plain(item) or callable_name(item) is not None or is_record(item, depth + 1) for item in values)


def word(value: Any) -> str:
    """A value in words that are the same in every process; long ones are cut, with a digest of the whole."""
    if (name := callable_name(value)) is not None:
        return name
    if dataclasses.is_dataclass(value) and is_record(value):
        fields = ((field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value))
        text = f"{type(value).__name__}({', '.join(f'{name}={word(item)}' for name, item in fields)})"
    elif isinstance(value, dict) and is_record(value):
        text = f"{{{', '.join(f'{key!r}: {word(item)}' for key, item in value.items())}}}"
    else:
        text = json.dumps(encode(value)) if is_plain(value) else type(value).__name__
    if len(text) <= _MAX_TEXT:
        return text
    return f"{text[:_MAX_TEXT]}... ({hashlib.sha256(text.encode()).hexdigest()[:12]})"


def _closure(function: FunctionType) -> list[Any]:
    cells = function.__closure__ or ()
    return [cell.cell_contents for cell in cells if cell != CellType()]  # an empty one has no contents


def _code_digest(code: CodeType) -> str:
    held = [constant for constant in code.co_consts if is_plain(constant)]
    return hashlib.sha256(repr((code.co_code, code.co_names, held)).encode()).hexdigest()[:12]
