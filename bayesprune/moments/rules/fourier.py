"""Rules for Fourier transforms: linear maps along a dimension, with the squares of their matrix for variances.

Exact along one dimension for independent entries and for what they share; along several, real and imaginary parts are
taken as independent between one and the next. Cost: two small products for each dimension and part.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesprune.moments.directions import linearised
from bayesprune.moments.registry import follows_directions, register_complex_rule, register_rule
from bayesprune.moments.rules.complex_numbers import merged, split
from bayesprune.moments.rules.sequences import along
from bayesprune.moments.tensor import follows, is_uncertain


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
