"""Rules for linear equations A X = B and inverses, to first order.

dX = A^-1 (dB - dA X), so that with G = A^-1, var X = G^2 (var B + var A X^2), squares entry by entry: exact in B. Two
products, and one more where A is uncertain.
"""

from typing import Any

import torch
from torch import Tensor

from bayesprune.moments.registry import register_rule
from bayesprune.moments.tensor import Moments, is_uncertain, parts


@register_rule(torch.linalg.solve_triangular)
def solve_triangular(A: Any, B: Any, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Any:
    """X of A X = B, or of X A = B, where one triangle of A counts, and its diagonal unless it is taken as ones."""
    if not left:
        return solve_triangular(A.mT, B.mT, upper=not upper, unitriangular=unitriangular).mT
    counts = torch.ones(A.shape[-2:], dtype=torch.bool, device=A.device)
    edge = int(unitriangular)
    counts = counts.triu(edge) if upper else counts.tril(-edge)

    def solve(b: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(parts(A).mean, b, upper=upper, unitriangular=unitriangular)

    return _solved(A, B, solve, counts)


@register_rule(torch.linalg.solve)
def solve(A: Any, B: Any, *, left: bool = True) -> Any:
    """X of A X = B, or of X A = B; a vector is one column."""
    if not left:
        return solve(A.mT, B.mT).mT
    if B.dim() == 1 or B.shape == A.shape[:-1]:
        return solve(A, B.unsqueeze(-1)).squeeze(-1)
    return _solved(A, B, lambda b: torch.linalg.solve(parts(A).mean, b), None)


@register_rule(torch.inverse, Tensor.inverse)
def inverse(input: Any) -> Any:
    """The inverse of a matrix."""
    return solve(input, torch.eye(input.shape[-1], dtype=input.dtype, device=input.device).expand(input.shape))


@register_rule(torch.linalg.inv)
def linalg_inverse(A: Any) -> Any:
    """The same."""
    return inverse(A)


def _solved(a: Any, b: Any, solve: Any, counts: Tensor | None) -> Moments:
    (before, noise, _), (right, own, _) = parts(a), parts(b)
    mean = solve(right)
    dtype = torch.promote_types(mean.dtype, torch.float32)
    spread = torch.zeros((), dtype=dtype, device=mean.device) if own is None else own
    if noise is not None:
        noise = noise if counts is None else noise * counts
        spread = spread + noise @ mean.to(dtype).square()
    inverse = solve(torch.eye(before.shape[-1], dtype=before.dtype, device=before.device).expand(before.shape))
    assert is_uncertain(a) or is_uncertain(b), "a rule is for uncertain tensors"
    return Moments(mean, inverse.to(dtype).square() @ spread.expand(mean.shape))
