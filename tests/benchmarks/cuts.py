"""Weights of linear layers and experts cut from calibration data alone, layer by layer: ours, and controls.

The controls are written from the papers' formulas.

- Magnitude ranks inside each layer.
- Wanda (Sun et al., 2023, arXiv:2306.11695): |w| times the norm of its input, ranked inside each output; nothing moves.
- SparseGPT (Frantar & Alistarh, 2023, arXiv:2301.00774): one sweep over the columns. The masks of 128 columns, or of a
  pattern's, are chosen by w^2 / [H^-1]_cc^2 when the sweep comes to them, and what a removal costs is made up for by
  the columns to its right. The damping is 1 % of the mean diagonal. Its inputs come from what is cut so far, layer by
  layer, in the paper block by block of a transformer.

Each is also given what ours has beside its masks: they are then chosen on weights that are fitted to the outputs before
the cut, and the weights that stay are fitted exactly.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.foundation.kinds import kind_of
from bayesprune.laplace.compensation import refit
from bayesprune.laplace.matrices import damped, to_matrix
from bayesprune.laplace.regression import Moments
from bayesprune.laplace.sequence import fit_in_sequence
from bayesprune.laplace.sites import Site, fittable_experts, fittable_layers, sites_of
from bayesprune.prune.weights import one_shot

BLOCK, DAMPING, ROWS = 128, 0.01, 128


@dataclass(frozen=True)
class Cut:
    """What chooses the masks; whether what stays is fitted to the outputs before; whether shares are those of ours."""

    mask: str
    fitted: bool = False
    divided: bool = False


@dataclass(frozen=True)
class Target:
    """Half of the weights, say, or a pattern."""

    sparsity: float | None = None
    pattern: str | None = None

    def keep(self, scores: Tensor, *, by_row: bool = False) -> Tensor:
        """The best of each group of a pattern, of all scores (R, C), or of each row."""
        if self.pattern:
            kept, size = (int(number) for number in self.pattern.split(":"))
            groups = scores.reshape(-1, size)
            best = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(kept, dim=1).indices, True)
            return best.reshape(scores.shape)
        assert self.sparsity is not None, "one of the two"
        rows = scores if by_row else scores.reshape(1, -1)
        lowest = rows.argsort(dim=1)[:, : round(self.sparsity * rows.shape[1])]
        return torch.ones_like(rows, dtype=torch.bool).scatter_(1, lowest, False).reshape(scores.shape)


def magnitude(weight: Tensor, _: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    keep = target.keep(weight.abs())
    return weight * keep, keep


def wanda(weight: Tensor, second: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    keep = target.keep(weight.abs() * second.diagonal().sqrt(), by_row=True)
    return weight * keep, keep


def sparsegpt(weight: Tensor, second: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """One sweep. With H^-1 = U^T U, U upper, U_cc U_c,c: is the first row of (H_c:,c:)^-1, for every c at once."""
    weight, hessian = weight.clone(), damped(second[None], DAMPING)[0]
    lower = torch.linalg.cholesky(hessian.flip(0, 1))
    upper = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False).flip(0, 1)
    scale, keep = upper.diagonal(), torch.empty_like(weight, dtype=torch.bool)
    step = int(target.pattern.split(":")[1]) if target.pattern else BLOCK
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        errors = torch.zeros(len(weight), end - start, dtype=weight.dtype)
        for column in range(start, end):
            if column % step == 0:
                ahead = slice(column, min(column + step, end))
                keep[:, ahead] = target.keep((weight[:, ahead] / scale[ahead]).square())
            errors[:, column - start] = weight[:, column].masked_fill(keep[:, column], 0.0) / scale[column]
            weight[:, column:end] -= errors[:, [column - start]] * upper[column, column:end]
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight * keep, keep


CONTROLS: dict[str, Callable[[Tensor, Tensor, Target], tuple[Tensor, Tensor]]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
}


@contextmanager
def largest_weights() -> Iterator[None]:
    """Inside, `prune_one_shot` keeps the largest weights, and fits them as it fits its own."""
    own = one_shot.best_support
    one_shot.best_support = lambda mean, precision, select: select(mean.float().abs(), 1.0)
    try:
        yield
    finally:
        one_shot.best_support = own


def ours(model: nn.Module, batches: list[Any], target: Target, *, divided: bool) -> dict[str, float]:
    """Removes weights in place; returns what share each layer lost."""
    scope = "global" if divided else "layer"
    report = bp.prune_one_shot(model, batches, target.pattern or f"weights={1 - target.sparsity}", scope=scope)
    return {row.name: 1 - row.kept / row.total for row in report.rows}


@torch.no_grad()
def control(
    model: nn.Module, batches: list[Any], how: Cut, target: Target, shares: Mapping[str, float] | None = None
) -> None:
    """Removes weights of a variational model in place, in each layer the target's sparsity or its share."""
    reference, masks = copy.deepcopy(model), dict[str, Tensor]()
    layers = fittable_layers(reference) | fittable_experts(reference, all_matrices=True)
    sites = sites_of(reference, batches, layers, rows_per_column=ROWS, all_matrices=True)

    def fit(site: Site, moments: tuple[Moments, Moments]) -> Tensor | None:
        of_matrix = Target(sparsity=shares[site.weight]) if shares else target
        total, layer = moments[0] + moments[1], layers[site.name]
        weight = model.get_parameter(site.weight)

        def cut(matrices: Tensor) -> Tensor:
            pairs = zip(matrices, total.xx / total.number, strict=True)
            found = [CONTROLS[how.mask](matrix, second, of_matrix) for matrix, second in pairs]
            keep = torch.stack([keep for _, keep in found])
            masks[site.weight] = kind_of(layer).from_matrices(keep, weight.shape).contiguous()
            return keep if how.fitted else torch.stack([cut for cut, _ in found])

        if how.fitted:
            return refit(model, reference, site, moments, choose=lambda mean, _: cut(mean), damping=DAMPING)
        matrices = cut(to_matrix(layer, weight).double())
        weight.copy_(kind_of(layer).from_matrices(matrices, weight.shape))
        return None

    fit_in_sequence(model, reference, batches, sites, fit)
    for name, mask in masks.items():
        layer_name, _, parameter = name.rpartition(".")
        layer: Any = model.get_submodule(layer_name)
        layer.set_mask(parameter, mask)
