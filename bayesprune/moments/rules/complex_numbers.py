"""Rules for complex numbers, whose real and imaginary parts are taken as independent, and for Fourier transforms.

So every function of them is made of functions of real tensors. A rotation by a certain angle (rotary embeddings of
Llama 4 and DeepSeek) is exact in both variances; what the two parts have in common behind it is not followed.

Exact along one dimension for independent entries and for what they share; along several, real and imaginary parts are
taken as independent between one and the next. Cost: two small products for each dimension and part.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesprune.moments.covariance import aligned, linearised
from bayesprune.moments.memory import KnownMoments, LazyMoments, MomentTensors
from bayesprune.moments.registry import find_rule, follows_directions, register_complex_rule, register_rule
from bayesprune.moments.rules import shapes  # noqa: F401  (whose rules serve here, too)
from bayesprune.moments.rules.reductions import along
from bayesprune.moments.tensor import Moments, follows, is_uncertain, known, plain


def split(x: Any) -> tuple[Any, Any]:
    """Real and imaginary part of a tensor or number."""
    if not is_uncertain(x):
        x = plain(x) if isinstance(x, Tensor) else torch.as_tensor(x)
        return (x.real, x.imag) if x.is_complex() else (x, torch.zeros_like(x))
    if not x.is_complex():
        return x, torch.zeros_like(plain(x))
    return _taken(x, torch.real), _taken(x, torch.imag)


def merged(real: Any, imag: Any) -> Any:
    """The complex tensor of a real and an imaginary part."""
    if not is_uncertain(real) and not is_uncertain(imag):
        return torch.complex(plain(real), plain(imag))
    real, imag = torch.broadcast_tensors(real, imag)
    (mean, directions, residual), (others, more, rest) = known(real), known(imag)
    shape = mean.mean.shape

    def full(part: Tensor | None, like: Tensor | None, size: Any) -> Tensor | None:
        if part is None and like is None:
            return None
        some = part if part is not None else like
        assert some is not None, "one of the two is there"
        return torch.zeros(size, dtype=some.dtype, device=some.device) if part is None else part.expand(size)

    def joined(a: Tensor | None, b: Tensor | None, size: Any) -> Tensor | None:
        left, right = full(a, b, size), full(b, a, size)
        return None if left is None or right is None else torch.complex(left.contiguous(), right.contiguous())

    shared = None
    if mean.shared is not None and others.shared is not None:
        both = aligned(mean.shared, len(shape)), aligned(others.shared, len(shape))
        shared = joined(*both, torch.broadcast_shapes(*(part.shape for part in both)))
    count = next((len(d) for d in (directions, more) if d is not None), 0)
    residual = mean.variance if directions is None and count else residual
    rest = others.variance if more is None and count else rest
    value = torch.complex(mean.mean.contiguous(), others.mean.contiguous())
    found = MomentTensors(value, joined(mean.variance, others.variance, shape), shared)
    return Moments.of(
        LazyMoments(KnownMoments(found, joined(directions, more, (count, *shape)), joined(residual, rest, shape)))
    )


def _taken(x: Moments, part: Any) -> Moments:
    (mean, variance, shared), directions, residual = x.source.known()
    rest = [None if found is None else part(found) for found in (variance, shared, directions, residual)]
    return Moments.of(LazyMoments(KnownMoments(MomentTensors(part(mean), rest[0], rest[1]), rest[2], rest[3])))


@register_rule(torch.view_as_complex)
@follows_directions
def view_as_complex(input: Any) -> Any:
    """Pairs (..., 2) as complex numbers (...)."""
    return merged(*input.unbind(-1))


@register_rule(torch.complex)
@follows_directions
def complex_of(real: Any, imag: Any) -> Any:
    """The complex number of two parts."""
    return merged(real, imag)


@register_rule(torch.polar)
@follows_directions
def polar(abs: Any, angle: Any) -> Any:
    """The complex number of a length and an angle."""
    return merged(abs * torch.cos(angle), abs * torch.sin(angle))


@register_complex_rule(torch.view_as_real)
@follows_directions
def view_as_real(input: Any) -> Any:
    """Complex numbers (...) as pairs (..., 2)."""
    return torch.stack(split(input), -1)


@register_complex_rule(torch.real, Tensor.real.__get__)  # type: ignore[attr-defined]
@follows_directions
def real(input: Any) -> Any:
    """The real parts."""
    return split(input)[0]


@register_complex_rule(torch.imag, Tensor.imag.__get__)  # type: ignore[attr-defined]
@follows_directions
def imag(input: Any) -> Any:
    """The imaginary parts."""
    return split(input)[1]


@register_rule(torch.real, Tensor.real.__get__)  # type: ignore[attr-defined]
@register_rule(torch.conj, Tensor.conj, torch.resolve_conj, Tensor.resolve_conj, torch.conj_physical)
@follows_directions
def itself(input: Any) -> Any:
    """Of a real number."""
    return input


@register_complex_rule(torch.conj, Tensor.conj, torch.conj_physical, Tensor.conj_physical, Tensor.mH.__get__)  # type: ignore[attr-defined]
@follows_directions
def conj(input: Any) -> Any:
    """The conjugates."""
    left, right = split(input)
    return merged(left, -right)


@register_complex_rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
@follows_directions
def add(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    """input + alpha other."""
    (a, b), (c, d) = split(input), split(other if alpha == 1 else other * alpha)
    return merged(a + c, b + d)


@register_complex_rule(torch.sub, Tensor.sub, Tensor.__sub__)
@follows_directions
def subtract(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    """input - alpha other."""
    (a, b), (c, d) = split(input), split(other if alpha == 1 else other * alpha)
    return merged(a - c, b - d)


@register_complex_rule(torch.neg, Tensor.neg, Tensor.__neg__)
@follows_directions
def negate(input: Any) -> Any:
    """-input."""
    a, b = split(input)
    return merged(-a, -b)


@register_complex_rule(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
@follows_directions
def multiply(input: Any, other: Any) -> Any:
    """input times other."""
    (a, b), (c, d) = split(input), split(other)
    return merged(a * c - b * d, a * d + b * c)


@register_complex_rule(torch.div, Tensor.div, Tensor.__truediv__)
@follows_directions
def divide(input: Any, other: Any) -> Any:
    """input / other, of a certain divisor."""
    if is_uncertain(other):
        raise NotImplementedError("moments: a quotient by uncertain complex numbers has no rule.")
    return multiply(input, 1 / (plain(other) if isinstance(other, Tensor) else other))


@register_complex_rule(torch.cat, torch.concat)
@follows_directions
def cat(tensors: Any, dim: int = 0) -> Any:
    """Tensors joined along a dimension."""
    return merged(*(torch.cat(list(some), dim) for some in zip(*map(split, tensors), strict=True)))


@register_complex_rule(torch.stack)
@follows_directions
def stack(tensors: Any, dim: int = 0) -> Any:
    """Tensors joined along a new dimension."""
    return merged(*(torch.stack(list(some), dim) for some in zip(*map(split, tensors), strict=True)))


@register_complex_rule(torch.sum, Tensor.sum)
@follows_directions
def total(input: Any, *args: Any, **kwargs: Any) -> Any:
    """Sums."""
    return merged(*(part.sum(*args, **kwargs) for part in split(input)))


@register_complex_rule(torch.mean, Tensor.mean)
@follows_directions
def average(input: Any, *args: Any, **kwargs: Any) -> Any:
    """Means."""
    return merged(*(torch.mean(part, *args, **kwargs) for part in split(input)))


@register_complex_rule(torch.abs, Tensor.abs, Tensor.__abs__)
@follows_directions
def absolute(input: Any) -> Any:
    """The lengths."""
    return torch.linalg.vector_norm(torch.view_as_real(input), dim=-1)


@register_complex_rule(torch.angle, Tensor.angle)
@follows_directions
def angle(input: Any) -> Any:
    """The angles, to first order."""
    a, b = split(input)
    return torch.atan2(b, a)


_SAME = (
    "permute",
    "transpose",
    "movedim",
    "unsqueeze",
    "squeeze",
    "select",
    "narrow",
    "unbind",
    "chunk",
    "split",
    "flip",
)
_SAME += (
    "expand",
    "expand_as",
    "repeat",
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "contiguous",
    "clone",
    "to",
    "roll",
)
_SAME += ("__getitem__", "__iter__", "detach", "index_select", "gather")
for _owner in (torch, Tensor):
    for _function in (getattr(_owner, name) for name in _SAME if hasattr(_owner, name)):
        register_complex_rule(_function)(find_rule(_function))


def transformed(transform: Callable[..., Tensor], x: Any, n: int | None, dim: int, norm: str | None) -> Any:
    """A Fourier transform of one dimension, from its matrix."""
    size = x.shape[dim]
    real, imag = split(x)
    dtype = torch.promote_types(real.dtype, torch.float32)
    eye = torch.eye(size, dtype=dtype, device=x.device)
    by_real = transform(eye, n, 0, norm)
    of_real = _applied(real, by_real, dim)
    if not x.is_complex():
        return merged(*of_real) if by_real.is_complex() else of_real[0]
    by_imag = transform(torch.complex(torch.zeros_like(eye), eye), n, 0, norm)
    of_imag = _applied(imag, by_imag, dim)
    if not by_imag.is_complex():
        return of_real[0] + of_imag[0]
    return merged(*(a + b for a, b in zip(of_real, of_imag, strict=True)))


def _applied(x: Any, matrix: Tensor, dim: int) -> tuple[Any, ...]:
    """Real and imaginary part of a matrix times a real tensor; the real part alone of a real matrix."""

    def by(weights: Tensor) -> Any:
        def product(part: Tensor) -> Tensor:
            return part.to(weights.dtype) @ weights.T

        def whole(t: Tensor) -> Tensor:
            return product(t.movedim(dim, -1)).movedim(-1, dim)

        def rule(t: Any) -> Any:
            return along(t, dim, product, weights)

        return (linearised(whole, rule) if follows(x) else rule if is_uncertain(x) else whole)(x)

    return (by(matrix.real), by(matrix.imag)) if matrix.is_complex() else (by(matrix),)


def _several(first: str, rest: str, *, is_last_first: bool, default: Sequence[int] | None) -> Callable[..., Any]:
    """A transform of several dimensions: one of the last (`first`), and one of each of the others."""

    def rule(input: Any, s: Any = None, dim: Any = default, norm: str | None = None) -> Any:
        if dim is None:
            dim = range(input.dim()) if s is None else range(-len(s), 0)
        sizes = [None] * len(dim) if s is None else list(s)
        steps = [(rest, d, n) for d, n in zip(dim, sizes, strict=True)]
        steps[-1] = (first, *steps[-1][1:])
        found = input
        for name, d, n in reversed(steps) if is_last_first else steps:
            found = getattr(torch.fft, name)(found, n, d, norm)
        return found

    return follows_directions(rule)


def _register() -> None:
    for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"):

        def rule(input: Any, n: int | None = None, dim: int = -1, norm: str | None = None, *, _name: str = name) -> Any:
            return transformed(getattr(torch.fft, _name), input, n, dim, norm)

        _both(getattr(torch.fft, name), follows_directions(rule))
    for name, default in (("2", (-2, -1)), ("n", None)):
        for first, rest in (("fft", "fft"), ("ifft", "ifft"), ("rfft", "fft"), ("irfft", "ifft")):
            made = _several(first, rest, is_last_first=first != "irfft", default=default)
            _both(getattr(torch.fft, first + name), made)
    for name, sign in (("fftshift", 1), ("ifftshift", -1)):

        def shift(input: Any, dim: Any = None, *, _sign: int = sign) -> Any:
            dims = list(range(input.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
            return input.roll([_sign * (input.shape[d] // 2) for d in dims], dims)

        _both(getattr(torch.fft, name), follows_directions(shift))


def _both(function: Callable[..., Any], rule: Callable[..., Any]) -> None:
    register_rule(function)(rule)
    register_complex_rule(function)(rule)


_register()
