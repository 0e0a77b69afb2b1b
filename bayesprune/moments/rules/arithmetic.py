"""Rules for functions of two tensors, entry by entry: sums, products, quotients, powers and others.

Two tensors of one origin combine as one function of it; any others as independent: Var(ab) = va vb + va mb^2 + vb ma^2.
Cost: no product of matrices.

To first order: with slopes a and b at the means, var = a^2 va + b^2 vb, both taken as independent. Two tensors of one
origin are one function of it, as everywhere.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesprune.moments import closed_forms
from bayesprune.moments.covariance import common_dims, shared_along
from bayesprune.moments.elementwise import affine, apply, in_place, joint
from bayesprune.moments.gaussian import Formula
from bayesprune.moments.memory import KnownMoments
from bayesprune.moments.registry import follows_directions, register_rule
from bayesprune.moments.tensor import Moments, is_uncertain, known, plain


def add(input: Any, other: Any, *, alpha: Any = 1) -> Moments:
    """input + alpha other."""
    a, b = input, other
    if is_uncertain(a) and is_uncertain(b):
        together = joint(a, b, lambda s, t: s + alpha * t) if a.shape == b.shape else None
        return together if together is not None else _sum(known(a), known(multiply(b, alpha) if alpha != 1 else b))
    certain, uncertain = (b, a) if is_uncertain(a) else (a, b)
    scale, offset = (1, _number(certain)) if is_uncertain(a) else (alpha, _number(certain))
    if is_uncertain(a) and alpha != 1:
        offset = offset * alpha
    if _fits(certain, uncertain):
        return affine(uncertain, scale, offset)
    return _sum(known(affine(uncertain, scale) if scale != 1 else uncertain), known(offset))


def subtract(input: Any, other: Any, *, alpha: Any = 1) -> Moments:
    """input - alpha other."""
    return add(input, other, alpha=-alpha)


def reverse_subtract(input: Any, other: Any, *, alpha: Any = 1) -> Moments:
    """other - alpha input."""
    return add(other, input, alpha=-alpha)


def multiply(input: Any, other: Any) -> Moments:
    """input times other."""
    a, b = input, other
    if is_uncertain(a) and is_uncertain(b):
        together = joint(a, b, lambda s, t: s * t) if a.shape == b.shape else None
        return together if together is not None else _product(known(a), known(b))
    certain, uncertain = (b, a) if is_uncertain(a) else (a, b)
    if _fits(certain, uncertain):
        return affine(uncertain, _number(certain))
    return _product(known(uncertain), known(_number(certain)))


def divide(input: Any, other: Any, *, rounding_mode: None = None) -> Moments:
    """input / other."""
    a, b = input, other
    if rounding_mode is not None:
        raise NotImplementedError(f"moments: division with rounding_mode={rounding_mode!r} has no useful variance.")
    if not is_uncertain(b):
        return multiply(a, 1 / _number(b))
    if is_uncertain(a) and a.shape == b.shape:
        together = joint(a, b, lambda s, t: s / t)
        if together is not None:
            return together
    return multiply(a, apply(b, torch.reciprocal, closed_forms.power(-1.0)))


def power(input: Any, exponent: Any) -> Moments:
    """input to the exponent, one of them a number or a certain tensor of the other's shape."""
    a = input
    if is_uncertain(a) and is_uncertain(exponent):
        together = joint(a, exponent, torch.pow)
        if together is None:
            raise NotImplementedError("moments: a power of two independent uncertain tensors has no rule.")
        return together
    if is_uncertain(a):
        return apply(a, lambda t: torch.pow(t, exponent), _power_formula(exponent))
    return apply(exponent, lambda t: torch.pow(a, t))


def where(condition: Tensor, input: Any, other: Any) -> Moments:
    """input where the condition holds, other elsewhere."""
    first, second = known(input), known(other)
    mean = torch.where(condition, first.parts.mean, second.parts.mean)
    chosen = [(first, condition), (second, ~condition)]
    if first.directions is not None or second.directions is not None:
        residual = _selected([(_residual(x), where_) for x, where_ in chosen])
        return Moments.along(mean, _pushed(first, second, condition, ~condition, mean.dim()), residual)
    variance = _selected([(x.parts.variance, where_) for x, where_ in chosen])
    dims = common_dims(first.parts, second.parts)
    if not dims:
        return Moments(mean, variance)
    common = [(shared_along(x.parts, dims), where_.float().expand(mean.shape)) for x, where_ in chosen]
    return Moments(mean, variance, _selected([(x, _averaged(where_, dims).square()) for x, where_ in common]))


def reverse_divide(input: Any, other: Any) -> Moments:
    """other / input."""
    return divide(other, input)


def reverse_power(input: Any, other: Any) -> Moments:
    """other to the input."""
    return power(other, input)


def negate(input: Moments) -> Moments:
    """-input."""
    return affine(input, -1)


def masked_fill(input: Any, mask: Tensor, value: Any) -> Moments:
    """input, with a value where the mask is true."""
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=input.dtype, device=input.device)
    return where(mask, value, input)


def addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    """input + value tensor1 tensor2."""
    return torch.add(input, tensor1 * tensor2, alpha=value)


