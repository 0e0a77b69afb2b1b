"""A layer as a matrix product: y = W a for the rows a that its weight meets, one row for each position.

A convolution meets a patch of its input at each position (Grosse & Martens, 2016). Of stacked experts it is the last
matrices that are meant, a group each. Shapes: N examples, T positions,
G groups of a grouped convolution (1 elsewhere), R rows (outputs of a group), C columns (inputs of a group times taps).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from bayesprune.foundation.kinds import kind_of
from bayesprune.layers import VariationalLayer
from bayesprune.layers.stacks import stack_of

MAX_DAMPING = 1e3
"""Up to which a matrix is damped ten times as much as before where that has left it indefinite."""


def is_matrix_product(layer: VariationalLayer) -> bool:
    """Whether the layer has this form: linear layers and convolutions, transposed ones apart."""
    if not layer.is_linear_in_weight or "weight" not in layer.active_names():
        return False
    kind = kind_of(layer)
    return kind.is_linear or (isinstance(layer, _ConvNd) and not kind.is_transposed)


def to_matrix(layer: VariationalLayer, weight: Tensor) -> Tensor:
    """A tensor of the weight's shape as (G, R, C)."""
    return kind_of(layer).matrices(weight)


def from_matrix(layer: VariationalLayer, matrix: Tensor) -> Tensor:
    """The opposite of `to_matrix`."""
    return kind_of(layer).from_matrices(matrix, input_weight(layer).shape)


def input_rows(layer: VariationalLayer, inputs: Tensor, num_examples: int, chosen: Tensor | None = None) -> Tensor:
    """The rows that the weight meets, (N, T, G, C), of inputs (B, ..., I) or (B, I, *spatial).

    Args:
        layer: A linear layer or a convolution.
        inputs: What goes into it.
        num_examples: N, of which B is a multiple.
        chosen: Which of an example's positions are taken; None takes all.
    """
    if not isinstance(layer, _ConvNd):
        rows = inputs.reshape(num_examples, -1, 1, inputs.shape[-1])
        return rows if chosen is None else rows[:, chosen]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    patches = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    num_dims = len(layer.kernel_size)
    for dim in range(num_dims):
        step = layer.dilation[dim]
        span = step * (layer.kernel_size[dim] - 1) + 1
        patches = patches.unfold(2 + dim, span, layer.stride[dim])[..., ::step]
    patches = patches.movedim(1, 1 + num_dims)  # (B, *positions, I, *taps)
    columns = patches.shape[1 + num_dims :].numel() // layer.groups
    if chosen is not None and len(patches) == num_examples:  # without a copy of all patches
        patches = patches[(slice(None), *torch.unravel_index(chosen, patches.shape[1 : 1 + num_dims]))]
        chosen = None
    rows = patches.reshape(num_examples, -1, layer.groups, columns)
    return rows if chosen is None else rows[:, chosen]


def expert_rows(layer: VariationalLayer, output: Tensor, positions: Tensor) -> Tensor:
    """What the last matrix of each stacked expert met at these positions, (n, E, C), n being R at most.

    It is multiplied by what the router gives the expert there, zero where that is nothing. However the experts compute,
    it is the gradient of an output of each position with respect to a row of its own of every matrix. Of more positions
    than R those that share a row are added with random signs, always the same.

    Args:
        layer: The experts.
        output: What they put out, (..., R), with its graph.
        positions: Numbers of positions, counted through the leading dimensions of the output.
    """
    width = output.shape[-1]
    signs = 2.0 * torch.randint(2, (len(positions),), generator=torch.Generator().manual_seed(len(positions))) - 1
    cotangent = torch.zeros_like(output).reshape(-1, width)
    rows = torch.arange(len(positions), device=output.device) % width
    cotangent[positions.to(output.device), rows] = signs.to(output)
    (gradient,) = torch.autograd.grad(output, input_weight(layer), cotangent.view_as(output), retain_graph=True)
    return to_matrix(layer, gradient)[:, : len(positions)].transpose(0, 1)


