"""What differs between a model and the one that its config alone describes, as JSON, and back.

The names are those in memory. They are followed into a model with another head, whose base has another prefix.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel

from bayesprune.errors import StorageError
from bayesprune.storage.spec import ModelRecord, Shape, module_classes, module_constants, tied_names, unsaved_buffers

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
