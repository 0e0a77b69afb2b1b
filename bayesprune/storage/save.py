"""Writes a model to a directory, so that a fresh process loads it with one call, and says before what would be lost.

What decides the output (classes, forwards, functions) is an error; what may or may not matter (hooks, dicts, data
classes, tensors that are no buffers) is named in a warning.
"""

import copy
import json
import logging
import reprlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bayesprune.errors import StorageError, UnsupportedModelError
from bayesprune.foundation.model import eval_mode, run_forward, tensors_in
from bayesprune.foundation.sharding import check_whole
from bayesprune.layers import named_auxiliaries
from bayesprune.storage import base as bases
from bayesprune.storage.base import BaseModel
from bayesprune.storage.digests import json_digest, sealed, tensor_digest
from bayesprune.storage.files import json_writer, num_bytes, shard_writers, tensor_writer, write_together
from bayesprune.storage.levels import LEVELS, Level, Levels, record_of, smaller
from bayesprune.storage.packing import Described, check_levels, level_spec, packed
from bayesprune.storage.reading import FORMAT_VERSION, RECORD
from bayesprune.storage.rebuild import difference, rebuild
from bayesprune.storage.spec import (
    FOR_TRAINING,
    ModelRecord,
    computed_buffers,
    describe_model,
    state_tensors,
    stock_class,
    unsaved_buffers,
)
from bayesprune.storage.values import callable_name, hooks, is_method, is_record, is_same_code, replaced_methods, word

_LOGGER = logging.getLogger(__name__)
_PACKAGES = ("bayesprune", "torch", "safetensors", "timm", "transformers", "torch-pruning")


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    model_args: Mapping[str, Any] | None = None,
    plain: bool = False,
    example_inputs: Any = None,
    history: Any = None,
    report: Any = None,
    max_shard_size: int | str | None = None,
    coding: Literal["entropy"] | None = None,
    levels: Sequence[Level] = (),
) -> None:
    """Writes `model.safetensors`, `bayesprune.json` and, of a timm or transformers model, `config.json` to a directory.

    The files hold no pickle and no code. What is written was rebuilt and compared with the model before the directory
    is touched; a save that fails leaves the previous one in that directory as it was. A model that is still variational
    is saved with its stds and masks. Replaced forwards, functions and classes are refused, and hooks and other
    attributes that no file holds are named in a warning. Where several processes train one model, one of them saves.

    Args:
        model: A model of timm or transformers (then `load(directory)` builds it again) or any module (then
            `load(directory, model=...)` wants the dense one). On any device, in any mode; neither it nor the global
            random numbers are changed.
        directory: Made where it is missing.
        model_args: Constructor arguments of the timm model that it does not show, such as `{"img_size": 64}`, as JSON
            values; recent timm versions remember them. None leaves out one that timm remembers.
        plain: True saves a model of timm or transformers like any other module: for one whose layers were replaced by
            others.
        example_inputs: A tensor, a tuple of arguments, or a mapping of keyword arguments for the model, on its device.
            With them its outputs in evaluation mode are compared with those of the model that `load` will build.
        history: What was done to the model, as JSON values; kept in `bayesprune.json`.
        report: What was measured, as JSON values; kept in `bayesprune.json`.
        max_shard_size: Tensors that need more than this ("5GB", or bytes) go to several files with an index.
        coding: "entropy" writes the tensors without loss in as many bytes as their values have entropy: a file with
            90 % zeros is about a tenth of its size, one that `bayesprune.quantize` rounded far less. It needs the
            package constriction, here and for loading, and `import bayesprune` before a library's stock loading call.
        levels: Smaller versions of the model, which `load(directory, "macs=0.5")` gives; see `bayesprune.elastic`. What
            they do not share with the model goes to `levels.safetensors`. Libraries' stock calls load the model itself.

    Raises:
        StorageError: the base cannot be rebuilt to the model (the message says where they differ) or computes something
            else with it, or the directory cannot be written.
        UnsupportedModelError: the model is wrapped (DDP, FSDP, compiled), has gates, or holds tensors that safetensors
            does not.
        ValueError: `model_args` for a module that is not timm's, `example_inputs` for a plain one, another `coding`,
            or `levels` that are no smaller versions of the model.
        TypeError: `history` or `report` are not JSON values.
    """
    _check_unwrapped(model)
    if coding not in (None, "entropy"):
        raise ValueError(f'coding={coding!r}; expected "entropy", or None for plain tensors.')
    max_bytes = None if max_shard_size is None else num_bytes(max_shard_size)
    base = None if plain else bases.describe(model, None if model_args is None else dict(model_args))
    if base is None and model_args is not None:
        raise ValueError(
            f"model_args={dict(model_args)!r} for a {type(model).__name__} that is saved as a plain module; they are "
            "for models that timm builds. Leave model_args out, and pass the dense model to load."
        )
    _check_json(history=history, report=report)
    if base is None and example_inputs is not None:
        raise ValueError(
            f"example_inputs for a {type(model).__name__} that is saved as a plain module, which nothing but your own "
            "code rebuilds. Leave them out, and compare outputs after load(directory, model=...)."
        )
    check_levels(levels)
    spec = describe_model(model) if base is None else _spec_against(model, base, example_inputs)
    tensors = _tensors_to_write(model, spec)
    save_id = uuid.uuid4().hex
    record = {
        "format_version": FORMAT_VERSION,
        "save_id": save_id,
        "versions": _versions(),
        "base": None if base is None else base.to_json(),
        "spec": spec.to_json(),
        "history": history,
        "report": report,
    }
    header = {"format": "pt", "save_id": save_id, "format_version": str(FORMAT_VERSION)}
    writers = shard_writers(tensors, header, max_bytes, coded=coding is not None)
    if levels:
        found, file = _packed_levels(model, spec, tensors, levels, coding is not None, example_inputs)
        writers[LEVELS] = tensor_writer(file, header, coded=coding is not None)
        record["levels"] = found.to_json()
    if base is not None:
        described = spec.to_json() | ({} if coding is None else {"coding": coding})
        files = bases.host_of(base).files(base, described, save_id)
        writers |= {name: json_writer(value) for name, value in files.items()}
        record["files"] = {name: json_digest(value) for name, value in files.items()}
    writers[RECORD] = json_writer(sealed(record))
    write_together(Path(directory), writers)


