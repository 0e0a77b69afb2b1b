"""What a model is beside its numbers: shapes, attributes, classes, tied names, variational layers; as JSON.

The attributes are those that hold plain values (numbers, strings, tuples of them). Where the dense base can be built,
only what differs from it is recorded, so whatever a pruning tool changed on whatever layer (`groups`, `num_heads`,
`normalized_shape`, ...) follows without a list of names.
"""

import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.errors import StorageError, UnsupportedModelError
from bayesprune.estimators import ESTIMATORS
from bayesprune.layers import STRUCTURES, VariationalLayer, variational_layers
from bayesprune.storage.values import (
    callable_name,
    decode,
    encode,
    is_encoded,
    is_method,
    is_plain,
    is_same,
    notes,
    replaced_methods,
)

FOR_TRAINING = frozenset({"_gradient_checkpointing_func", "warnings_issued"})
_NOT_RECORDED = frozenset(vars(nn.Module())) | {"target_lang"}  # wav2vec2 reads a file of this name once it is set
_VARIATIONAL_ATTRIBUTES = frozenset(VariationalLayer.__annotations__)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelRecord:
    """The record that `load` needs beside the base and the tensors.

    Attributes:
        shapes: Shape of every tensor of the state dict, tied ones under each of their names.
        attributes: Plain attributes by module name, those that differ from the base where there is one.
        classes: Class name of every module without children. What passes its input on in eval mode (any dropout)
            counts as "Identity": rates of dropout are the training run's business.
        constants: Name of every enum member, function, method, partial function and class that a module holds as an
            attribute. They cannot be set from a file, but must agree.
        buffers: Dtype of every buffer that is not part of the state dict.
        tied: For every name but the first of a tied tensor, its first name.
        variational: Std structure and estimator of every variational layer by name.
        notes: Of a model without a base, in words, what cannot be set from a file and may or may not matter: dicts,
            data classes and lambdas that its modules hold, hooks, classes of modules with children. What differs is
            told.
        computed: Shape of every buffer outside the state dict whose values are saved all the same: a forward made them,
            or other arguments, so that the base has other ones.
    """

    shapes: dict[str, Shape]
    attributes: dict[str, dict[str, Any]]
    classes: dict[str, str]
    constants: dict[str, str]
    buffers: dict[str, str]
    tied: dict[str, str]
    variational: dict[str, dict[str, str]]
    notes: dict[str, str] = field(default_factory=dict)
    computed: dict[str, Shape] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; a tuple among the attributes becomes {"tuple": [...]}."""
        return {
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "attributes": {name: {k: encode(v) for k, v in a.items()} for name, a in self.attributes.items()},
            "classes": self.classes,
            "constants": self.constants,
            "buffers": self.buffers,
            "tied": self.tied,
            "variational": self.variational,
            **({"notes": self.notes} if self.notes else {}),
            **({"computed": {name: list(shape) for name, shape in self.computed.items()}} if self.computed else {}),
        }

    @classmethod
    def from_json(cls, value: Any, where: str) -> "ModelRecord":
        """The spec of a file's JSON value.

        Raises:
            StorageError: a field is missing or not as `to_json` writes it; `where` says in which file.
        """
        attributes = _mapping(value, "attributes", where, _is_encoded_attributes, "an object of plain values")
        spec = cls(
            shapes={k: tuple(v) for k, v in _mapping(value, "shapes", where, _is_shape, "integers >= 0").items()},
            attributes={name: {k: decode(v) for k, v in a.items()} for name, a in attributes.items()},
            classes=_mapping(value, "classes", where, _is_string, "a class name"),
            constants=_mapping(value, "constants", where, _is_string, "a name"),
            buffers=_mapping(value, "buffers", where, _is_dtype, "a dtype such as 'float32'"),
            tied=_mapping(value, "tied", where, _is_string, "a tensor name"),
            variational=_mapping(value, "variational", where, _is_variational, "a known std and estimator"),
            notes=_mapping({"notes": {}} | value, "notes", where, _is_string, "a text"),
            computed={
                name: tuple(shape)
                for name, shape in _mapping(
                    {"computed": {}} | value, "computed", where, _is_shape, "integers >= 0"
                ).items()
            },
        )
        for alias, first in spec.tied.items():
            if first in spec.tied or spec.shapes.get(first) is None or spec.shapes.get(alias) != spec.shapes[first]:
                raise StorageError(f"{where}: {alias!r} is tied to {first!r}, which has no such shape. It is damaged.")
        return spec


def describe_model(model: nn.Module, skeleton: nn.Module | None = None) -> ModelRecord:
    """The spec of a model; with the attributes that differ from `skeleton`, or all of them where it is None.

    Raises:
        UnsupportedModelError: the state dict holds something that safetensors cannot, or that `load` could not restore.
    """
    state = state_tensors(model)
    return ModelRecord(
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        attributes=_attributes(model, skeleton),
        classes=module_classes(model),
        constants=module_constants(model),
        buffers={name: str(b.dtype).removeprefix("torch.") for name, b in unsaved_buffers(model).items()},
        tied=tied_names(model),
        variational=_variational(model),
        notes=module_notes(model) if skeleton is None else {},
    )


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, all of whose values are ordinary tensors.

    Raises:
        UnsupportedModelError: one is not.
    """
    state = model.state_dict()
    for name, value in state.items():
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_meta:
            raise UnsupportedModelError(
                f"the state dict's {name!r} is a {_kind(value)}; expected plain dense tensors, which is what "
                "safetensors holds. Gather, dequantize or materialise the model before saving it."
            )
    return state


