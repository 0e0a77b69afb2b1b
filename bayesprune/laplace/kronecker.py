"""A matrix normal posterior for each layer: Kronecker-factored Laplace, from calibration data and without training.

The Fisher information of a layer y = W a is approximated by G (x) A, with A = E[a a^T] over all positions and G the sum
over an example's positions of g g^T, g the gradient of its loss at y (K-FAC: Martens & Grosse, 2015; convolutions:
Grosse & Martens, 2016; posterior: Ritter et al., 2018). With n examples of data and the prior's precision tau, W is
matrix normal with the means M and the precision

    (sqrt(n) G + sqrt(tau) / p I)  (x)  (sqrt(n) A + p sqrt(tau) I),    p^2 = mean diagonal of A / mean diagonal of G,

the factored form of n G (x) A + tau I (Martens & Grosse, section 6.3). Groups of a grouped convolution have factors of
own. A bias is one more column of W, whose input is always 1. Where a batch norm alone reads a layer without a bias, the
norm takes up a shift by its running mean, and A is the covariance of the inputs.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.batches import Batch, with_examples
from bayesprune.foundation.sharding import check_whole
from bayesprune.laplace.calibration import Call, Loss, check_sums, counted_positions, length_of, visit_calls
from bayesprune.laplace.diagonal import prior_precisions, set_precision
from bayesprune.laplace.flow import layer_calls
from bayesprune.laplace.matrices import (
    drawn_positions,
    from_matrix,
    input_rows,
    is_matrix_product,
    output_rows,
    to_matrix,
)
from bayesprune.layers import VariationalLayer, named_posteriors
from bayesprune.priors import Prior


@dataclass
class KroneckerFactors:
    """The matrix normal posterior of one layer: G groups of R rows (outputs) and C columns (inputs, then the bias).

    Attributes:
        mean: The means, (G, R, C), as they stand in the model; conditioning moves both.
        inputs: Blocks along the diagonal of A, each (G, b, b), float64.
        outputs: Blocks along the diagonal of G, each (G, b, b), float64.
        num_data: How many examples the posterior stands for.
        prior_precision: 1 / variance of the prior of single weights.
        norm: The batch norm that takes up a shift of the layer's outputs, by name.
        centre: Means of the inputs, (G, C), float64, about which A is taken where there is such a norm.
    """

    mean: Tensor
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    num_data: float
    prior_precision: float
    norm: str | None = None
    centre: Tensor | None = None

    def input_precision(self) -> list[Tensor]:
        """Blocks of sqrt(n) A + p sqrt(tau) I, each (G, b, b)."""
        return _precision(self.inputs, self.num_data, self._balance() * self.prior_precision**0.5)

    def output_precision(self) -> list[Tensor]:
        """Blocks of sqrt(n) G + sqrt(tau) / p I, each (G, b, b)."""
        return _precision(self.outputs, self.num_data, self.prior_precision**0.5 / self._balance())

    def variance(self) -> Tensor:
        """Marginal variances of single weights, (G, R, C): an outer product of the two inverses' diagonals."""
        rows, columns = (_inverse_diagonal(p) for p in (self.output_precision(), self.input_precision()))
        return rows[:, :, None] * columns[:, None, :]

    def blocks(self) -> Iterator[tuple[int, slice, Tensor]]:
        """The group, the columns and A of each block of each group, (b, b)."""
        start = 0
        for block in self.inputs:
            columns = slice(start, start + block.shape[-1])
            yield from ((group, columns, between) for group, between in enumerate(block))
            start = columns.stop

    def gram(self, group: int, columns: slice) -> Tensor:
        """W^T G W between these columns, (b, b), float64, for a group's means W and output factor G."""
        weights = self.mean[group, :, columns].double()
        sides = weights.split([side.shape[-1] for side in self.outputs])
        return torch.stack([part.mT @ side[group] @ part for side, part in zip(self.outputs, sides, strict=True)]).sum(
            0
        )

    def _balance(self) -> float:
        tiny = torch.finfo(torch.float64).tiny
        inputs, outputs = (
            float(torch.cat([block.diagonal(dim1=1, dim2=2) for block in blocks], dim=1).mean())
            for blocks in (self.inputs, self.outputs)
        )
        return (max(inputs, tiny) / max(outputs, tiny)) ** 0.5


