"""Turns a dense model into a recorded one: attributes, shapes, tied names, variational layers, tensors, another head.

What does not fit is found before the model is touched, and told as a list of differences.
"""

import logging
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.convert import to_variational
from bayesprune.errors import StorageError
from bayesprune.foundation.model import load_values, requires_grad
from bayesprune.layers import VariationalLayer, named_posteriors, variational_layers
from bayesprune.layers.shuffled import ShuffledConv2d
from bayesprune.storage.spec import (
    ModelRecord,
    Shape,
    module_classes,
    module_constants,
    module_notes,
    plain_attributes,
    tied_names,
    unsaved_buffers,
)
from bayesprune.storage.values import is_method, is_same

_LOGGER = logging.getLogger(__name__)
_MAX_LINES = 12


def rebuild(model: nn.Module, spec: ModelRecord, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The model as the spec says, in place; with the values of `tensors`, else with its own, cut or repeated to size.

    A parameter that keeps shape and dtype stays the same object. Attributes are set only where the model has one of
    this name that holds a plain value.

    Args:
        model: The dense model, or one that has the recorded shapes already.
        spec: What to make of it.
        tensors: By state-dict name, without the tied names, and the buffers of `spec.computed`; they set the dtypes as
            well.

    Raises:
        StorageError: the model has other layers than those recorded; it was not changed then.
    """
    dense = _make_grouped(model, spec)
    try:
        _check_layers(model, spec)
    except StorageError:
        for name, layer in dense.items():
            model.set_submodule(name, layer)
        raise
    _tell_notes(model, spec.notes)
    _set_attributes(model, spec.attributes)
    state = None if tensors is None else {name: tensors[spec.tied.get(name, name)] for name in spec.shapes}
    try:
        _resize(model, spec, tensors)
        if state is not None and spec.variational:
            load_values(model, state, strict=False)  # the stds start at the scale of the weights
        _make_variational(model, spec.variational)
        if state is not None:
            load_values(model, state)
            _tie_masks(model, spec)
    except StorageError:
        raise
    except Exception as error:  # torch, given shapes and names from a file, may raise anything
        raise StorageError(f"the saved tensors do not go into the model: {error}") from error
    _check_result(model, spec, with_masks=tensors is not None)
    return model


def difference(what: str, found: str, items: Sequence[str]) -> str:
    """A readable list: `what`, where it was found, and the first of its items."""
    lines = [f"{what} ({len(items)}) {found}:", *(f"  {item}" for item in items[:_MAX_LINES])]
    if len(items) > _MAX_LINES:
        lines.append(f"  and {len(items) - _MAX_LINES} more")
    return "\n".join(lines)


def shape_differences(found: Mapping[str, Shape], recorded: Mapping[str, Shape], holder: str) -> list[str]:
    """Differences of `found`, as text: names that are missing, not expected, or of another shape; empty without any."""
    missing = [f"{name} {_size(shape)}" for name, shape in recorded.items() if name not in found]
    unexpected = [f"{name} {_size(shape)}" for name, shape in found.items() if name not in recorded]
    changed = [
        f"{name}: {_size(shape)} in {holder}, {_size(recorded[name])} recorded"
        for name, shape in found.items()
        if name in recorded and shape != recorded[name]
    ]
    lists = (("missing tensors", missing), ("tensors nobody recorded", unexpected), ("other shapes", changed))
    return [difference(what, f"in {holder}", items) for what, items in lists if items]


def _check_layers(model: nn.Module, spec: ModelRecord) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    modules = dict(model.named_modules(remove_duplicate=False))
    recorded = {  # log stds and masks come with the conversion
        name: shape for name, shape in spec.shapes.items() if name in found or not _is_companion(name, spec)
    }
    resized = {  # any size is fine, as long as it is cut or repeated from something
        name: recorded[name]
        if name in recorded and len(shape) == len(recorded[name]) and (0 not in shape or 0 in recorded[name])
        else shape
        for name, shape in found.items()
    }
    problems = shape_differences(resized, recorded, "the model")
    classes, constants = module_classes(model), module_constants(model)
    every = dict.fromkeys([*classes, *spec.classes])
    pairs = [(name, classes.get(name), spec.classes.get(name)) for name in every]
    pairs += [
        (name, constants.get(name), value)
        for name, value in spec.constants.items()
        if name in constants or is_method(modules.get(name.rpartition(".")[0]), name.rpartition(".")[2])
    ]
    other = [
        f"{name or '(model)'}: {a or 'nothing'} in the model, {b or 'nothing'} recorded"
        for name, a, b in pairs
        if (a or "Identity") != (b or "Identity")  # a missing module and an Identity are equivalent
    ]
    if other:
        problems.append(difference("other classes or functions", "in the model", other))
    if absent := [name for name in spec.variational if name not in modules]:
        problems.append(difference("missing layers", "in the model", absent))
    if absent := sorted(spec.computed.keys() - unsaved_buffers(model).keys()):
        problems.append(difference("missing buffers", "in the model", absent))
    if problems:
        raise StorageError("the model does not have the layers that were recorded.\n" + "\n".join(problems))


def _set_attributes(model: nn.Module, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    unknown: list[str] = []
    for module_name, values in attributes.items():
        module = modules.get(module_name)
        known = plain_attributes(module) if module is not None else {}
        for name, value in values.items():
            if name in known:
                setattr(module, name, _placed(value, known[name]))
            else:
                unknown.append(f"{module_name}.{name}".lstrip("."))
    if unknown:
        _LOGGER.warning("%s", difference("recorded attributes", "that this model does not have are left out", unknown))


def _placed(value: Any, old: Any) -> Any:
    """The value, a tensor on the device of the one whose place it takes."""
    is_tensor = isinstance(value, Tensor) and isinstance(old, Tensor) and not old.is_meta
    return value.to(old.device) if is_tensor else value


def _tell_notes(model: nn.Module, notes: Mapping[str, str]) -> None:
    found = module_notes(model) if notes else {}
    other = [
        f"{name}: {reprlib.repr(found.get(name, 'nothing'))} in the model, {reprlib.repr(text)} recorded"
        for name, text in notes.items()
        if found.get(name) != text and not (name not in found and name.endswith(")"))
    ]
    if other:
        _LOGGER.warning(
            "%s\nIf the forward depends on them, the loaded model computes something else than the saved one.",
            difference("what no file restores", "is other in the model than when it was saved", other),
        )


def _resize(model: nn.Module, spec: ModelRecord, tensors: Mapping[str, Tensor] | None) -> None:
    """Gives every tensor its recorded shape and dtype, and every tied name the same tensor."""
    new: dict[str, Tensor] = {}
    taken: set[int] = set()
    for module_name, module in model.named_modules(remove_duplicate=False):
        for key, old in [*module._parameters.items(), *module._buffers.items()]:
            name = f"{module_name}.{key}" if module_name else key
            if old is None or name not in spec.shapes:
                continue
            first = spec.tied.get(name, name)
            if first not in new:
                dtype = old.dtype if tensors is None else tensors[first].dtype
                fits = tuple(old.shape) == spec.shapes[name] and old.dtype == dtype and id(old) not in taken
                new[first] = old if fits else resized(old, spec.shapes[name], dtype)
                taken.add(id(new[first]))
            if new[first] is not old:
                setattr(module, key, new[first])
    if tensors is None:
        return
    for name, buffer in unsaved_buffers(model).items():
        owner, _, key = name.rpartition(".")
        if name in spec.computed:
            setattr(model.get_submodule(owner), key, tensors[name].to(buffer.device))
        elif name in spec.buffers:
            setattr(model.get_submodule(owner), key, buffer.to(getattr(torch, spec.buffers[name])))


def resized(old: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """The tensor cut, or repeated, to a shape of as many dimensions; a parameter if it is one."""
    data = old.detach()
    if 0 in shape:
        data = data.new_empty(shape)
    for dim in sorted(range(len(shape)), key=lambda dim: shape[dim] > data.shape[dim]):  # nothing larger on the way
        size = shape[dim]
        if size != data.shape[dim]:
            index = torch.arange(size, device=data.device) % data.shape[dim]
            data = data.index_select(dim, index)
    data = data.to(dtype, copy=True)
    if not isinstance(old, nn.Parameter):
        return data
    return nn.Parameter(data, requires_grad=old.requires_grad and (dtype.is_floating_point or dtype.is_complex))


def _make_grouped(model: nn.Module, spec: ModelRecord) -> dict[str, nn.Conv2d]:
    """Puts a `ShuffledConv2d` where one is recorded; returns the convolutions that stood there, by all their names."""
    dense = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and type(module) is nn.Conv2d and spec.classes.get(name) == ShuffledConv2d.__name__
    }
    grouped = {conv: ShuffledConv2d.like(conv, conv.groups) for conv in dense.values()}
    for name, conv in dense.items():
        model.set_submodule(name, grouped[conv])
    return dense


def _make_variational(model: nn.Module, variational: Mapping[str, Mapping[str, str]]) -> None:
    if variational.keys() - _names(variational_layers(model)):
        std = next(iter(variational.values()))["std"]
        with requires_grad(model, True):  # what was saved has posteriors, frozen now or not
            to_variational(model, std=std, filter_fn=lambda _, name: name in variational)
        for posterior in named_posteriors(model):
            for part in posterior.log_std_parts:
                part.requires_grad_(part.requires_grad and not posterior.is_frozen)
    for name, layer in variational_layers(model):
        if name in variational:
            layer.estimator = variational[name]["estimator"]


def _tie_masks(model: nn.Module, spec: ModelRecord) -> None:
    """Loading gives every layer a mask of its own, though those of tied weights are one."""
    for alias, first in spec.tied.items():
        owner, _, key = alias.rpartition(".")
        layer = model.get_submodule(owner)
        if isinstance(layer, VariationalLayer) and key in layer._buffers:
            layer._buffers[key] = model.get_buffer(first)


def _check_result(model: nn.Module, spec: ModelRecord, *, with_masks: bool) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    recorded = (
        spec.shapes if with_masks else {k: v for k, v in spec.shapes.items() if k in found or not k.endswith("_mask")}
    )
    problems = shape_differences(found, recorded, "the model")
    left = _names(variational_layers(model)) ^ spec.variational.keys()
    if left:
        problems.append(difference("layers", "that are variational in only one of model and file", sorted(left)))
    tied = {alias: first for alias, first in spec.tied.items() if alias in recorded}
    if wrong := [
        f"{name}: {module.complaint()}"
        for name, module in model.named_modules()
        if with_masks and isinstance(module, ShuffledConv2d) and module.complaint()
    ]:
        problems.append(difference("convolutions", "whose channels are out of order", wrong))
    if tied_names(model) != tied:
        shared = sorted(set(tied_names(model).items()) ^ set(tied.items()))
        problems.append(
            difference("names", "that share a tensor in only one of model and file", [f"{a}, {b}" for a, b in shared])
        )
    if problems:
        raise StorageError("the model does not become what was recorded.\n" + "\n".join(problems))


def _is_companion(name: str, spec: ModelRecord) -> bool:
    layer = spec.tied.get(name, name).rpartition(".")[0]  # variational layers are recorded by their first names
    return layer in spec.variational and name.endswith(("_log_std", "_mask"))


def _names(layers: Iterable[tuple[str, VariationalLayer]]) -> set[str]:
    return {name for name, _ in layers}


def _size(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))})"


def for_other_head(spec: ModelRecord, dense: nn.Module, asked: nn.Module) -> tuple[ModelRecord, frozenset[str]]:
    """The spec of a model that is built otherwise than the saved one, and the names of its tensors that are new.

    A new tensor has the size that was asked for where this is another one, else the saved size: a head for five classes
    behind features that were cut. Its layer is deterministic.

    Args:
        spec: Of the saved model.
        dense: What it was made from.
        asked: The same with another head, dense as well. The meta device is enough for both.
    """
    before, after = _shapes(dense), _shapes(asked)
    fresh = frozenset(name for name, shape in after.items() if before.get(name) != shape)
    layers = {name.rpartition(".")[0] for name in fresh | (before.keys() - after.keys())}
    shapes = {
        name: shape for name, shape in spec.shapes.items() if name in after or name.rpartition(".")[0] not in layers
    }
    shapes |= {name: _mixed(before.get(name), after[name], spec.shapes.get(name)) for name in fresh}
    modules = dict(asked.named_modules(remove_duplicate=False))
    others = dict(dense.named_modules(remove_duplicate=False))
    return replace(
        spec,
        shapes=shapes,
        attributes={
            name: _unasked(values, others.get(name), modules[name])
            for name, values in spec.attributes.items()
            if name in modules
        },
        classes=_followed(spec.classes, module_classes(dense), module_classes(asked)),
        constants=_followed(spec.constants, module_constants(dense), module_constants(asked)),
        tied={alias: first for alias, first in spec.tied.items() if alias in shapes and first in shapes},
        variational={name: v for name, v in spec.variational.items() if name in modules and name not in layers},
    ), fresh


def with_new(
    tensors: Mapping[str, Tensor], spec: ModelRecord, fresh: frozenset[str], asked: nn.Module
) -> dict[str, Tensor]:
    """The saved tensors that the spec has; the new ones are the model's own, cut to size, in the dtype of the rest."""
    kept = {name: tensor for name, tensor in tensors.items() if name in spec.shapes or name in spec.computed}
    state = asked.state_dict()
    dtypes = [tensor.dtype for name, tensor in kept.items() if name in state and tensor.is_floating_point()]
    for name in fresh - spec.tied.keys():
        is_number = state[name].is_floating_point() and dtypes
        kept[name] = resized(state[name], spec.shapes[name], dtypes[0] if is_number else state[name].dtype)
    return kept


def _mixed(before: Shape | None, after: Shape, saved: Shape | None) -> Shape:
    if before is None or saved is None or not len(before) == len(after) == len(saved):
        return after
    return tuple(a if a != b else s for b, a, s in zip(before, after, saved, strict=True))


def _unasked(values: Mapping[str, Any], dense: nn.Module | None, asked: nn.Module) -> dict[str, Any]:
    """The saved attributes but those that were asked to be others."""
    before, after = plain_attributes(dense) if dense is not None else {}, plain_attributes(asked)
    return {k: v for k, v in values.items() if k in before and k in after and is_same(before[k], after[k])}


def _followed(saved: Mapping[str, str], before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    """The saved names, but where another one was asked for."""
    kept = {name: text for name, text in saved.items() if (name in after or name not in before)}
    return kept | {name: text for name, text in after.items() if before.get(name) != text}


def _shapes(model: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
