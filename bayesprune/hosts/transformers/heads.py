"""A saved model of transformers with another head: for other labels, or that of another class around the same trunk.

What is new keeps transformers' own way: its tensors are not read, or are of another size than those of the file, which
transformers refuses unless `ignore_mismatched_sizes=True` is given; it initialises them after the others were read.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from bayesprune.hosts.transformers.host import hf_base, shapes_of, skeleton, spec_of
from bayesprune.storage.rebuild import for_other_head
from bayesprune.storage.spec import ModelRecord, Shape, plain_attributes


def has_other_sizes(model: PreTrainedModel, config: Mapping[str, Any]) -> bool:
    """Whether the model was asked for with other labels or another vocabulary than a `config.json` says."""
    labels = config.get("id2label") or range(config.get("num_labels") or 2)
    vocabulary = getattr(model.config, "vocab_size", None)
    return model.config.num_labels != len(labels) or vocabulary != config.get("vocab_size", vocabulary)


def with_other_sizes(
    changed: Mapping[str, Any], model: PreTrainedModel, config: Mapping[str, Any], where: str
) -> tuple[ModelRecord, frozenset[str] | None]:
    """The spec of a model of the saved class and another config, and the names of its tensors that are new, if any.

    Raises:
        StorageError: the saved config builds no model, or the changes are not as they are written.
    """
    base = hf_base(model)
    assert base is not None, "models of other libraries have no quantizer of ours"
    dense = skeleton(replace(base, args={"config": dict(config)}))
    spec, fresh = for_other_head(spec_of(changed, dense, where), dense, model)
    return spec, fresh or None


def with_other_class(
    changed: Mapping[str, Any], model: PreTrainedModel, found: Mapping[str, Tensor], where: str
) -> tuple[ModelRecord, frozenset[str]]:
    """The spec of a model of another class than the saved one, and the names of its tensors that are new.

    The trunk is the saved one. What is new is as wide as the trunk's end is: every size that is that of the uncut trunk
    becomes that of the cut one, as if the config had said so.

    Args:
        changed: What differs from the dense saved model, by the saved names.
        model: Of the class that was asked for, dense.
        found: The saved tensors by their names in this model; the meta device is enough.
        where: The file, for messages.

    Raises:
        StorageError: the changes are not as they are written.
    """
    dense, saved = shapes_of(model), spec_of(changed, model, where)
    is_trunk = _trunk(model)
    variational = {name: layer for name, layer in saved.variational.items() if is_trunk(name)}
    is_kept = {name: is_trunk(name) and saved.tied.get(name, name) in found for name in dense}
    width, left = _width(dense, found, is_kept)
    shapes = {
        name: saved.shapes[name] if is_kept[name] else _narrowed(shape, width, left, model.config.num_labels)
        for name, shape in dense.items()
    }
    shapes |= {
        name: shape for name, shape in saved.shapes.items() if name.rpartition(".")[0] in variational and name in found
    }
    tied = {alias: first for alias, first in saved.tied.items() if is_kept.get(alias) and is_kept.get(first)}
    tied |= _own_ties(model, list(dense))
    shapes |= {alias: shapes[first] for alias, first in tied.items()}
    fresh = frozenset(
        name
        for name, is_saved in is_kept.items()
        if not is_saved and name not in tied and not (name in found and tuple(found[name].shape) == shapes[name])
    )
    attributes = {name: values for name, values in saved.attributes.items() if is_trunk(name)}
    modules = dict(model.named_modules())
    for name in {name.rpartition(".")[0] for name in dense if not is_kept[name] and shapes[name] != dense[name]}:
        attributes[name] = _narrowed_attributes(modules[name], width, left)
    return replace(saved, shapes=shapes, attributes=attributes, variational=variational, tied=tied), fresh


def _trunk(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a name is one of the trunk; all are in a model that is a trunk itself."""
    prefix = model.base_model_prefix
    has_head = bool(prefix) and isinstance(getattr(model, prefix, None), nn.Module)
    return lambda name: not has_head or name == prefix or name.startswith(f"{prefix}.")


def _width(dense: Mapping[str, Shape], found: Mapping[str, Tensor], is_kept: Mapping[str, bool]) -> tuple[int, int]:
    """How wide the trunk's end is, uncut and cut: the size of its last bias, or of its last norm's scale."""
    for name in reversed(list(dense)):
        if is_kept[name] and name in found and len(dense[name]) == found[name].dim() == 1:
            return dense[name][0], found[name].shape[0]
    return 0, 0


def _narrowed(shape: Shape, width: int, left: int, num_labels: int | None) -> Shape:
    return tuple(
        left if size == width and not (dim == 0 and size == num_labels) else size for dim, size in enumerate(shape)
    )


def _narrowed_attributes(module: nn.Module, width: int, left: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in plain_attributes(module).items():
        if type(value) is int and value == width:
            found[name] = left
        elif type(value) is tuple and width in value:
            found[name] = tuple(left if size == width else size for size in value)
    return found


def _own_ties(model: PreTrainedModel, names: list[str]) -> dict[str, str]:
    """The ties of the class, from every name to the first of its tensor."""
    first: dict[str, str] = {}
    for pair in model.all_tied_weights_keys.items():
        if all(name in names for name in pair):
            earlier, later = sorted(map(str, pair), key=names.index)
            first[later] = first.get(earlier, earlier)
    return first
