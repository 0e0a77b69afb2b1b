"""Removal as conditioning on zero: the weights that remain move to make up for those that go (Optimal Brain Surgeon).

A Gaussian N(m, P^-1) given that its entries S are zero has, for the others R, the mean

    m_R + P_RR^-1 P_RS m_S  =  m_R - V_RS V_SS^-1 m_S,    V = P^-1.

For W with precision G (x) A this is exact and needs A alone wherever all rows (outputs) lose the same columns, as they
do when channels go: (U (x) V)_RS (U (x) V)_SS^-1 = I (x) V_RS V_SS^-1, so G drops out. Where rows lose different
weights the exact conditional couples them through G; here each row is conditioned on its own zeros, as in OBC and
SparseGPT (Frantar & Alistarh, 2022, 2023), which is exact for a diagonal G. With damping=0, the result is the least
squares fit of the layer's outputs on the calibration data by the weights that remain.

Conditioning twice is conditioning on both, so weights may go step by step from one posterior.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from bayesprune.laplace.kronecker import (
    KroneckerFactors,
    KroneckerPosterior,
    layer_matrix,
    variational_layer,
)
from bayesprune.laplace.matrices import definite, from_matrix, removed_columns, to_matrix
from bayesprune.layers import VariationalLayer

_EXCESS = 1e-7  # of a row's loss, to which conjugate gradients bring what is above its smallest one
_EXPECTED_STEPS, _MOST_STEPS = 20, 100
_LEADING, _POWERS = 64, 4  # eigenvectors that the preconditioner has, and steps of the iteration that finds them
_TINY = torch.finfo(torch.float32).tiny


def conditional_mean(mean: Tensor, precision: Tensor, keep: Tensor) -> Tensor:
    """Means of the rows of a matrix normal given their zeros, (R, C) float64.

    Rows that lose the same columns share a Cholesky factorisation, k^3 / 3 multiplications where they keep k. Where
    nearly every row loses columns of its own and C is above 700 or so, preconditioned conjugate gradients on all rows
    at once cost less, R C^2 a step and twenty to fifty steps. They bring the loss of each row to some 1e-6 above the
    smallest; a row that does not get there is factorised after all.

    Args:
        mean: Means, (R, C).
        precision: Precision between the columns, (C, C), positive definite; its scale does not matter.
        keep: False where the weight is zero, (R, C).

    Examples:
        >>> import torch
        >>> precision = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> conditional_mean(torch.tensor([[1.0, 1.0]]), precision, torch.tensor([[True, False]]))
        tensor([[1.5000, 0.0000]], dtype=torch.float64)
    """
    mean, precision = mean.double(), precision.double()
    num_kept = keep.unique(dim=0).sum(1).double()
    if float(num_kept.pow(3).sum()) / 3 > _EXPECTED_STEPS * mean.numel() * mean.shape[1]:
        return _by_conjugate_gradients(mean, precision, keep)
    return _by_factorisation(mean, precision, keep)


@torch.no_grad()
def condition_on_zeros(model: nn.Module, posterior: KroneckerPosterior, *, damping: float | None = 0.01) -> nn.Module:
    """Moves the weights that `prune_weights` left, to make up for those that it removed; in place, no training.

    Any mask will do: a sparsity, an SNR threshold, an N:M pattern. Biases of the layers move too. The posterior's means
    move along; stds stay as they are.

    Cost: as `conditional_mean` says, for each block of `fit_kronecker`'s `block_size` inputs.

    Args:
        model: A variational model of which weights were removed after `fit_kronecker`.
        posterior: What `fit_kronecker` returned for it.
        damping: Added to the diagonal of A, as a fraction of its mean. None is what the prior says, which holds weights
            back more: it goes by the curvature before the removal, which at a well-trained optimum is next to nothing.
            At 0 weights may take large values along directions that the data hardly has.

    Raises:
        ValueError: the weights that are left are not the posterior's means, because of training since.
        torch.linalg.LinAlgError: at damping=0, where A is singular.

    Examples:
        >>> import torch, bayesprune as bp
        >>> model = bp.to_variational(torch.nn.Linear(8, 3))
        >>> batches = [(torch.randn(32, 8), torch.randint(3, (32,)))]
        >>> posterior = bp.laplace.fit_kronecker(model, batches)
        >>> report = bp.prune_weights(model, "2:4")
        >>> model = bp.laplace.condition_on_zeros(model, posterior)
    """
    for name, factors in posterior.items():
        layer = variational_layer(model, name)
        mask = layer.mask("weight", whole=True)
        if mask is not None:
            _condition(model, name, factors, to_matrix(layer, mask).cpu(), damping)
    return model


@torch.no_grad()
def condition_on_channels(
    model: nn.Module,
    posterior: KroneckerPosterior,
    removed: Mapping[str, Sequence[int]],
    *,
    damping: float | None = 0.01,
) -> nn.Module:
    """Moves each layer's weights to make up for input channels that are about to go; in place, no training.

    One factorisation a layer (and block, and group). The weights of the channels become zero; cut them then. As
    `prune_channels(before_cut=...)` it runs with what the layers lose:

        compensate = functools.partial(bp.laplace.condition_on_channels, model, bp.laplace.fit_kronecker(model, loader))
        bp.prune_channels(model, x, "macs=0.5", before_cut=compensate)

    Args:
        model: The variational model that the posterior was fitted to.
        posterior: What `fit_kronecker` returned; its means move along.
        removed: Input channels (features) that go, by the layer that loses them. Layers that are not in the posterior
            stay as they are.
        damping: As for `condition_on_zeros`.

    Raises:
        ValueError: the weights are not the posterior's means.
        torch.linalg.LinAlgError: at damping=0, where A is singular.
    """
    for name, channels in removed.items():
        if name in posterior:
            layer, factors = variational_layer(model, name), posterior[name]
            keep = ~removed_columns(layer, list(channels))[:, None].expand(-1, factors.mean.shape[1], -1)
            mask = layer.mask("weight", whole=True)
            keep = keep if mask is None else keep & to_matrix(layer, mask).cpu()
            _condition(model, name, factors, keep, damping)
    return model


def _condition(model: nn.Module, name: str, factors: KroneckerFactors, keep: Tensor, damping: float | None) -> None:
    layer, num_columns = variational_layer(model, name), keep.shape[2]
    has_bias = factors.mean.shape[2] > num_columns
    if has_bias:
        keep = torch.cat([keep, keep.new_ones(*keep.shape[:2], 1)], dim=2)
    _check_means(name, layer, factors, keep, has_bias=has_bias)
    blocks = factors.input_precision() if damping is None else [definite(block, damping) for block in factors.inputs]
    moved, start = torch.empty_like(factors.mean), 0
    for block in blocks:
        columns = slice(start, start := start + block.shape[-1])
        for group, precision in enumerate(block):
            moved[group, :, columns] = conditional_mean(
                factors.mean[group][:, columns], precision, keep[group][:, columns]
            ).to(moved)
    if factors.norm is not None and factors.centre is not None:
        shift = ((moved.double() - factors.mean.double()) * factors.centre[:, None]).sum(2).flatten()
        norm = model.get_submodule(factors.norm)
        before = norm.get_buffer("running_mean")
        norm._buffers["running_mean"] = before + shift.to(before)
    factors.mean = moved
    layer.get_parameter("weight").copy_(from_matrix(layer, moved[..., :num_columns]))
    if has_bias:
        layer.get_parameter("bias").copy_(moved[..., -1].flatten())


def _check_means(
    name: str, layer: VariationalLayer, factors: KroneckerFactors, keep: Tensor, *, has_bias: bool
) -> None:
    now = layer_matrix(layer, with_bias=has_bias)
    mask = layer.mask("weight", whole=True)
    kept = torch.ones_like(keep) if mask is None else keep
    if now.shape != factors.mean.shape or not torch.equal(now[kept], factors.mean[kept]):
        raise ValueError(
            f"the weights of {name} are not the means of its posterior any more: they were trained or cut since. Call "
            "fit_kronecker again, then remove, then condition."
        )


def _by_factorisation(mean: Tensor, precision: Tensor, keep: Tensor) -> Tensor:
    result = torch.where(keep, mean, 0.0)
    patterns, which = keep.unique(dim=0, return_inverse=True)
    for index, kept in enumerate(patterns):
        removed = ~kept
        rows = (which == index).nonzero()[:, 0]
        if not removed.any() or not kept.any() or not mean[rows][:, removed].any():
            continue
        push = precision[kept][:, removed] @ mean[rows][:, removed].T
        move = torch.cholesky_solve(push, torch.linalg.cholesky(precision[kept][:, kept]))
        result[rows[:, None], kept.nonzero()[:, 0]] += move.T
    return result


def _by_conjugate_gradients(mean: Tensor, precision: Tensor, keep: Tensor) -> Tensor:
    """All rows at once, each in the subspace of its kept columns: in float32, then checked in float64."""
    size, scale = precision.diagonal().mean(), precision.diagonal().sqrt()
    unit, scale = precision / scale[:, None] / scale, scale / size.sqrt()
    free, single, kept = mean * scale, unit.float(), keep.float()
    precondition = _preconditioner(single, kept)

    def at(point: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's loss (R, 1), and minus half its gradient."""
        gone = free - point
        push = gone @ unit
        return (push * gone).sum(1, keepdim=True), push.float().mul_(kept)

    found = torch.zeros_like(kept)
    loss, residual = at(torch.where(keep, free, 0.0))
    direction = precondition(residual)
    gain = (residual * direction).sum(1, keepdim=True)  # about what is above the smallest loss
    for _ in range(_MOST_STEPS):
        if (gain <= _EXCESS * loss).all():
            break
        along = (direction @ single).mul_(kept)
        length = gain / (direction * along).sum(1, keepdim=True).clamp_min(_TINY)
        loss -= length * gain
        found.addcmul_(length, direction)
        residual.addcmul_(length, along, value=-1)
        step = precondition(residual)
        before, gain = gain, (residual * step).sum(1, keepdim=True)
        direction.mul_(gain / before.clamp_min(_TINY)).add_(step)
    result = torch.where(keep, free + found, 0.0)
    loss, residual = at(result)
    late = ~((residual * precondition(residual)).sum(1, keepdim=True) <= 4 * _EXCESS * loss).flatten()
    result /= scale
    if late.any():
        result[late] = _by_factorisation(mean[late], precision, keep[late])
    return result


