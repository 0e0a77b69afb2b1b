"""Rules for functions of two tensors, entry by entry, that are neither sums nor products. No product of matrices.

To first order: with slopes a and b at the means, var = a^2 va + b^2 vb, both taken as independent. Two tensors of one
origin are one function of it, as everywhere.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesprune.moments.elementwise import affine, apply, in_place, joint
from bayesprune.moments.registry import follows_directions, register_rule
from bayesprune.moments.tensor import is_uncertain, plain


def of_two(function: Callable[[Tensor, Tensor], Tensor], input: Any, other: Any) -> Any:
    """An elementwise function of two tensors or numbers, either or both uncertain."""
    if is_uncertain(input) and is_uncertain(other):
        together = joint(input, other, function) if input.shape == other.shape else None
        if together is not None:
            return together
        a, b = _spread(input, other), _spread(other, input)
        value, (left, right) = _slopes(function, plain(a), plain(b))
        first: Any = affine(a - plain(a), left)
        return first + affine(b - plain(b), right) + value
    if is_uncertain(input):
        return apply(_spread(input, other), lambda t: function(t, _like(other, t)))
    return apply(_spread(other, input), lambda t: function(_like(input, t), t))


@register_rule(F.glu)
@follows_directions
def glu(input: Any, dim: int = -1) -> Any:
    """One half of a dimension times the sigmoid of the other."""
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


@register_rule(torch.logaddexp, Tensor.logaddexp)
@follows_directions
def logaddexp(input: Any, other: Any) -> Any:
    """log(exp input + exp other)."""
    return of_two(torch.logaddexp, input, other)


@register_rule(F.cosine_similarity, torch.cosine_similarity)
@follows_directions
def cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    """The inner product of vectors over their lengths."""
    return (F.normalize(x1, dim=dim, eps=eps) * F.normalize(x2, dim=dim, eps=eps)).sum(dim)


@register_rule(torch.cdist)
@follows_directions
def cdist(x1: Any, x2: Any, p: float = 2.0, compute_mode: Any = None) -> Any:
    """The Euclidean distance of each of P vectors (..., P, D) from each of R (..., R, D)."""
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


@register_rule(F.pairwise_distance)
@follows_directions
def pairwise_distance(x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    """The Euclidean distance of vectors."""
    return torch.linalg.vector_norm(x1 - x2 + eps, p, -1, keepdim)


def _slopes(function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, list[Tensor]]:
    a, b = (x.contiguous() for x in torch.broadcast_tensors(a, b))
    none = torch.zeros_like(a)
    pushed: Any = [torch.func.jvp(function, (a, b), tangents) for tangents in ((none + 1, none), (none, none + 1))]
    return pushed[0][0], [slope for _, slope in pushed]


def _spread(x: Any, other: Any) -> Any:
    shape = torch.broadcast_shapes(x.shape, other.shape) if isinstance(other, Tensor) else x.shape
    return x if shape == x.shape else x.expand(shape)


def _like(x: Any, like: Tensor) -> Tensor:
    return plain(x).to(like.dtype) if isinstance(x, Tensor) else torch.full((), x, dtype=like.dtype, device=like.device)


def _register(*names: str) -> None:
    for name in names:

        def rule(*operands: Any, _name: str = name, **named: Any) -> Any:
            return of_two(getattr(torch, _name), *operands, *named.values())

        register_rule(getattr(torch, name), getattr(Tensor, name))(follows_directions(rule))
        if hasattr(Tensor, f"{name}_"):
            register_rule(getattr(Tensor, f"{name}_"))(in_place(rule, getattr(Tensor, name)))


_register("atan2", "arctan2", "hypot", "logaddexp2", "xlogy", "copysign", "ldexp")
