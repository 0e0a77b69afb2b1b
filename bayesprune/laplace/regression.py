"""Ridge regression of a layer's outputs on its inputs, from the sums of their products."""

import copy

import torch
from torch import Tensor

from bayesprune.laplace.conditioning import conditional_mean
from bayesprune.laplace.kronecker import about
from bayesprune.laplace.matrices import damped

DAMPINGS = (1e-3, 1e-2, 1e-1)
"""Tried, as fractions of the mean diagonal of E[x x^T]."""


class Moments:
    """Sums over positions of products of inputs (n, G, C) and targets (n, G, R), float64."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        x, y = inputs.transpose(0, 1), targets.transpose(0, 1)
        self.number = x.shape[1]
        self.xx, self.yx = torch.bmm(x.mT, x).double(), torch.bmm(y.mT, x).double()
        self.x, self.y = x.double().sum(1), y.double().sum(1)

    def __add__(self, other: "Moments") -> "Moments":
        total = copy.copy(self)
        for name, value in vars(other).items():
            setattr(total, name, getattr(self, name) + value)
        return total

    def centred(self, *, about_mean: bool) -> tuple[Tensor, Tensor]:
        """Means of x x^T (G, C, C) and y x^T (G, R, C), about the means where asked for."""
        xx, yx = self.xx / self.number, self.yx / self.number
        if about_mean:
            x, y = self.x / self.number, self.y / self.number
            xx, yx = about(xx, x), yx - y[:, :, None] * x[:, None]
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
    """Weights (G, R, C), zero where they are not kept, that fit best; damped towards `start`."""
    precision = damped(xx, damping)
    push = yx + (precision - xx).diagonal(dim1=1, dim2=2)[:, None] * start
    found = torch.zeros_like(start)
    for group, own in enumerate(kept):
        columns = own.any(0).nonzero()[:, 0]  # what no row keeps is zero in all, and needs no solution
        among = precision[group][columns][:, columns]
        free = torch.cholesky_solve(push[group][:, columns].mT, torch.linalg.cholesky(among)).mT
        found[group][:, columns] = conditional_mean(free, among, own[:, columns])
    return found
