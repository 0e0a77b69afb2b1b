"""transformers: how its models are named and built, and what differs from the one that a config alone describes.

A model is its class and its config; both are read from JSON, and no code is. A class that is not transformers' own is
looked for among those that the process has defined by then; it is never imported. What differs is told by names in
memory. They are followed into a model with another head, whose base has another prefix.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.initialization import no_init_weights
from transformers.modeling_utils import PreTrainedModel

from bayesprune.errors import StorageError
from bayesprune.hosts.transformers.closed import check_config, check_generation, closed, for_building
from bayesprune.storage.base import BaseModel
from bayesprune.storage.spec import ModelRecord, Shape, module_classes, module_constants, tied_names, unsaved_buffers

LIBRARY = "transformers"
_DERIVED = "is_derived"  # the key of a base that is no class of transformers itself


class UnsavedStr(str):
    """The place that a model was loaded from. It is not saved, since only exact `str` attributes are."""


def hf_base(model: nn.Module, model_args: Mapping[str, Any] | None = None) -> BaseModel | None:
    """The class and config of a model of transformers, or of a class of one's own derived from its; None for others.

    Raises:
        ValueError: `model_args` were given; the config says all there is.
    """
    if not isinstance(model, PreTrainedModel) or type(model).config_class is None:
        return None
    if model_args is not None:
        raise ValueError(
            f"model_args={dict(model_args)!r} for {type(model).__name__}, whose config says how it is built: set "
            "model.config accordingly, and leave model_args out."
        )
    config = for_building(json.loads(model.config.to_json_string()))
    config |= _attention_type(model, config)
    config |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    kept: dict[str, Any] = {
        **({} if _own_class(type(model).__name__) is type(model) else {_DERIVED: True}),
        "gradient_checkpointing": any(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
    }
    if model.can_generate() and model.generation_config is not None:
        kept["generation_config"] = json.loads(model.generation_config.to_json_string())
    return BaseModel(LIBRARY, type(model).__name__, {"config": config}, kept)


def build(base: BaseModel) -> PreTrainedModel:
    """The dense model, whose weights are all zero.

    Raises:
        StorageError: transformers does not know the class, or does not build it with the config.
    """
    if base.config.get(_DERIVED):
        model_class = _derived_class(base.name)
        advice = "It is a class of your own: import the module that defines it, or pass load(directory, model=...)."
    else:
        model_class = _own_class(base.name)
        advice = "Install the version the model was saved with (it is in bayesprune.json)."
    if model_class is None or model_class.config_class is None:
        raise StorageError(f"transformers {transformers.__version__} has no model class {base.name!r}. {advice}")
    values = base.args.get("config")
    if not isinstance(values, dict):
        raise StorageError(f"the base of {base.name!r} holds no config but {values!r}. The file is damaged.")
    try:
        # Only its reader of files turns the texts back that it writes for infinite numbers.
        values = model_class.config_class._decode_special_floats(for_building(values))
        with closed(), no_init_weights():
            config = model_class.config_class.from_dict(values)
            check_config(config)
            model = model_class._from_config(config)
        if generation := base.config.get("generation_config"):
            check_generation(generation)
            model.generation_config = transformers.GenerationConfig.from_dict(generation)
    except StorageError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError) as error:
        raise StorageError(
            f"transformers {transformers.__version__} does not build {base.name} with the saved config "
            f"({type(error).__name__}: {error})."
        ) from error
    for parameter in model.parameters():
        parameter.data.zero_()  # they were not initialised, and would be whatever the memory held
    model.tie_weights()
    if base.config.get("gradient_checkpointing"):
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.name_or_path = UnsavedStr(module.name_or_path)
    return model


def skeleton(base: BaseModel) -> PreTrainedModel:
    """The dense model on the meta device: all but its numbers."""
    with torch.device("meta"):
        return build(base)


def _attention_type(model: PreTrainedModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """What BigBird models run: for a short sequence they take other blocks than their config says, and keep them."""
    found = {vars(module).get("attention_type") for module in model.modules()} - {None}
    return {"attention_type": found.pop()} if "attention_type" in config and len(found) == 1 else {}


def _derived_class(name: str) -> type[PreTrainedModel] | None:
    """The class of this name that was last derived from a class of transformers, in this process."""
    found, stack = None, [PreTrainedModel]
    while stack:
        for derived in stack.pop(0).__subclasses__():
            stack.append(derived)
            if derived.__name__ == name and _own_class(name) is not derived:
                found = derived
    return found


def _own_class(name: str) -> type[PreTrainedModel] | None:
    """transformers' own model class of this name."""
    found = getattr(transformers, name, None) if name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


