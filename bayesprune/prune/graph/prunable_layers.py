"""The layers that channels start from, and how a linear layer that torch-pruning does not know is cut."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch_pruning.pruner.function import BasePruningFunc

from bayesprune.foundation.kinds import kind_of
from bayesprune.layers.stacks import stacked_weights

Layers = Iterable[nn.Module | str] | nn.Module | str
"""Modules of a model, or their names."""


def is_root(layer: Any) -> bool:
    """Whether a layer has output channels of its own making, and can be cut: of convolutions, torch's alone can."""
    return isinstance(layer, _ConvNd) or kind_of(layer).is_linear


def is_frozen(layer: Any) -> bool:
    """Whether a weight of a linear layer, a convolution or experts is not to change, its `requires_grad` being off.

    Norms, biases and tables, which are often fixed beside layers that train, do not count: they follow those.
    """
    if is_root(layer):
        weights = [layer._parameters.get("weight")]
    else:
        weights = stacked_weights(layer) if isinstance(layer, nn.Module) else []
    return any(weight is not None and not weight.requires_grad for weight in weights)


def layer_names(model: nn.Module, layers: Layers) -> list[str]:
    """The names of layers that are given as modules or by their names; one alone may be given by itself.

    Raises:
        ValueError: one of them is not in the model.
    """
    names = {module: name for name, module in model.named_modules()}
    known = dict.fromkeys(name for name, _ in model.named_modules(remove_duplicate=False))
    found = []
    for layer in [layers] if isinstance(layers, str | nn.Module) else layers:
        name = layer if isinstance(layer, str) else names.get(layer)
        if name not in known:
            shown = repr(layer) if isinstance(layer, str) else f"a {type(layer).__name__}"
            others = [other for other in known if other]
            alike = difflib.get_close_matches(name or "", others) or others[-3:]
            raise ValueError(
                f"ignored_layers has {shown}, which is no part of this {type(model).__name__}; expected its modules or "
                f"their names, such as {', '.join(map(repr, alike))}."
            )
        found.append(name)
    return found


def is_linear(layer: Any) -> bool:
    """Whether a layer is a linear one, with its weight (O, I) or (I, O)."""
    return kind_of(layer).is_linear


def is_unknown_linear(layer: Any) -> bool:
    """Whether a layer is a linear one that torch-pruning would not cut, or not rightly."""
    kind = kind_of(layer)
    return kind.is_linear and (kind.is_transposed or not isinstance(layer, nn.Linear))


def layer_sizes(layer: Any) -> tuple[int, int]:
    """Numbers of inputs and outputs of a linear layer or a convolution."""
    return kind_of(layer).sizes(layer.weight.shape)


class LinearPruner(BasePruningFunc):
    """Cuts a linear layer of any kind."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        """The layer without these outputs."""
        kept = self._cut(layer, "out", ("out_features", "nf"), idxs)
        if layer._parameters.get("bias") is not None:
            layer.bias = self._prune_parameter_and_grad(layer.bias, kept, 0)
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        """The layer without these inputs."""
        self._cut(layer, "in", ("in_features", "nx"), idxs)
        return layer

    def get_out_channels(self, layer: Any) -> int:
        """Number of outputs."""
        return layer_sizes(layer)[1]

    def get_in_channels(self, layer: Any) -> int:
        """Number of inputs."""
        return layer_sizes(layer)[0]

    def _cut(self, layer: Any, side: str, names: Sequence[str], idxs: Sequence[int]) -> list[int]:
        """What is kept of a side, whose size the layer has under one of these names."""
        kept = sorted(set(range(layer_sizes(layer)[side == "out"])) - set(idxs))
        layer.weight = self._prune_parameter_and_grad(layer.weight, kept, kind_of(layer).side_dim(side))
        vars(layer).update({name: len(kept) for name in names if name in vars(layer)})
        return kept


LINEAR_PRUNER = LinearPruner()
