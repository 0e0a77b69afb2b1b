"""A saved model with another head: for a number of classes of one's own, the rest of it as it was saved."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from bayesprune.storage.rebuild import resized
from bayesprune.storage.spec import ModelRecord, Shape, module_classes, module_constants, plain_attributes
from bayesprune.storage.values import is_same


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