def addcdiv(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    """input + value tensor1 / tensor2."""
    return torch.add(input, tensor1 / tensor2, alpha=value)


def lerp(input: Any, end: Any, weight: Any) -> Any:
    """input + weight (end - input); of independent ends, as (1 - weight) input + weight end."""
    return input * (1 - weight) + end * weight


def _sum(a: KnownMoments, b: KnownMoments) -> Moments:
    mean = a.parts.mean + b.parts.mean
    if a.directions is not None or b.directions is not None:
        return Moments.along(mean, _pushed(a, b, 1, 1, mean.dim()), _plus(_residual(a), _residual(b)))
    dims = common_dims(a.parts, b.parts)
    shared = _plus(shared_along(a.parts, dims), shared_along(b.parts, dims)) if dims else None
    return Moments(mean, _plus(a.parts.variance, b.parts.variance), shared)


def _product(a: KnownMoments, b: KnownMoments) -> Moments:
    (ma, va, _), (mb, vb, _) = a.parts, b.parts
    mean = ma * mb
    if a.directions is not None or b.directions is not None:
        residual = _product_variance(_residual(a), _residual(b), ma, mb)
        return Moments.along(mean, _pushed(a, b, mb, ma, mean.dim()), residual)
    variance, dims = _product_variance(va, vb, ma, mb), common_dims(a.parts, b.parts)
    if not dims:
        return Moments(mean, variance)
    first, second = shared_along(a.parts, dims), shared_along(b.parts, dims)
    return Moments(mean, variance, _product_variance(first, second, _averaged(ma, dims), _averaged(mb, dims)))


def _pushed(a: KnownMoments, b: KnownMoments, by_a: Any, by_b: Any, num_dims: int) -> Tensor:
    """The directions of both, each times the derivative by it."""
    terms = []
    for x, factor in ((a, by_a), (b, by_b)):
        if x.directions is not None:
            aligned_ = x.directions.reshape(
                len(x.directions), *(1,) * (num_dims + 1 - x.directions.dim()), *x.directions.shape[1:]
            )
            terms.append(aligned_ * factor)
    return sum(terms[1:], start=terms[0])


def _selected(terms: list[tuple[Tensor | None, Tensor]]) -> Tensor | None:
    first, second = (None if x is None else x * factor for x, factor in terms)
    return _plus(first, second)


def _power_formula(exponent: Any) -> Formula | None:
    """Quadrature for whole numbers, exact for small ones; any other power is that of a positive number."""
    if isinstance(exponent, Tensor):
        return None
    if exponent == 2:
        return closed_forms.squared
    return None if exponent >= 0 and exponent == int(exponent) else closed_forms.power(float(exponent))


def _residual(x: KnownMoments) -> Tensor | None:
    return x.parts.variance if x.directions is None else x.residual


def _product_variance(va: Tensor | None, vb: Tensor | None, ma: Any, mb: Any) -> Tensor | None:
    total = None
    if va is not None:
        total = va * _square(mb, va) if vb is None else va * (_square(mb, va) + vb)
    if vb is not None:
        total = _plus(total, vb * _square(ma, vb))
    return total


def _square(x: Any, like: Tensor) -> Any:
    return x.to(like.dtype).square() if isinstance(x, Tensor) else x**2


def _averaged(x: Any, dims: set[int]) -> Any:
    if not isinstance(x, Tensor) or not x.dim():
        return x
    own = [dim for dim in dims if -dim <= x.dim() and x.shape[dim] > 1]
    return x.mean(own, keepdim=True) if own else x


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _functions(name: str) -> list[Any]:
    return [getattr(owner, name) for owner in (torch, Tensor) if hasattr(owner, name)]


def _number(x: Any) -> Any:
    return plain(x) if isinstance(x, Tensor) else x


def _fits(certain: Any, uncertain: Moments) -> bool:
    """Whether the certain operand leaves the shape of the uncertain one as it is."""
    if not isinstance(certain, Tensor):
        return True
    return torch.broadcast_shapes(certain.shape, uncertain.shape) == uncertain.shape


_NAMES = {
    add: ("add", "__add__", "__radd__"),
    subtract: ("sub", "subtract", "__sub__"),
    reverse_subtract: ("rsub", "__rsub__"),
    multiply: ("mul", "multiply", "__mul__", "__rmul__"),
    divide: ("div", "divide", "true_divide", "__truediv__", "__div__"),
    reverse_divide: ("__rtruediv__", "__rdiv__"),
    power: ("pow", "__pow__", "float_power"),
    reverse_power: ("__rpow__",),
    negate: ("neg", "negative", "__neg__"),
    masked_fill: ("masked_fill",),
    addcmul: ("addcmul",),
    addcdiv: ("addcdiv",),
    lerp: ("lerp",),
}
for _rule, _found in _NAMES.items():
    for _name in _found:
        register_rule(*_functions(_name))(follows_directions(_rule))
        for _written in _functions(f"__i{_name[2:]}" if _name.startswith("__") else f"{_name}_"):
            register_rule(_written)(in_place(_rule, getattr(Tensor, _name)))
register_rule(torch.where)(follows_directions(where))
register_rule(Tensor.where)(follows_directions(lambda x, condition, other: where(condition, x, other)))


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