def _spec_against(model: nn.Module, base: BaseModel, example_inputs: Any) -> ModelRecord:
    """The spec relative to the base, after a try that it rebuilds the model."""
    try:
        skeleton = bases.build(base)
        spec = describe_model(model, skeleton)
        rebuild(skeleton, spec)
        if other := sorted(unsaved_buffers(model).keys() - unsaved_buffers(skeleton).keys()):
            raise StorageError(difference("buffers", "that are not in the state dict and that it has not", other))
        spec = replace(spec, computed=computed_buffers(model, skeleton))
        if other := lost(model, skeleton):
            raise StorageError(difference("classes and functions", "that no file can say", other))
    except StorageError as error:
        raise StorageError(
            f"{base.library} model {base.name!r} built with {reprlib.repr(base.args)} does not become the model to "
            f"save: {error}\n"
            "Pass the constructor arguments that are missing as model_args={...}, or save with plain=True and load "
            "with load(directory, model=...). Nothing was written."
        ) from error
    if named := doubtful(model, skeleton):
        _LOGGER.warning(
            "%s\nIf outputs depend on them, the loaded model has others; save(example_inputs=...) tries it.",
            difference("hooks and attributes", f"of this {type(model).__name__} are not saved", named),
        )
    if example_inputs is not None:
        _check_outputs(model, skeleton, spec, example_inputs)
    return spec


def _check_outputs(model: nn.Module, rebuilt: nn.Module, spec: ModelRecord, example_inputs: Any) -> None:
    """Refuses a model whose outputs are not those of the rebuilt one with the same tensors."""
    rebuild(rebuilt, spec, _tensors_to_write(model, spec))
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    if differ := outputs_differ(model, rebuilt.to(device), example_inputs):
        raise StorageError(
            f"{type(model).__name__} computes other outputs than what would be loaded: {differ}. Something that no "
            "file holds was changed: a method, a hook, an attribute that is no plain value. Nothing was written."
        )


def _packed_levels(
    model: nn.Module,
    spec: ModelRecord,
    tensors: Mapping[str, Tensor],
    levels: Sequence[Level],
    coded: bool,
    example_inputs: Any,
) -> tuple[Levels, dict[str, Tensor]]:
    """What is recorded of the levels, and the tensors of their file, after a try that each comes back from them."""
    specs = list(_specs(model, spec, levels))
    described = [Described(level, its, _tensors_to_write(level.model, its)) for level, its in specs]
    found, file = packed(tensors, described, coded=coded)
    for number, its in enumerate(described):
        again, values = smaller(spec, tensors, record_of(file, number), number, file)
        rebuilt = rebuild(copy.deepcopy(model), again, values)
        other = [name for name, value in its.tensors.items() if not _is_same(values[name], value)]
        differ = None if example_inputs is None else outputs_differ(its.level.model, rebuilt, example_inputs)
        if other or differ:
            raise StorageError(
                f"the level {its.level.target!r} does not come back from what would be saved: {differ or other[0]}. "
                "Something that no file holds was changed in it. Nothing was written."
            )
    return found, file


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values, zeros of both signs and what is no number included."""
    return torch.equal(one, other) or tensor_digest(one) == tensor_digest(other)


def _specs(model: nn.Module, spec: ModelRecord, levels: Sequence[Level]) -> Iterator[tuple[Level, ModelRecord]]:
    for level in levels:
        _check_unwrapped(level.model)
        yield level, level_spec(level, model, spec)


def _tensors_to_write(model: nn.Module, spec: ModelRecord) -> dict[str, Tensor]:
    """One contiguous CPU tensor for every name but the tied ones and every computed buffer, no two in one storage."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in (*state_tensors(model).items(), *unsaved_buffers(model).items()):
        if name in spec.tied or (name not in spec.shapes and name not in spec.computed):
            continue
        value = tensor.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in storages:
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        tensors[name] = value
    return tensors


def _check_unwrapped(model: nn.Module) -> None:
    check_whole(model, "save")
    wrapper = type(model)
    modules = ("torch.nn.parallel", "torch.distributed.fsdp", "torch._dynamo", "torch.jit", "deepspeed")
    if wrapper.__module__.startswith(modules):
        raise UnsupportedModelError(
            f"save got a model wrapped in {wrapper.__name__}; pass the model inside it (usually `.module`, for a "
            "compiled one `._orig_mod`)."
        )
    if gates := [name for name, _ in named_auxiliaries(model)]:
        raise UnsupportedModelError(
            f"save got a model with gates ({', '.join(gates[:3])}), which take part in training alone. Decide first: "
            'prune_channels(model, x, "inclusion=0.5") or gates.close(model); to go on training later, '
            "torch.save the state_dict() of model, optimizer and attachment."
        )


def _check_json(**values: Any) -> None:
    for name, value in values.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(
                f"{name} is not a JSON value ({error}); expected numbers, strings, lists, dicts."
            ) from error


def _versions() -> dict[str, str]:
    installed = {name: _version(name) for name in _PACKAGES}
    return {name: version for name, version in installed.items() if version is not None}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


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
    """Describes how the outputs of the two on the same input and random numbers differ; None where they do not."""
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