def output_rows(layer: VariationalLayer, outputs: Tensor, num_examples: int, chosen: Tensor | None = None) -> Tensor:
    """Outputs, or gradients at them, as (N, T, G, R); of the chosen positions T where they are given."""
    kind = kind_of(layer)
    outputs = outputs.movedim(kind.feature_dim, -1)
    rows = outputs.reshape(num_examples, -1, kind.num_groups, outputs.shape[-1] // kind.num_groups)
    return rows if chosen is None else rows[:, chosen]


def drawn_positions(num_positions: int, number: int, counted: Tensor | None = None) -> Tensor | None:
    """Some of an example's positions, drawn without replacement, in order, always the same; None for all.

    Args:
        num_positions: T, how many there are.
        number: How many are to count, in an example on average.
        counted: Which count in each example, (N, T); None is all. Those that count in none are not drawn.
    """
    if counted is not None:
        found = counted.any(0).nonzero()[:, 0].cpu()
        each = len(counted) * len(found) / max(1, int(counted.sum()))  # are drawn for one that counts
        drawn = drawn_positions(len(found), math.ceil(number * each))
        return found if drawn is None else found[drawn]
    if number >= num_positions:
        return None
    generator = torch.Generator().manual_seed(num_positions)
    return torch.randperm(num_positions, generator=generator)[:number].sort().values


def removed_columns(layer: VariationalLayer, channels: list[int]) -> Tensor:
    """A mask of the columns, (G, C), that belong to these input channels of the layer."""
    weight, kind = input_weight(layer), kind_of(layer)
    groups, _, columns = kind.matrices(weight).shape
    num_inputs = kind.sizes(weight.shape)[0] * (groups if kind.num_stacked else 1)
    removed = torch.zeros(num_inputs, dtype=torch.bool)
    removed[channels] = True
    taps = columns * groups // num_inputs
    return removed.repeat_interleave(taps).reshape(groups, columns)


def input_weight(layer: nn.Module) -> nn.Parameter:
    """The weight that meets a layer's inputs; of stacked experts, their hidden units."""
    stack = stack_of(layer)
    return layer.get_parameter("weight" if stack is None else stack.cut_parameters(layer, "in")[0][0])


def silenced(layer: nn.Module, channels: Sequence[int]) -> Tensor:
    """The weight that meets a layer's inputs, with zeros for these of them; experts' are numbered through."""
    weight, kind, stack = input_weight(layer).detach(), kind_of(layer), stack_of(layer)
    dims = {kind.input_dim} if stack is None else {0, stack.in_dim}
    values = weight
    if kind.num_input_blocks > 1:
        values, dims = weight.unflatten(0, (kind.num_input_blocks, -1)), {0, 2}
    shape = [size if dim in dims else 1 for dim, size in enumerate(values.shape)]
    silent = torch.zeros(math.prod(shape), dtype=torch.bool, device=weight.device)
    silent[list(channels)] = True
    return values.masked_fill(silent.view(shape), 0).view_as(weight)


def damped(matrix: Tensor, damping: float) -> Tensor:
    """Matrices (..., C, C) with a fraction of their mean diagonal added to it.

    Where that is zero, the mean of all matrices is added, whole, or one: nothing was seen, and all columns are alike.
    """
    mean = matrix.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    usual = mean.mean()
    unseen = torch.where(usual > 0, usual, 1.0) * float(damping > 0)
    found = matrix.clone()
    found.diagonal(dim1=-2, dim2=-1).add_(torch.where(mean > 0, damping * mean, unseen))
    return found


def definite(xx: Tensor, damping: float) -> Tensor:
    """E[x x^T], (..., C, C), damped until it is definite: rounding leaves that of constant inputs indefinite."""
    found = damped(xx, damping)
    faults = torch.linalg.cholesky_ex(found, check_errors=damping >= MAX_DAMPING).info
    return definite(xx, 10 * damping) if faults.any() else found
