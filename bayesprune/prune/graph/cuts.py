"""One side of one layer: how long it is, which parameters it cuts, and whether torch-pruning can cut it rightly."""

from collections import defaultdict
from dataclasses import dataclass

import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from torch_pruning.dependency import Dependency

from bayesprune.foundation.kinds import STOCK_KINDS, kind_of
from bayesprune.layers import VariationalLayer
from bayesprune.layers.stacks import stack_of
from bayesprune.layers.structures import SUFFIXES
from bayesprune.prune.graph.positions import Positions
from bayesprune.prune.graph.roots import is_root, layer_sizes

Axis = tuple[str, str]
"""A layer's name, and "out" or "in"."""

CUTTABLE = (*(stock for stock in STOCK_KINDS if stock is not nn.EmbeddingBag), nn.Parameter)
"""What torch-pruning knows how to cut."""


@dataclass(frozen=True, eq=False)
class Member:
    """One side of one layer that loses channels with its group.

    Attributes:
        axis: Its name and side.
        dependency: torch-pruning's edge, which knows how to cut it.
        size: Length of the axis.
        positions: Positions along the axis by root channel.
    """

    axis: Axis
    dependency: Dependency
    size: int
    positions: Positions

    @property
    def layer(self) -> nn.Module | Tensor:
        """The layer, or a parameter or buffer that stands in the model by itself."""
        return self.dependency.layer


def side(dependency: Dependency) -> str:
    """The side that a dependency cuts; layers whose two sides are one (norms, depthwise convolutions) have "out"."""
    return "in" if dependency.handler.__name__ == "prune_in_channels" else "out"


def axis_size(graph: tp.DependencyGraph, dependency: Dependency) -> int | None:
    """Length of the axis that a dependency cuts; None for a layer without one (a PReLU of one slope)."""
    return (graph.get_in_channels if side(dependency) == "in" else graph.get_out_channels)(dependency.target)


def cut_parameters(layer: nn.Module, side: str) -> list[tuple[str, int]]:
    """Name and dimension of the parameters of a layer that its side cuts."""
    if (stack := stack_of(layer)) is not None:
        return stack.cut_parameters(layer, side)
    dim = 0 if side == "out" and is_depthwise(layer) else kind_of(layer).side_dim(side)
    if side == "in":
        return [("weight", dim)]
    found = [("weight", dim), ("bias", 0), *((name, 0) for name in gains(layer))]
    return [(name, dim) for name, dim in found if layer._parameters.get(name) is not None]


def num_stacked(layer: nn.Module) -> int:
    """How many leading dimensions of a layer's parameters number layers of their own."""
    return 0 if stack_of(layer) is None else 1


def has_outputs(layer: object) -> bool:
    """Whether a layer has channels of its own making: a root layer, or stacked experts."""
    return is_root(layer) or (isinstance(layer, nn.Module) and stack_of(layer) is not None)


def gains(layer: nn.Module | Tensor) -> list[str]:
    """Further parameters with an entry for each output, as `ScaledStdConv2d` has; torch-pruning does not cut them."""
    if not is_root(layer):
        return []
    size = layer_sizes(layer)[1]
    names = _further_parameters(layer)
    return [name for name in names if layer._parameters[name].shape[:1].numel() == size]  # type: ignore[union-attr]


def is_depthwise(layer: nn.Module | Tensor) -> bool:
    """Whether torch-pruning cuts both sides of this convolution at once."""
    return isinstance(layer, _ConvNd) and layer.groups == layer.out_channels > 1


def num_blocks(member: Member) -> int:
    """Equal blocks that an axis falls into, and that must stay equal: those of grouped convolutions and group norms."""
    return 1 if is_depthwise(member.layer) else kind_of(member.layer).num_groups


def misfit(member: Member) -> str | None:
    """Why this side cannot be cut rightly, if so."""
    layer, (name, _) = member.layer, member.axis
    if isinstance(layer, nn.Module) and is_root(layer) and layer._parameters.get("weight") is None:
        return _computed_weight(name, layer)
    if unknown := [name for name in _further_parameters(layer) if name not in gains(layer)]:
        return f"torch-pruning does not know {name}.{unknown[0]}, a parameter without an entry for each output"
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1:
        return f"{name} normalises over more than channels"
    if num_blocks(member) > 1:
        if kind_of(layer).is_transposed:
            return f"torch-pruning cannot cut {name}, a grouped transposed convolution"
        if member.positions.num_places != member.size:
            return f"{name} works on blocks of channels of which only some are in this group"
    return None


def overflows(member: Member) -> bool:
    """Whether the graph gives this side positions that it has not, or a parameter too few."""
    return int(member.positions.places.max()) >= member.size or (
        isinstance(member.layer, nn.Parameter) and member.positions.num_places != member.size
    )


def _computed_weight(name: str, layer: nn.Module) -> str:
    """What computes the weight of a layer, and how to make it a parameter again."""
    if is_parametrized(layer):
        how = f"torch.nn.utils.parametrize.remove_parametrizations({name}, 'weight')"
    elif {"weight_g", "weight_v"} <= layer._parameters.keys():
        how = f"torch.nn.utils.remove_weight_norm({name})"
    elif "weight_mask" in layer._buffers:
        how = f"torch.nn.utils.prune.remove({name}, 'weight')"
    elif "weight_orig" in layer._parameters:
        how = f"torch.nn.utils.remove_spectral_norm({name})"
    else:
        return f"the weight of {name} is computed, not a parameter: keep the result as an nn.Parameter to cut it"
    return f"the weight of {name} is computed in each forward, not a parameter: call {how} first"


def _further_parameters(layer: nn.Module | Tensor) -> list[str]:
    """Parameters beside weight, bias and their stds, which torch-pruning leaves at their size."""
    if isinstance(layer, Tensor):
        return []
    known = {"weight", "bias"}
    if isinstance(layer, VariationalLayer):
        known |= {f"{name}_{suffix}" for name in ("weight", "bias") for suffix in SUFFIXES}
    return [name for name, parameter in layer._parameters.items() if parameter is not None and name not in known]


def tied_parameters(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Modules and names that hold one parameter, for the parameters with several, by id."""
    holders: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders[id(parameter)].append((module, name))
    return {key: found for key, found in holders.items() if len(found) > 1}