KroneckerPosterior = dict[str, KroneckerFactors]
"""Factors by the name of the layer."""


@torch.no_grad()
def fit_kronecker(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    num_data: int | None = None,
    loss: Loss | None = None,
    prior: Prior | None = None,
    num_batches: int | None = None,
    num_positions: int | None = None,
    block_size: int = 1024,
) -> KroneckerPosterior:
    """A matrix normal posterior of each linear layer and convolution, around its present means; the model stays as is.

    `set_marginal_stds` makes its marginals the model's stds; `condition_on_zeros` and `condition_on_channels` remove
    weights and move those that remain. Transposed and weight-standardised convolutions and `nn.MultiheadAttention` are
    not in it and keep their stds, nor are layers that did not run. Fit again after training and after channels were
    cut.

    Cost: a forward and a backward over the data, and C^2 + R^2 multiplications for each position that a layer of R
    outputs and C inputs (times taps) meets, where its forward has R C. Memory: 8 (C b + R b) bytes a layer, on the CPU,
    with b the smaller of `block_size` and the side; so 67 MB for 4,096 inputs and outputs. While it runs, a batch's
    layer inputs and outputs, the gradients of one layer at a time, and one convolution's inputs once for each of its
    taps.

    Args:
        model: A variational model that is trained.
        loader: Calibration batches, as for `fit_laplace`. Positions that an `attention_mask` excludes do not count.
            More positions than a layer has columns, or the damping alone decides in some directions.
        num_data: How many examples the posterior stands for: the size of the training set. None is the number seen.
        loss: As for `fit_laplace`. It bears on G alone, and conditioning on the removal of channels does not see G.
        prior: A `priors.Gaussian`, whose precision damps both factors; None is `Gaussian("layer_rms")`.
        num_batches: No more batches than these.
        num_positions: About how many positions a layer takes for each of its columns or outputs, whichever are more,
            drawn evenly over the loader, which needs a length then; None takes all. Some 128 are as good as all, and in
            a convolution over large images far cheaper.
        block_size: Largest side of a block: inputs (and outputs) in different blocks are independent.

    Raises:
        ValueError: there is no batch, no variational layer, `block_size` is below 1, `num_positions` comes with a
            loader without a length, the attention masks hide all positions, or the inputs of a layer are not finite.
        UnsupportedModelError: the prior has no precision, no layer is a matrix product, layers do not take examples
            along the first dimension, or the model is sharded over processes.
    """
    check_whole(model, "fit_kronecker")
    if block_size < 1:
        raise ValueError(f"block_size is {block_size!r}; expected 1 or more, 1024 say.")
    precisions = {posterior.name: value for posterior, value in prior_precisions(model, prior).items()}
    holders = _holders(model)
    batches = with_examples(model, loader)
    first = list(islice(batches, 1))
    total = length_of(loader, num_batches)
    share = None if num_positions is None else num_positions / _checked_length(loader, total)
    norms = _shifted_norms(model, holders, first)
    inputs: dict[int, list[Tensor]] = {}
    outputs: dict[int, list[Tensor]] = {}
    totals: dict[int, Tensor] = {}
    positions: dict[int, int] = defaultdict(int)
    seen = 0

    def add(name: str, call: Call, batch: Batch) -> None:
        if not is_matrix_product(call.layer) or not call.inputs.numel():
            return
        key = id(call.layer.weight)
        rows, gradients = _rows(call, batch, share, with_bias=holders[key].has_bias)
        positions[key] += rows.shape[0] * rows.shape[1]
        if key in norms:
            totals[key] = totals.get(key, 0) + rows.sum((0, 1), dtype=torch.double)
        _accumulate(inputs, key, rows, block_size)
        _accumulate(outputs, key, gradients, block_size)

    for batch in visit_calls(model, chain(first, batches), add, loss=loss, num_batches=num_batches, total=total):
        seen += batch.num_examples
    if not inputs:
        raise UnsupportedModelError(
            "fit_kronecker met no linear layer or convolution with a posterior; fit_laplace takes other layers."
        )
    found = {key: holder for key, holder in holders.items() if key in inputs}
    for key, holder in found.items():
        check_sums(holder.name, positions[key], inputs[key])
    return {
        holder.name: KroneckerFactors(
            mean=layer_matrix(holder.layer, with_bias=holder.has_bias).clone(),
            inputs=_blocks_of_inputs(inputs.pop(key), totals.get(key), positions[key]),
            outputs=tuple(block.div_(seen).cpu() for block in outputs.pop(key)),
            num_data=float(seen if num_data is None else num_data),
            prior_precision=precisions[holder.weight],
            norm=norms.get(key),
            centre=None if key not in norms else (totals[key] / positions[key]).cpu(),
        )
        for key, holder in found.items()
    }


