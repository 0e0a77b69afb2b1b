"""Matrices to fit, in the order in which a forward runs their layers, and how much of the data each looks at."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.foundation.batches import split
from bayesprune.foundation.kinds import kind_of
from bayesprune.laplace.calibration import counted_positions
from bayesprune.laplace.calls import LayerCall
from bayesprune.laplace.flow import layer_calls
from bayesprune.laplace.matrices import input_weight, is_matrix_product, to_matrix
from bayesprune.layers import VariationalLayer, variational_layers
from bayesprune.layers.drawn import DrawnLayer
from bayesprune.layers.stacks import stack_of

MAX_COLUMNS = 8192
"""Inputs times taps above which a layer stays as it is."""
EXPERT_ROWS_PER_COLUMN = 16
"""Rows of each expert's regression for each of its columns; a row holds several positions."""


@dataclass
class Site:
    """A matrix to fit; of experts, one for each.

    Attributes:
        name: The name of its layer.
        parameter: Its own name in that layer.
        source: A number for its input: those with the same one are fitted together.
        norm: The batch norm that takes up its shift; none does of experts, of which each meets its own positions.
        num_bytes: Of its largest input and output, for one batch.
        num_positions: At which an example meets it in a run, and that count.
        num_rows: Positions in all at which a regression looks.
        num_drawn: How many of an example's positions these are, of as many examples as there are.
        columns: Which columns some row keeps.
        num_calls: How often it runs in a forward.
        num_sums: How often its output is added to a stream.
    """

    name: str
    parameter: str
    source: int
    norm: str | None
    num_bytes: int
    num_positions: int
    num_rows: int
    num_drawn: int
    columns: Tensor
    num_calls: int = 0
    num_sums: int = 0

    @property
    def weight(self) -> str:
        """The name of the matrix in the model."""
        return f"{self.name}.{self.parameter}".lstrip(".")

    @property
    def is_at_sum(self) -> bool:
        """Whether it is fitted where its output is added to a stream."""
        return self.num_sums == self.num_calls


def fittable_layers(dense: nn.Module) -> dict[str, VariationalLayer]:
    """Linear layers and convolutions that train, with a weight of their own alone and no gates on it, by name."""
    return _fittable(dense, lambda layer: is_matrix_product(layer) and not isinstance(layer, DrawnLayer))


def fittable_experts(dense: nn.Module, *, all_matrices: bool = False) -> dict[str, VariationalLayer]:
    """Stacked experts whose last matrices, or all, train, are theirs alone, and have no gates, by name."""
    return _fittable(dense, lambda layer: kind_of(layer).num_stacked > 0, all_matrices=all_matrices)


def _fittable(
    dense: nn.Module, is_wanted: Callable[[VariationalLayer], bool], *, all_matrices: bool = False
) -> dict[str, VariationalLayer]:
    """Layers of this sort whose weights train, are theirs alone, have no gates, and are not too wide."""
    holders = Counter(id(p) for module in dense.modules() for p in module._parameters.values())
    return {
        name: layer
        for name, layer in variational_layers(dense)
        if is_wanted(layer)
        and layer.posterior_hook is None
        and all(
            holders[id(weight := layer.get_parameter(parameter))] == 1
            and weight.requires_grad
            and to_matrix(layer, weight).shape[2] <= MAX_COLUMNS
            for parameter in matrices_of(layer, all_matrices=all_matrices)
        )
    }


def matrices_of(layer: VariationalLayer, *, all_matrices: bool = True) -> list[str]:
    """Names of the parameters that hold a layer's matrices, in the order in which they run.

    Args:
        layer: A linear layer, a convolution or experts.
        all_matrices: False leaves the last of experts alone, which reads their hidden units.
    """
    stack = stack_of(layer)
    if stack is None:
        return ["weight"]
    (last, _), *_ = stack.cut_parameters(layer, "in")
    others = [name for name, _ in stack.cut_parameters(layer, "out") if layer.is_weight(name)]
    return [*(others if all_matrices else ()), last]


def sites_of(
    dense: nn.Module,
    batches: Sequence[Any],
    layers: Mapping[str, VariationalLayer],
    *,
    rows_per_column: int,
    keeps: Mapping[str, Tensor | None] | None = None,
    all_matrices: bool = False,
) -> list[Site]:
    """The matrices of these layers, in the order in which a forward runs the layers first.

    Args:
        dense: The model as it was.
        batches: On its device; a forward of the first says what there is.
        layers: Layers that `fittable_layers` has, or `fittable_experts`.
        rows_per_column: At how many positions in all a layer is looked at, for each of its columns.
        keeps: Which columns (G, C) of a layer are kept, by name; None where the layer is not fitted itself. Layers
            before the first of these are left out.
        all_matrices: Whether the first matrices of experts are fitted, too.
    """
    names = {id(module): name for name, module in dense.named_modules()}
    inputs = split(dense, batches[0])
    num_examples = inputs.num_examples
    sites: dict[str, Site] = {}
    behind = [input_weight(dense.get_submodule(name)) for name in keeps or ()]
    for call in layer_calls(dense, batches[0], layers, with_values=False, behind=behind):
        is_stacked = kind_of(call.layer).num_stacked > 0
        norm = None if call.norm is None or is_stacked else names[id(call.norm)]
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (call.inputs, call.output))
        positions = num_positions(call, num_examples)
        if (counted := counted_positions(inputs, positions)) is not None:
            positions = int(counted.sum()) // num_examples
        parameters = matrices_of(call.layer, all_matrices=all_matrices)
        for parameter in parameters:
            num_columns = to_matrix(call.layer, call.layer.get_parameter(parameter)).shape[2]
            num_rows = (EXPERT_ROWS_PER_COLUMN if is_stacked else rows_per_column) * num_columns
            drawn = math.ceil(num_rows / (len(batches) * num_examples))
            is_last = parameter == parameters[-1]
            keep = keeps.get(call.name) if keeps and is_last else None
            columns = torch.arange(num_columns) if keep is None else keep.any(0).nonzero()[:, 0]
            source = -1 - len(sites) if is_last and len(parameters) > 1 else call.source  # it reads hidden units
            fresh = Site(call.name, parameter, source, norm, num_bytes, positions, num_rows, drawn, columns)
            site = sites.setdefault(fresh.weight, fresh)
            site.num_calls += 1
            site.num_sums += call.addend is not None
            site.norm = norm if site.norm == norm else None
            site.num_bytes = max(site.num_bytes, num_bytes)
    return list(sites.values())


def num_positions(call: LayerCall, num_examples: int) -> int:
    """At how many positions each example meets the layer in this run."""
    return call.output.numel() // (num_examples * call.output.shape[kind_of(call.layer).feature_dim])
