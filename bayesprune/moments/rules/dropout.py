"""Rules for dropout: exact moments of the product with a random mask, without a draw. No product of matrices.

With b the mask, one with probability q, an output a b (x + d) + c has the mean a q (m + d) + c and the variance
a^2 (q v + q (1 - q) (m + d)^2). Positions of independent masks share (a q)^2 times what they shared; a mask that all
positions of a channel have in common leaves them a^2 q times it and adds a^2 q (1 - q) (m + d)^2. Masks that a model
draws itself (drop path) are numbers by which it multiplies: those forwards stay random.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesprune.foundation import noise
from bayesprune.moments.covariance import is_tracked, shared_along
from bayesprune.moments.memory import KnownMoments, MomentTensors
from bayesprune.moments.registry import follows_directions, register_rule
from bayesprune.moments.tensor import Moments, known

_ALPHA = 1.7580993408473766  # minus the value that a dropped SELU takes (Klambauer et al., 2017)


def masked(x: KnownMoments, keep: float, scale: float, shift: float, num_units: int | None) -> Moments:
    """scale * b * (x + shift) - scale * keep * shift, for a random mask b that is one with probability `keep`.

    Args:
        x: An uncertain tensor.
        keep: Probability, above 0.
        scale: Factor of what is kept.
        shift: Added before, and its mean taken off after.
        num_units: The leading dimensions that have a mask of their own; None is all of them.
    """
    (mean, variance, shared), directions, residual = x
    assert variance is not None, "a rule is for uncertain tensors"
    gain, noise_ = scale * keep, scale**2 * keep * (1 - keep)
    square = noise_ * (mean.to(variance.dtype) + shift).square()
    dims = set[int]() if num_units is None else set(range(num_units - mean.dim(), 0))
    if directions is not None:
        inherited = variance if residual is None else variance - residual
        rest = scale**2 * keep * variance - gain**2 * inherited
        directions = gain * directions
        if dims:
            directions = directions + math.sqrt(noise_) * (mean + shift) * _signs(directions, dims)
            return Moments.along(gain * mean, directions, rest.clamp_min(0))
        return Moments.along(gain * mean, directions, (rest + square).clamp_min(0))
    total = scale**2 * keep * variance + square
    if not dims or not is_tracked():
        return Moments(gain * mean, total, None if shared is None else gain**2 * shared)
    level = (mean.to(variance.dtype) + shift).mean(sorted(dims), keepdim=True)
    common = shared_along(MomentTensors(mean, variance, shared), dims)
    added = noise_ * level.square()
    return Moments(gain * mean, total, added if common is None else scale**2 * keep * common + added)


def _signs(directions: Tensor, dims: set[int]) -> Tensor:
    count, *sizes = directions.shape
    shape = [1 if d - len(sizes) in dims else size for d, size in enumerate(sizes)]
    drawn = noise.many_signs(count, tuple(shape), device=directions.device, dtype=directions.dtype)
    return torch.stack(list(drawn)) * count**-0.5


def _rule(keeps_statistics: bool, units: Callable[[int], int] | None) -> Callable[..., Any]:
    @follows_directions
    def rule(input: Any, p: float = 0.5, training: bool = not keeps_statistics, inplace: bool = False) -> Any:
        if not training or p == 0:
            return input
        x = known(input)
        num_units = None if units is None else units(input.dim())
        if p == 1:
            result = input * 0.0
        elif keeps_statistics:
            result = masked(x, 1 - p, 1 / math.sqrt((1 - p) * (1 + p * _ALPHA**2)), _ALPHA, num_units)
        else:
            result = masked(x, 1 - p, 1 / (1 - p), 0.0, num_units)
        return input.copy_from(result) if inplace else result

    return rule


def _called_by_position(rule: Callable[..., Any], inplace: bool) -> Callable[..., Any]:
    def called(input: Any, p: float, train: bool) -> Any:
        return rule(input, p, train, inplace)

    return follows_directions(called)


def _two(_: int) -> int:
    return 2


def _two_if_batched(num_spatial: int) -> Callable[[int], int]:
    return lambda num_dims: 2 if num_dims == num_spatial + 2 else 1


register_rule(F.dropout1d)(_rule(False, _two_if_batched(1)))
register_rule(F.dropout2d)(_rule(False, _two))
register_rule(F.dropout3d)(_rule(False, _two_if_batched(3)))
for _name, _made in (
    ("dropout", _rule(False, None)),
    ("feature_dropout", _rule(False, _two)),
    ("alpha_dropout", _rule(True, None)),
    ("feature_alpha_dropout", _rule(True, _two)),
):
    register_rule(getattr(torch, _name))(_called_by_position(_made, inplace=False))
    register_rule(getattr(torch, f"{_name}_"))(_called_by_position(_made, inplace=True))
    if hasattr(F, _name):
        register_rule(getattr(F, _name))(_made)
