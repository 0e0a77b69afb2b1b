"""Rounding to a grid: each weight by itself, or column by column, the rest of the row making up for the error.

With the precision P between the columns of a row, rounding column c to q moves those that are not rounded yet by their
conditional mean given that weight c is q; with U the upper Cholesky factor of P^-1 that is w_j -= (w_c - q) U_cj / U_cc
(Frantar et al., 2022, GPTQ). A weight that was removed stays zero.

Where a weight goes is the nearest place, not that with the least error and code length together, which is no better at
equal bytes, and worse where length counts in full (docs/benchmarks/bits.md): errors that all shrink the weights add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesprune.bits.steps import Grid

_BLOCK = 32  # columns whose errors move those behind the block together, in one product
_SHARED_COST = 20  # row by row only while it costs no more than so many products of all rows with the precision


def nearest(values: Tensor, step: Tensor, limit: int) -> Tensor:
    """The nearest integers, from -limit to limit."""
    return (values / step).round().clamp(-limit, limit)


def round_alone(mean: Tensor, kept: Tensor, grid: Grid) -> Tensor:
    """The tensor with each weight rounded by itself; False in `kept` stays zero."""
    integers = torch.where(kept, nearest(mean.double(), grid.step, grid.limit), 0.0)
    return (integers * grid.step + 0.0).to(mean.dtype)


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


def round_columns(mean: Tensor, kept: Tensor, step: Tensor, plan: Sequence[Sweep], limits: Sequence[int]) -> Tensor:
    """Rows (R, C), float64, rounded as `sweeps` planned it.

    Args:
        mean: The weights of R rows.
        kept: False where a weight stays zero, (R, C).
        step: Of every weight, (R, C).
        plan: What `sweeps` returned.
        limits: The largest integer of each column.
    """
    found = torch.zeros_like(mean)
    for sweep in plan:
        rows, upper, own_limits = sweep.rows, sweep.upper, [limits[column] for column in sweep.columns.tolist()]
        values, own_step, own_kept = (part[rows][:, sweep.columns] for part in (mean, step, kept))
        rounded, errors = torch.zeros_like(values), torch.zeros_like(values)
        for start in range(0, len(own_limits), _BLOCK):
            end = min(start + _BLOCK, len(own_limits))
            for place in range(start, end):
                integers = nearest(values[:, place], own_step[:, place], own_limits[place])
                rounded[:, place] = torch.where(own_kept[:, place], integers, 0.0) * own_step[:, place]
                errors[:, place] = (values[:, place] - rounded[:, place]) / upper[place, place]
                values[:, place + 1 : end] -= errors[:, place, None] * upper[place, place + 1 : end]
            values[:, end:] -= errors[:, start:end] @ upper[start:end, end:]
        found[rows[:, None], sweep.columns] = rounded
    return found
