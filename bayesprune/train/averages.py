"""Averages of weights that do not follow a model's masks: made before there were any, or averaging them as numbers."""

import gc
import sys
import warnings
from collections.abc import Iterator

from torch import nn
from torch.optim.swa_utils import AveragedModel

from bayesprune.layers import VariationalLayer, variational_layers

_TIMM, _OF_TIMM = "timm.utils.model_ema", ("ModelEma", "ModelEmaV2", "ModelEmaV3")


def warn_of_averages(model: nn.Module) -> None:
    """Says which averages a model leaves behind that gets its first masks now, or loses its first weights."""
    had_masks = has_masks(model)
    for average, layers in _averages_of(model):
        kind = type(average).__name__
        if not had_masks and not any(layer.masked_names() for layer in layers):
            warnings.warn(
                f"{kind} holds a copy of this model from before it had masks, and copies tensors by their position; "
                "its next update fails or mixes the wrong ones. Make it again, after "
                "bayesprune.prune.make_masks(model).",
                stacklevel=4,
            )
        elif had_masks and getattr(average, "use_buffers", False):
            warnings.warn(
                f"{kind}(use_buffers=True) averages this model's masks as if they were numbers: what is removed stays "
                "in an exponential average, and a plain one fails. Make it with use_buffers=False, which copies them.",
                stacklevel=4,
            )


def has_masks(model: nn.Module) -> bool:
    """Whether a layer of the model has a mask."""
    return any(layer.masked_names() for _, layer in variational_layers(model))


def _averages_of(model: nn.Module) -> Iterator[tuple[nn.Module, list[VariationalLayer]]]:
    """The averages, torch's and timm's, that hold a copy of this model's layers, and these copies.

    No model knows its copies, so they are looked for among all objects, which takes some hundredths of a second.
    """
    timm = sys.modules.get(_TIMM)
    kinds = {AveragedModel, *(getattr(timm, name) for name in _OF_TIMM if hasattr(timm, name))}
    names = {name for name, _ in variational_layers(model)}
    for average in [found for found in gc.get_objects() if type(found) in kinds]:
        copies = dict(average.module.named_modules()) if hasattr(average, "module") else {}
        layers = [layer for name in names if isinstance(layer := copies.get(name), VariationalLayer)]
        if len(layers) == len(names):
            yield average, layers
