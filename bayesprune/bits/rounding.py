"""Rounding to a grid: each weight by itself, or column by column, the rest of the row making up for the error.

A weight goes where its error and the length of its code together are least. In the units of `posterior_grid`, where a
step D costs kappa / 2 nats on average, an error e costs 6 kappa (e / D)^2 nats of likelihood, and a nat of code is
worth kappa nats of likelihood, that being what the step size itself trades: kappa drops out, and

    k = argmin  6 (w / D - k)^2 + length(k),

length in nats, out of the histogram of the integers themselves (entropy-constrained quantization, Chou et al., 1989).

Column by column: with the precision P between the columns of a row, rounding column c to q moves those that are not
rounded yet by their conditional mean given that weight c is q; with U the upper Cholesky factor of P^-1 that is
w_j -= (w_c - q) U_cj / U_cc (Frantar et al., 2022, GPTQ). A weight that was removed stays zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesprune.bits.steps import Grid

_SWEEPS = 3  # of histogram and choice, until the lengths fit what they are the lengths of
_ERROR = 6.0
_SHARED_COST = 20  # row by row only while it costs no more than so many products of all rows with the precision

Rounder = Callable[[Tensor, Tensor, int], Tensor]
"""round(values, step, limit): integers, as a float tensor."""


def nearest(values: Tensor, step: Tensor, limit: int) -> Tensor:
    """The nearest integers."""
    return (values / step).round().clamp(-limit, limit)


def rounder(mean: Tensor, kept: Tensor, grid: Grid) -> Rounder:
    """How the weights of a tensor are rounded; code lengths come from the tensor as it is before.

    Args:
        mean: The weights.
        kept: False where a weight stays zero.
        grid: Where they may stand.
    """
    if not grid.by_length or not kept.any():
        return nearest
    lengths = torch.zeros(2 * grid.limit + 1, dtype=torch.double)
    for _ in range(_SWEEPS):
        integers = torch.where(kept, _shortest(mean.double(), grid.step, grid.limit, lengths), 0.0)
        counts = torch.bincount((integers.flatten().long() + grid.limit), minlength=len(lengths)).double()
        lengths = -((counts + 0.5) / (counts.sum() + 0.5 * max(1, int((counts > 0).sum())))).log()
    return lambda values, step, limit: _shortest(values, step, limit, lengths)


def round_alone(mean: Tensor, kept: Tensor, grid: Grid) -> Tensor:
    """The tensor with each weight rounded by itself."""
    integers = rounder(mean, kept, grid)(mean.double(), grid.step, grid.limit)
    return (torch.where(kept, integers, 0.0) * grid.step + 0.0).to(mean.dtype)


@dataclass(frozen=True)
class Sweep:
    """Rows that are rounded together.

    Attributes:
        rows: Their numbers.
        columns: Those that one of them keeps, in the order of rounding.
        upper: The upper Cholesky factor of the inverse of the precision between these columns.
    """

    rows: Tensor
    columns: Tensor
    upper: Tensor


def sweeps(kept: Tensor, precision: Tensor) -> list[Sweep]:
    """How rows (R, C) are rounded from the first column to the last, the columns to come making up for each.

    Rows that keep the same columns go together; all do, where single factorisations would cost too much.

    Args:
        kept: False where a weight stays zero, (R, C).
        precision: Between the columns, (C, C), positive definite; its scale does not matter.
    """
    patterns, which = kept.unique(dim=0, return_inverse=True)
    cost = float(patterns.sum(1).double().pow(3).sum())
    if cost > _SHARED_COST * kept.numel() * kept.shape[1]:
        patterns, which = kept.any(0)[None], torch.zeros(len(kept), dtype=torch.long)
    found = []
    for index, pattern in enumerate(patterns):
        if pattern.any():
            columns = pattern.nonzero()[:, 0]
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(precision[columns][:, columns]))
            upper = torch.linalg.cholesky(inverse, upper=True)
            found.append(Sweep((which == index).nonzero()[:, 0], columns, upper))
    return found


def round_columns(
    mean: Tensor, kept: Tensor, step: Tensor, plan: Sequence[Sweep], columns: Sequence[tuple[Rounder, int]]
) -> Tensor:
    """Rows (R, C), float64, rounded as `sweeps` planned it.

    Args:
        mean: The weights of R rows.
        kept: False where a weight stays zero, (R, C).
        step: Of every weight, (R, C).
        plan: What `sweeps` returned.
        columns: How each column is rounded, and to which largest integer.
    """
    found = torch.zeros_like(mean)
    for sweep in plan:
        rows, upper = sweep.rows, sweep.upper
        values, own_step, own_kept = (part[rows][:, sweep.columns] for part in (mean, step, kept))
        rounded = torch.zeros_like(values)
        for place, column in enumerate(sweep.columns.tolist()):
            round_one, limit = columns[column]
            integers = round_one(values[:, place], own_step[:, place], limit)
            rounded[:, place] = torch.where(own_kept[:, place], integers, 0.0) * own_step[:, place]
            error = (values[:, place] - rounded[:, place]) / upper[place, place]
            values[:, place + 1 :] -= error[:, None] * upper[place, place + 1 :]
        found[rows[:, None], sweep.columns] = rounded
    return found


def _shortest(values: Tensor, step: Tensor, limit: int, lengths: Tensor) -> Tensor:
    """Of the nearest integer, its neighbour towards zero, and zero, that with the least error and length."""
    scaled = values / step
    best = scaled.round().clamp(-limit, limit)
    cost = _cost(scaled, best, limit, lengths)
    for other in (best - best.sign(), torch.zeros_like(best)):
        other_cost = _cost(scaled, other, limit, lengths)
        best, cost = torch.where(other_cost < cost, other, best), torch.minimum(other_cost, cost)
    return best


def _cost(scaled: Tensor, integers: Tensor, limit: int, lengths: Tensor) -> Tensor:
    return _ERROR * (scaled - integers).square() + lengths[integers.long() + limit]