def tied_names(model: nn.Module) -> dict[str, str]:
    """For every name but the first of a tensor with several names in the state dict, its first name."""
    first: dict[int, str] = {}
    tensors = _named_tensors(model)
    names = {name: first.setdefault(id(tensors[name]), name) for name in model.state_dict() if name in tensors}
    return {name: kept for name, kept in names.items() if kept != name}


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, of a variational one that which it was made from."""
    return module.stock_type if isinstance(module, VariationalLayer) else type(module)


def unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are not part of the state dict, by name."""
    state = model.state_dict().keys()
    return {name: b for name, b in model.named_buffers(remove_duplicate=False) if name not in state}


def computed_buffers(model: nn.Module, dense: nn.Module) -> dict[str, Shape]:
    """Shapes of the buffers outside the state dict that are others in a dense model; see `Spec.computed`.

    Where the dense model is on the meta device, buffers of the same shape count as the same.
    """
    dense_ones = unsaved_buffers(dense)
    return {
        name: tuple(buffer.shape)
        for name, buffer in unsaved_buffers(model).items()
        if name in dense_ones and not _is_same_buffer(dense_ones[name], buffer)
    }


def module_classes(model: nn.Module) -> dict[str, str]:
    """Class name of every module without children; see `Spec.classes`."""
    leaves = {name: m for name, m in model.named_modules(remove_duplicate=False) if not _has_children(m)}
    return {name: _class_name(module) for name, module in leaves.items()}


def module_constants(model: nn.Module) -> dict[str, str]:
    """Names of the enum members, functions and classes that the modules hold as attributes; see `Spec.constants`.

    Methods that stand on the module itself are among them, those that training put there are not.
    """
    return {
        f"{module_name}.{name}".lstrip("."): word
        for module_name, module in model.named_modules(remove_duplicate=False)
        for name, value in vars(module).items()
        if name not in FOR_TRAINING and (not is_method(module, name) or name in replaced_methods(module))
        if (word := callable_name(value)) is not None
    }


def module_notes(model: nn.Module) -> dict[str, str]:
    """Notes on what else modules hold and do, and the classes of those that have children; see `ModelRecord.notes`."""
    return {
        f"{module_name}.{name}".lstrip("."): text
        for module_name, module in model.named_modules(remove_duplicate=False)
        for name, text in (notes(module) | ({"class": _class_name(module)} if _has_children(module) else {})).items()
    }


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that hold plain values, without those of `nn.Module` and `VariationalLayer`."""
    left_out = _NOT_RECORDED
    if isinstance(module, VariationalLayer):
        left_out = left_out | _VARIATIONAL_ATTRIBUTES
    return {name: value for name, value in vars(module).items() if name not in left_out and is_plain(value)}


def _attributes(model: nn.Module, skeleton: nn.Module | None) -> dict[str, dict[str, Any]]:
    found = {
        name: {key: value for key, value in plain_attributes(module).items() if not getattr(value, "is_meta", False)}
        for name, module in model.named_modules(remove_duplicate=False)
    }
    if skeleton is not None:
        dense = {name: plain_attributes(module) for name, module in skeleton.named_modules(remove_duplicate=False)}
        found = {name: _changed(attributes, dense.get(name, {})) for name, attributes in found.items()}
    return {name: attributes for name, attributes in found.items() if attributes}


def _changed(attributes: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name in dense and not is_same(value, dense[name])}


def _variational(model: nn.Module) -> dict[str, dict[str, str]]:
    layers = {name: {"std": layer.std, "estimator": layer.estimator} for name, layer in variational_layers(model)}
    structures = {layer["std"] for layer in layers.values()}
    if len(structures) > 1:
        raise UnsupportedModelError(
            f"the model has layers with different std structures ({', '.join(sorted(structures))}); expected one for "
            "all, which is what to_variational makes and load can restore."
        )
    return layers


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _class_name(module: nn.Module) -> str:
    name = stock_class(module).__name__
    return "Identity" if "Drop" in name else name


def _is_same_buffer(dense: Tensor, buffer: Tensor) -> bool:
    if dense.is_meta:
        return dense.shape == buffer.shape
    return torch.equal(dense.to(buffer.dtype), buffer.cpu())


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{type(value).__name__} of layout {value.layout} on device {value.device}"


def _is_encoded_attributes(value: Any) -> bool:
    return isinstance(value, dict) and all(is_encoded(item) for item in value.values())


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _is_string(value: Any) -> bool:
    return isinstance(value, str)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def _is_variational(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"std", "estimator"}
        and value["std"] in tuple(STRUCTURES)
        and value["estimator"] in ESTIMATORS
    )


def _mapping(value: Any, key: str, where: str, is_valid: Callable[[Any], bool], expected: str) -> dict[str, Any]:
    """The object under `key`, each of whose values is valid."""
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, dict):
        raise StorageError(f"{where}: spec holds no object {key!r} but {reprlib.repr(found)}. The file is damaged.")
    for name, item in found.items():
        if not is_valid(item):
            raise StorageError(
                f"{where}: spec has {reprlib.repr(item)} for {key}[{name!r}]; expected {expected}. It is damaged."
            )
    return found