def _preconditioner(precision: Tensor, kept: Tensor) -> Callable[[Tensor], Tensor]:
    """Solves a row r for its kept columns S by I + (L - I) on the leading eigenvectors of a precision, cut to S.

    With eigenvectors V and their eigenvalues L, in units of the mean of the others, the matrix of a row is
    I + V_S (L - I) V_S^T, whose inverse is I - V_S ((L - I)^-1 + V_S^T V_S)^-1 V_S^T.

    Args:
        precision: Of unit diagonal, (C, C) float32.
        kept: 1 where a column is kept, 0 elsewhere, (R, C).
    """
    number = min(_LEADING, len(precision) // 8)
    start = torch.randn(len(precision), number, generator=torch.Generator().manual_seed(0)).to(precision)
    for _ in range(_POWERS):
        start = torch.linalg.qr(precision @ start).Q
    values, vectors = torch.linalg.eigh(start.T @ precision @ start)
    vectors = start @ vectors
    others = (len(precision) - values.sum()) / (len(precision) - number)
    gram = kept @ (vectors[:, :, None] * vectors[:, None]).flatten(1)
    among = gram.view(-1, number, number) + (1 / (values / others - 1).clamp(1e-6, 1e4)).diag()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(among))

    def solve(residual: Tensor) -> Tensor:
        parts = torch.bmm((residual @ vectors)[:, None], inverse)[:, 0]
        return residual - (parts @ vectors.T).mul_(kept)

    return solve
