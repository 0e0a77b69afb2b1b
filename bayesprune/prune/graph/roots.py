"""The layers that channels start from, and how one that torch-pruning does not know is cut.

`Conv1D` of transformers (GPT-2) is a linear layer whose weight stands the other way round. It is known by its sizes
`nx`, `nf`, which it keeps as attributes, so that nothing of transformers is imported here.
"""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch_pruning.pruner.function import BasePruningFunc

from bayesprune.layers.stacks import stacked_weights

Layers = Iterable[nn.Module | str] | nn.Module | str
"""Modules of a model, or their names."""

ROOT_TYPES = (_ConvNd, nn.Linear)


def is_root(layer: Any) -> bool:
    """Whether a layer has output channels of its own making."""
    return isinstance(layer, ROOT_TYPES) or is_transposed_linear(layer)


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
    return isinstance(layer, nn.Linear) or is_transposed_linear(layer)


def is_transposed_linear(layer: Any) -> bool:
    """Whether a layer is a linear one of weight (I, O), with attributes nx = I and nf = O."""
    if not isinstance(layer, nn.Module) or isinstance(layer, ROOT_TYPES):
        return False
    weight, sizes = layer._parameters.get("weight"), (vars(layer).get("nx"), vars(layer).get("nf"))
    return weight is not None and tuple(weight.shape) == sizes


def linear_sizes(layer: Any) -> tuple[int, int]:
    """Numbers of inputs and outputs of a linear layer."""
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else (layer.nx, layer.nf)


class TransposedLinearPruner(BasePruningFunc):
    """Cuts a linear layer of weight (I, O)."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        """The layer without these outputs."""
        kept = sorted(set(range(layer.nf)) - set(idxs))
        layer.nf = len(kept)
        layer.weight = self._prune_parameter_and_grad(layer.weight, kept, 1)
        layer.bias = self._prune_parameter_and_grad(layer.bias, kept, 0)
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        """The layer without these inputs."""
        kept = sorted(set(range(layer.nx)) - set(idxs))
        layer.nx = len(kept)
        layer.weight = self._prune_parameter_and_grad(layer.weight, kept, 0)
        return layer

    def get_out_channels(self, layer: Any) -> int:
        """Number of outputs."""
        return layer.nf

    def get_in_channels(self, layer: Any) -> int:
        """Number of inputs."""
        return layer.nx


TRANSPOSED_LINEAR = TransposedLinearPruner()