@torch.no_grad()
def set_marginal_stds(model: nn.Module, posterior: KroneckerPosterior) -> nn.Module:
    """The model with the posterior's marginal stds, collapsed to the structure that it has, in place.

    SNR^2 is then twice the saliency of Optimal Brain Surgeon (Hassibi & Stork, 1993): what removing one weight costs
    when all others adapt. Being an outer product, the marginals fit `rank_one` stds exactly.
    """
    posteriors = {its.name: its for its in named_posteriors(model)}
    for name, factors in posterior.items():
        layer = variational_layer(model, name)
        precision = factors.variance().reciprocal()
        has_bias = _has_bias_column(layer, factors)
        weight = precision[..., :-1] if has_bias else precision
        set_precision(posteriors[_joined(name, "weight")], from_matrix(layer, weight))
        if has_bias:
            set_precision(posteriors[_joined(name, "bias")], precision[..., -1].flatten())
    return model


def variational_layer(model: nn.Module, name: str) -> VariationalLayer:
    """The layer of this name.

    Raises:
        ValueError: it is not variational.
    """
    layer = model.get_submodule(name)
    if not isinstance(layer, VariationalLayer):
        raise ValueError(
            f"{name} is a {type(layer).__name__}, and the posterior was fitted to a variational layer; pass the model "
            "that it was fitted to, before to_deterministic."
        )
    return layer


def layer_matrix(layer: VariationalLayer, *, with_bias: bool) -> Tensor:
    """Weight, and bias as the last column, (G, R, C); a copy on the CPU where there is a bias or a GPU."""
    weight = to_matrix(layer, layer.posteriors()["weight"].mean.detach())
    if with_bias:
        bias = layer.get_parameter("bias").detach()
        weight = torch.cat([weight, bias.reshape(*weight.shape[:2], 1).to(weight)], dim=2)
    return weight.cpu()


@dataclass(frozen=True)
class _Holder:
    """The first layer that holds a weight; whether its bias belongs to the same matrix (a tied weight's does not)."""

    name: str
    layer: VariationalLayer
    weight: str
    has_bias: bool


def _holders(model: nn.Module) -> dict[int, _Holder]:
    layers = [module for module in model.modules() if isinstance(module, VariationalLayer)]
    found: dict[int, _Holder] = {}
    for posterior in named_posteriors(model):
        if posterior.parameter == "weight":
            layer = posterior.layer
            num_holders = sum(getattr(other, "weight", None) is posterior.mean for other in layers)
            has_bias = num_holders == 1 and "bias" in layer.active_names()
            name = posterior.name.removesuffix("weight").removesuffix(".")
            found[id(posterior.mean)] = _Holder(name, layer, posterior.name, has_bias)
    return found


def _checked_length(loader: Iterable[Any], total: int | None) -> int:
    if total is None:
        raise ValueError(
            f"num_positions needs to know how many batches there are, and a {type(loader).__name__} has none; pass "
            "a list or a DataLoader."
        )
    return max(1, total)


def _shifted_norms(model: nn.Module, holders: dict[int, _Holder], first: list[Any]) -> dict[int, str]:
    """The batch norm that takes the outputs of a layer without a bias, and of that layer alone, by its weight."""
    layers = {holder.name: holder.layer for holder in holders.values() if is_matrix_product(holder.layer)}
    names = {id(module): name for name, module in model.named_modules()}
    calls = [call for batch in first for call in layer_calls(model, batch, layers, with_values=False)]
    runs = Counter(call.name for call in calls)
    return {
        id(call.layer.weight): names[id(call.norm)]
        for call in calls
        if call.norm is not None and runs[call.name] == 1 and call.layer._parameters.get("bias") is None
    }


