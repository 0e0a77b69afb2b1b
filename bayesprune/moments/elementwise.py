"""Elementwise functions of tensors with moments: lazy, so that what is made of one tensor stays a function of it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bayesprune.moments.covariance import aligned, mean_over
from bayesprune.moments.gaussian import Formula, formula_of, transform
from bayesprune.moments.memory import Function, KnownMoments, LazyMoments, MomentTensors
from bayesprune.moments.registry import following, follows_directions, register_rule
from bayesprune.moments.settings import current
from bayesprune.moments.tensor import Moments, follows, to_nan, writable


def apply(x: Moments, function: Function, formula: Formula | None = None) -> Moments:
    """The tensor under an elementwise function.

    Args:
        x: An uncertain tensor.
        function: Acts on each entry of a plain tensor alone.
        formula: Its moments for a Gaussian; None, or an `x` that is not taken as Gaussian, means quadrature over the
            tensor that x was made of.
    """
    source, composed = x.source, _composed(x.source, function)
    if formula is not None and source.is_gaussian and not current().taylor:
        return Moments.of(LazyMoments.lazy(source.base, composed, lambda: transform(formula, source.known()), False))
    return _composite(source.base, composed)


def affine(x: Moments, scale: Any = 1, offset: Any = 0) -> Moments:
    """scale * x + offset, exact; numbers or tensors that broadcast to the shape of x."""
    source = x.source

    def compute() -> KnownMoments:
        (mean, variance, shared), directions, residual = source.known()
        assert variance is not None, "an affine rule is for uncertain tensors"
        factor = scale.to(variance.dtype) if isinstance(scale, Tensor) else scale
        if shared is not None:
            own = aligned(factor, mean.dim()) if isinstance(factor, Tensor) else factor
            common = mean_over(own, shared.shape) if isinstance(own, Tensor) else own
            shared = shared * common**2
        moved = MomentTensors((mean * scale + offset).to(mean.dtype), variance * factor**2, shared)
        if directions is None:
            return KnownMoments(moved)
        return KnownMoments(moved, directions * factor, None if residual is None else residual * factor**2)

    composed = _composed(source, lambda t: t * scale + offset)
    return Moments.of(LazyMoments.lazy(source.base, composed, compute, source.is_gaussian))


def joint(a: Moments, b: Moments, function: Callable[[Tensor, Tensor], Tensor]) -> Moments | None:
    """An elementwise function of two tensors made of the same one, as a function of that; None if they are not."""
    if a.source.base is not b.source.base:
        return None
    first, second, base = a.source, b.source, a.source.base

    def composed(t: Tensor) -> Tensor:
        return function(first.value(t), second.value(t))

    return _composite(base, composed)


def register_elementwise(*functions: Callable[..., Any], formula: Formula | None = None) -> None:
    """Registers functions that act on each entry of their first argument alone, whatever else they take.

    Args:
        *functions: torch functions, or methods of a tensor.
        formula: Maps mean and variance of a Gaussian to mean, variance and gain of the function; None is Gauss-Hermite
            quadrature (`settings(num_nodes=...)`), exact for polynomials of up to half the nodes' degree of exactness.
    """
    for function in functions:
        register_rule(function)(_rule(function, formula))


def in_place(
    rule: Callable[..., Any], function: Callable[..., Any], erase: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """The rule of the method that writes its result into its first argument.

    Args:
        rule: Of the function that returns the result.
        function: That function, whose derivative takes directions along where its rule does not.
        erase: Fills what is written with nan, given a plain tensor and the arguments behind it; None is all of it.
    """

    def write(x: Any, *args: Any, **kwargs: Any) -> Moments:
        x = writable(x, lambda memory: to_nan(memory) if erase is None else erase(memory, *args))
        has_directions = any(map(follows, (x, *args, *kwargs.values())))
        result = (following(function, rule) if has_directions else rule)(x, *args, **kwargs)
        if result.shape != x.shape:
            raise ValueError(f"in-place result has shape {tuple(result.shape)}; expected {tuple(x.shape)}.")
        return x.copy_from(result if result.dtype == x.dtype else result.to(x.dtype))

    return follows_directions(write)


def _rule(function: Callable[..., Any], formula: Formula | None) -> Callable[..., Any]:
    def rule(x: Moments, *args: Any, inplace: bool = False, **kwargs: Any) -> Moments:
        result = apply(x, lambda t: function(t, *args, **kwargs), formula)
        return x.copy_from(result) if inplace else result

    return follows_directions(rule)


def _composite(base: LazyMoments, function: Function) -> Moments:
    formula = formula_of(function)  # by the settings that hold now, whenever it is computed
    return Moments.of(LazyMoments.lazy(base, function, lambda: transform(formula, base.known()), False))


def _composed(source: LazyMoments, function: Function) -> Function:
    return function if source.function is None else lambda t: function(source.value(t))
