"""Regression of a layer's outputs on its inputs: by ridge, from the sums of their products, and which weights to keep.

Least squares under a rule for which entries may differ from zero, by alternating directions (ADMM: Boyd et al., 2011;
for pruned layers Boza, 2024, arXiv:2401.02938, and ALPS: Meng et al., 2024, arXiv:2406.07831). Two copies of the
weights are drawn together: X fits the layer's outputs, Z has the zeros that the rule gives. All rows share one
factorisation.
What differs here: the rule is whatever the caller selects by, and only the support is taken; what the weights on it
should be is `conditional_mean`'s to say. It is a local search: it may keep two inputs of which either could stand in
for the other.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bayesprune.estimators.seeded import without_autocast
from bayesprune.laplace.conditioning import conditional_mean
from bayesprune.laplace.kronecker import about
from bayesprune.laplace.matrices import MAX_DAMPING, damped

DAMPINGS = (1e-3, 1e-2, 1e-1)
"""Tried, as fractions of the mean diagonal of E[x x^T]."""


class Moments:
    """Sums over positions of products of a layer's inputs and targets, float64.

    Attributes:
        number: How many positions, those that wait included.
        xx: Of inputs, (G, C, C).
        yx: Of targets and inputs, (G, R, C).
        x: Of inputs alone, (G, C).
        y: Of targets alone, (G, R).
    """

    def __init__(self, num_groups: int, num_rows: int, num_columns: int, device: torch.device) -> None:
        options: dict[str, Any] = {"dtype": torch.double, "device": device}
        self.number = 0
        self.xx = torch.zeros(num_groups, num_columns, num_columns, **options)
        self.yx = torch.zeros(num_groups, num_rows, num_columns, **options)
        self.x, self.y = (torch.zeros(num_groups, size, **options) for size in (num_columns, num_rows))
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Adds positions (n, G, C) and (n, G, R); few of them wait for more, or until `finish`."""
        self.number += len(inputs)
        self._waiting.append((inputs, targets))
        if sum(len(x) for x, _ in self._waiting) >= inputs.shape[2]:
            self.finish()

    def add_group(self, group: int, inputs: Tensor, targets: Tensor) -> None:
        """Adds positions (n, C) and (n, R) that one group alone meets; `number` stays as it is."""
        with without_autocast(inputs.device):
            self.xx[group] += inputs.mT @ inputs
            self.yx[group] += targets.mT @ inputs
        self.x[group] += inputs.sum(0, dtype=torch.double)
        self.y[group] += targets.sum(0, dtype=torch.double)

    def finish(self) -> None:
        """Adds what waits."""
        if self._waiting:
            x, y = (torch.cat(parts).transpose(0, 1) for parts in zip(*self._waiting, strict=True))
            self._waiting.clear()
            with without_autocast(x.device):
                self.xx += torch.bmm(x.mT, x)
                self.yx += torch.bmm(y.mT, x)
            self.x += x.sum(1, dtype=torch.double)
            self.y += y.sum(1, dtype=torch.double)

    def __add__(self, other: "Moments") -> "Moments":
        total = copy.copy(self)
        for name in ("number", "xx", "yx", "x", "y"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def centred(self, *, about_mean: bool) -> tuple[Tensor, Tensor]:
        """Means of x x^T (G, C, C) and y x^T (G, R, C), about the means where asked for."""
        xx, yx = self.xx / self.number, self.yx / self.number
        if about_mean:
            x, y = self.x / self.number, self.y / self.number
            xx, yx = about(xx, x), yx.baddbmm_(y[:, :, None], x[:, None], alpha=-1)
        return xx, yx

    def less(self, bias: Tensor) -> "Moments":
        """The moments with this (G, R) taken off every target."""
        other = copy.copy(self)
        other.yx, other.y = self.yx - bias[:, :, None] * self.x[:, None], self.y - self.number * bias
        return other


def best_damping(start: Tensor, kept: Tensor, fitted: Moments, check: Moments, *, about_mean: bool) -> float:
    """The damping whose fit to the one part has the smallest squared error on the other."""
    xx, yx = fitted.centred(about_mean=about_mean)
    other_xx, other_yx = check.centred(about_mean=about_mean)

    def error(damping: float) -> float:
        found = ridge(start, kept, xx, yx, damping)
        return float(((found @ other_xx) * found).sum() - 2 * (found * other_yx).sum())

    return min(DAMPINGS, key=error)


def ridge(start: Tensor, kept: Tensor, xx: Tensor, yx: Tensor, damping: float) -> Tensor:
    """Weights (G, R, C), zero where they are not kept, that fit best; damped towards `start`.

    Where rounding has left `xx` indefinite, and the damping is too small to make up for it, ten times as much is taken.

    Raises:
        torch.linalg.LinAlgError: at damping=0, where columns that stay depend on each other.
    """
    precision = damped(xx, damping)
    push = yx + (precision.diagonal(dim1=1, dim2=2) - xx.diagonal(dim1=1, dim2=2))[:, None] * start
    found = torch.zeros_like(start)
    for group, own in enumerate(kept):
        columns = own.any(0).nonzero()[:, 0]  # what no row keeps is zero in all, and needs no solution
        among, own = precision[group][columns][:, columns], own[:, columns]
        factor, fault = torch.linalg.cholesky_ex(among, check_errors=not damping or damping >= MAX_DAMPING)
        if fault:
            return ridge(start, kept, xx, yx, 10 * damping)
        free = torch.cholesky_solve(push[group][:, columns].mT, factor).mT
        found[group][:, columns] = free if own.all() else conditional_mean(free, among, own)
    return found


Select = Callable[[Tensor, float], Tensor]
"""select(scores, way): which entries stay, the highest scores (G, R, C) best, a share `way` of the removal done."""

_FULL = 0.75  # share of the steps after which all that goes is gone


def best_support(mean: Tensor, precision: Tensor, select: Select, *, num_steps: int = 20) -> Tensor:
    """A mask of entries to keep, (G, R, C), for a small expected loss once those that are left are conditioned.

    Cost: a factorisation, and R C^2 multiplications a step, in float32.

    Args:
        mean: Means of G groups of rows, (G, R, C).
        precision: Precision between the columns, (G, C, C), positive definite; its scale does not matter.
        select: The rule. It removes more and more over the first three quarters of the steps.
        num_steps: Steps. Twenty come within a few percent of what more reach.

    Examples:
        >>> import torch
        >>> precision = torch.diag(torch.tensor([1.0, 1.0, 0.1]))[None]
        >>> two = lambda scores, way: scores >= scores.topk(2).values[..., -1:]
        >>> best_support(torch.tensor([[[1.0, 0.8, 0.9]]]), precision, two)
        tensor([[[ True,  True, False]]])
    """
    mean, precision = mean.float(), precision.float()
    scale = precision.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    unit = precision / scale[:, :, None] / scale[:, None, :]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(unit + torch.eye(unit.shape[-1])))
    free = mean * scale[:, None]
    push, gap = free @ unit, torch.zeros_like(free)
    for step in range(1, num_steps):
        left = 1 - min(1.0, step / (_FULL * num_steps))
        total = free + gap
        allowed = total.masked_fill(~select(total.abs(), 1 - left**3), 0.0)
        gap = total - allowed
        free = (push + allowed - gap) @ inverse
    return select((free + gap).abs(), 1.0)