FIELDS = ("shapes", "attributes", "variational", "tied")


def changes(spec: Mapping[str, Any], skeleton: nn.Module) -> dict[str, Any] | None:
    """The part of a spec (as JSON) that the dense model does not show by itself; None where it shows all.

    Args:
        spec: `Spec.to_json()` of the model, its attributes relative to the skeleton; `coding` with it where the file of
            tensors is coded, which transformers reads by us alone.
        skeleton: The dense model; the meta device is enough.
    """
    dense = shapes_of(skeleton)
    found = {
        "shapes": {name: shape for name, shape in spec["shapes"].items() if dense.get(name) != tuple(shape)},
        "attributes": spec["attributes"],
        "variational": spec["variational"],
        **{key: spec[key] for key in ("computed", "coding") if spec.get(key)},
    }
    if not any(found.values()) and spec["tied"] == tied_names(skeleton):
        return None
    return found | {"tied": spec["tied"]}


def spec_of(changed: Mapping[str, Any], model: PreTrainedModel, where: str) -> ModelRecord:
    """The spec of a dense model with these changes; those to modules that the model does not have are left out.

    Raises:
        StorageError: the values are not as `changes` writes them; `where` says in which file.
    """
    for field in (*FIELDS, "computed"):
        if not isinstance(changed.get(field, {} if field == "computed" else None), dict):
            raise StorageError(f"{where}: quantization_config holds no object {field!r}. The file is damaged.")
    modules = dict(model.named_modules(remove_duplicate=False))
    rename = Renaming(modules, model.base_model_prefix)
    shapes = {name: list(shape) for name, shape in shapes_of(model).items()}
    shapes |= {new: shape for name, shape in changed["shapes"].items() if (new := rename.tensor(name))}
    tied = {rename.tensor(alias): rename.tensor(first) for alias, first in changed["tied"].items()}
    buffers = unsaved_buffers(model)
    computed = {rename.tensor(name): shape for name, shape in changed.get("computed", {}).items()}
    value = {
        "shapes": shapes,
        "attributes": {new: v for name, v in changed["attributes"].items() if (new := rename.module(name)) is not None},
        "classes": module_classes(model),
        "constants": module_constants(model),
        "buffers": {name: str(b.dtype).removeprefix("torch.") for name, b in buffers.items()},
        "tied": {alias: first for alias, first in tied.items() if alias in shapes and first in shapes},
        "variational": {
            new: v for name, v in changed["variational"].items() if (new := rename.module(name)) is not None
        },
        "computed": {name: shape for name, shape in computed.items() if name in buffers},
    }
    return ModelRecord.from_json(value, where)


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """Shape of every tensor of the state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class Renaming:
    """Follows names of a saved model into one that may have another head.

    Args:
        modules: Names of the model's modules.
        prefix: Under which a model with a head holds its base.
    """

    def __init__(self, modules: Iterable[str], prefix: str) -> None:
        self.modules, self.prefix = set(modules), prefix

    def module(self, name: str) -> str | None:
        """The module's name in this model; None where it has none."""
        inside = name.removeprefix(self.prefix).removeprefix(".") if name.startswith(f"{self.prefix}.") else name
        candidates = (name, f"{self.prefix}.{name}", inside)
        return next((candidate for candidate in candidates if candidate in self.modules), None)

    def tensor(self, name: str) -> str | None:
        """The tensor's name in this model; None where its module is not there."""
        module, _, key = name.rpartition(".")
        found = self.module(module)
        return None if found is None else f"{found}.{key}" if found else key
