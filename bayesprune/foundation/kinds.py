"""The layout of a layer's weight, by the kind of the layer: one record, which all that looks into weights reads.

The stock kinds are those of torch and `Conv1D` of transformers (GPT-2), a linear layer whose weight is transposed. The
latter is recognised by its sizes `nx` and `nf`, so that nothing of transformers is imported here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm


@dataclass(frozen=True)
class LayerKind:
    """The layout of a weight of G groups with O outputs, I inputs and K kernel taps.

    The dimension of size O / G or I / G is 1 where there are groups; dimension 0 then numbers all O or all I.

    Attributes:
        name: What the kind is called.
        output_dim: Dimension of the weight that numbers outputs.
        input_dim: Dimension of the weight that numbers inputs; of a lookup table, its entries.
        num_groups: G, groups of channels with weights of their own.
        num_spatial_dims: Dimensions of a convolution's kernel; 0 for other layers.
        num_stacked: Leading dimensions of the weight that number layers of their own, such as experts.
        is_matrix: Whether outputs are products of inputs and weights, as those of linear layers and convolutions.

    Examples:
        >>> import torch
        >>> kind = kind_of(torch.nn.ConvTranspose2d(4, 6, 3, groups=2))
        >>> kind.name, kind.output_dim, kind.sizes((4, 3, 3, 3)), kind.feature_dim
        ('transposed convolution', 1, (4, 6), -3)
    """

    name: str = "linear"
    output_dim: int = 0
    input_dim: int = 1
    num_groups: int = 1
    num_spatial_dims: int = 0
    num_stacked: int = 0
    is_matrix: bool = True

    @property
    def feature_dim(self) -> int:
        """The (negative) dimension of the layer's input and output that holds features or channels."""
        return -1 - self.num_spatial_dims

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer, its weight (O, I) or (I, O)."""
        return self.is_matrix and not self.num_spatial_dims and not self.num_stacked

    @property
    def is_transposed(self) -> bool:
        """Whether the weight numbers inputs first."""
        return self.output_dim > self.input_dim

    @property
    def unit_dims(self) -> tuple[int, ...]:
        """Dimensions of the weight that number output units, each of one stacked layer, and of one group."""
        first = range(1 if self.num_groups > 1 and self.is_transposed else self.num_stacked)
        return (*first, self.output_dim)

    @property
    def input_dims(self) -> tuple[int, ...]:
        """Dimensions of the weight that number inputs, those of one block of `num_input_blocks`."""
        return (*range(self.num_stacked), self.input_dim)

    @property
    def num_input_blocks(self) -> int:
        """Equal blocks of outputs that each have inputs of their own under one number of `input_dims`."""
        return 1 if self.is_transposed else self.num_groups

    def side_dim(self, side: str) -> int:
        """Dimension of the weight that the layer's "in" or "out" side cuts."""
        return self.input_dim if side == "in" else self.output_dim

    def sizes(self, shape: Sequence[int]) -> tuple[int, int]:
        """I and O of a weight of this shape."""
        inputs, outputs = (
            shape[dim] * (self.num_groups if dim == 1 else 1) for dim in (self.input_dim, self.output_dim)
        )
        return inputs, outputs

    def matrices(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as (G, O / G, I / G * K); a stacked layer is a group."""
        return self._blocks(weight).flatten(2)

    def from_matrices(self, matrices: Tensor, shape: Sequence[int]) -> Tensor:
        """The opposite of `matrices`, for a weight of this shape."""
        if not self.is_transposed:
            return matrices.reshape(*shape)
        groups, outputs = matrices.shape[:2]
        return matrices.reshape(groups, outputs, -1, *shape[2 + self.num_stacked :]).transpose(1, 2).reshape(*shape)

    def sums(self, values: Tensor, side: str) -> Tensor:
        """Sums of weight-shaped values by input ("in") or output ("out") of the layer, (I) or (O).

        An input of a grouped layer has its column in the rows of its own group alone. Those of stacked layers are
        numbered through.
        """
        return self._blocks(values).flatten(3).sum((1, 3) if side == "in" else (2, 3)).flatten()

    def _blocks(self, weight: Tensor) -> Tensor:
        """(G, O / G, I / G, *K)."""
        blocks = weight if self.num_stacked else weight.unflatten(0, (self.num_groups, -1))
        blocks = blocks if blocks.dim() > 3 else blocks.unsqueeze(-1)
        return blocks.transpose(1, 2) if self.is_transposed else blocks


LINEAR = LayerKind()
TRANSPOSED_LINEAR = LayerKind("transposed linear", output_dim=1, input_dim=0)
EMBEDDING = LayerKind("embedding", output_dim=1, input_dim=0, is_matrix=False)
NORM = LayerKind("norm", is_matrix=False)
UNKNOWN = LayerKind("unknown", is_matrix=False)
"""Of all that says nothing of itself: if it has a weight, that is taken to be (O, I, ...), and no more is known."""


def kind_of(module: Any) -> LayerKind:
    """The kind of a layer; `UNKNOWN` where it is none of the stock kinds and does not say its own by `layer_kind`.

    A class of one's own says it as an attribute or a property: `layer_kind = LayerKind("mine", output_dim=1,
    input_dim=0)`. Subclasses of stock layers are of their kind.
    """
    if hasattr(type(module), "layer_kind"):
        return module.layer_kind
    for stock, describe in STOCK_KINDS.items():
        if isinstance(module, stock):
            return describe(module) if callable(describe) else describe
    if not isinstance(module, nn.Module):
        return UNKNOWN
    weight, sizes = module._parameters.get("weight"), (vars(module).get("nx"), vars(module).get("nf"))
    return TRANSPOSED_LINEAR if weight is not None and tuple(weight.shape) == sizes else UNKNOWN


def _convolution(layer: Any) -> LayerKind:
    name, dims = ("transposed convolution", (1, 0)) if layer.transposed else ("convolution", (0, 1))
    return LayerKind(name, *dims, num_groups=layer.groups, num_spatial_dims=len(layer.kernel_size))


STOCK_KINDS: Mapping[type[nn.Module], LayerKind | Callable[[Any], LayerKind]] = {
    nn.Linear: LINEAR,
    _ConvNd: _convolution,
    nn.Embedding: EMBEDDING,
    nn.EmbeddingBag: EMBEDDING,
    _BatchNorm: NORM,
    _InstanceNorm: NORM,
    nn.LayerNorm: NORM,
    nn.GroupNorm: lambda layer: LayerKind("norm", num_groups=layer.num_groups, is_matrix=False),
    nn.PReLU: NORM,
}