def about(second_moment: Tensor, mean: Tensor) -> Tensor:
    """E[(a - m)(a - m)^T], (G, C, C), of E[a a^T] and m = E[a], (G, C), kept above the rounding of single precision."""
    least = 1e-6 * mean.shape[1] ** 0.5 * second_moment.diagonal(dim1=1, dim2=2).mean(1)[:, None]
    centred = torch.baddbmm(second_moment, mean[:, :, None], mean[:, None], alpha=-1)
    centred.diagonal(dim1=1, dim2=2).add_(least)
    return centred


def _blocks_of_inputs(blocks: list[Tensor], total: Tensor | None, number: int) -> tuple[Tensor, ...]:
    """Means of the products of inputs, about their mean where the sums of the inputs, (G, C), are given; in place."""
    products = [block.div_(number) for block in blocks]
    if total is not None:
        means = (total / number).split([block.shape[-1] for block in blocks], dim=1)
        products = [about(product, mean) for product, mean in zip(products, means, strict=True)]
    return tuple(product.cpu() for product in products)


def _rows(call: Call, batch: Batch, share: float | None, *, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Inputs (N, T, G, C) and output gradients (N, T, G, R), float32 at least; (1, P, ...) where positions are masked.

    Of `share` positions in the batch for each column or output; gradients are scaled for those that are left out.
    """
    wide = torch.promote_types(call.inputs.dtype, torch.float32)
    gradients = output_rows(call.layer, call.gradients.to(wide), batch.num_examples)
    num_positions = gradients.shape[1]
    counted = counted_positions(batch, num_positions)
    chosen = None
    if share is not None:
        side = max(gradients.shape[3], to_matrix(call.layer, call.layer.get_parameter("weight")).shape[2])
        chosen = drawn_positions(num_positions, math.ceil(share * side / batch.num_examples), counted)
        if chosen is not None:
            drawn_of = num_positions if counted is None else int(counted.any(0).sum())
            gradients = gradients[:, chosen] * (drawn_of / max(1, len(chosen))) ** 0.5
    rows = input_rows(call.layer, call.inputs.to(wide), batch.num_examples, chosen)
    if with_bias:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:3], 1)], dim=3)
    if counted is None:
        return rows, gradients
    counted = counted if chosen is None else counted[:, chosen.to(counted.device)]
    return rows[counted][None], gradients[counted][None]


def _accumulate(sums: dict[int, list[Tensor]], key: int, rows: Tensor, block_size: int) -> None:
    """Adds the products of rows (N, T, G, C) with themselves, summed over N and T, block by block."""
    blocks = [block.flatten(0, 1).transpose(0, 1) for block in rows.split(block_size, dim=3)]
    if key not in sums:
        sums[key] = [torch.bmm(block.mT, block).double() for block in blocks]
        return
    for total, block in zip(sums[key], blocks, strict=True):
        total += torch.bmm(block.mT, block)


def _precision(blocks: Iterable[Tensor], num_data: float, damping: float) -> list[Tensor]:
    return [num_data**0.5 * b + damping * torch.eye(b.shape[-1], dtype=b.dtype, device=b.device) for b in blocks]


def _inverse_diagonal(blocks: Iterable[Tensor]) -> Tensor:
    """Diagonal of the inverse of a block-diagonal matrix, (G, C)."""
    inverses = [torch.cholesky_inverse(torch.linalg.cholesky(block)) for block in blocks]
    return torch.cat([inverse.diagonal(dim1=1, dim2=2) for inverse in inverses], dim=1)


def _has_bias_column(layer: VariationalLayer, factors: KroneckerFactors) -> bool:
    return factors.mean.shape[2] > to_matrix(layer, layer.get_parameter("weight")).shape[2]


def _joined(layer: str, parameter: str) -> str:
    return f"{layer}.{parameter}" if layer else parameter
