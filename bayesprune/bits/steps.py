"""Step sizes out of a posterior, and widths in bits.

Rounding to a grid of step D moves a weight by D^2 / 12 on average of the square, which costs D^2 / (24 sigma^2) nats of
log-likelihood where the posterior has the std sigma. The fewest symbols for a given loss are those for which a weight
costs the same in every tensor, kappa / 2:

    D^2 = 12 kappa / mean(1 / sigma^2),

the mean over the weights of the tensor, or of an output channel. So one number sets all steps of a model.

Steps have eight significant bits, or as many as the integers leave of those of the tensor's dtype, but one at least:
products with the integers are then exact, and whoever reads the tensor finds its grid again.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesprune.storage.coding import as_integers

MAX_INTEGER = 2047
"""Of the integers that stand for weights, so that there are fewer than 4,096; 255 in bfloat16."""

_CLIPS = torch.linspace(1, 0.3, 15, dtype=torch.double)
_SMALLEST_STEP = 2.0**-100


@dataclass(frozen=True)
class Grid:
    """Where the weights of a tensor may stand: step times -limit to limit.

    Attributes:
        step: float64, broadcastable to the tensor.
        limit: The largest integer.
    """

    step: Tensor
    limit: int = MAX_INTEGER


def posterior_grid(mean: Tensor, precision: Tensor, kept: Tensor, kappa: float, dims: tuple[int, ...]) -> Grid:
    """The grid on which rounding costs kappa / 2 nats a weight.

    Args:
        mean: The weights, in the dtype in which they are stored.
        precision: 1 / sigma^2 of each.
        kept: Which are not zero for good.
        kappa: Twice the nats.
        dims: Dimensions along which steps differ: none, or those that number output channels.
    """
    step = (12 * kappa / _mean(precision, kept, dims)).sqrt()
    largest, limit = _largest(mean, kept, dims), _max_integer(mean.dtype)
    return Grid(_short(torch.maximum(step, largest / limit), limit, mean.dtype), limit)


def width_grid(mean: Tensor, precision: Tensor, kept: Tensor, width: int, dims: tuple[int, ...]) -> Grid:
    """The grid of 2^width - 1 places about zero with the least error, weighed by the precision; outside it is clipped.

    Args:
        mean, precision, kept, dims: As for `posterior_grid`.
        width: In bits, 2 at least; there are no more places than the dtype has exact integers.
    """
    limit = min(2 ** (width - 1) - 1, _max_integer(mean.dtype))
    largest = _largest(mean, kept, dims)
    weights = torch.where(kept, precision, 0.0).double()
    best, errors = None, None
    for clip in _CLIPS:
        step = _short(clip * largest / limit, limit, mean.dtype)
        rounded = (mean.double() / step).round().clamp(-limit, limit) * step
        error = (weights * (mean - rounded).square()).sum_to_size(step.shape)
        if best is None or errors is None:
            best, errors = step, error
        else:
            best, errors = torch.where(error < errors, step, best), torch.minimum(error, errors)
    assert best is not None, "there are clips to try"
    return Grid(best, limit)


def finer_grid(grid: Grid, extra: int) -> Grid:
    """The grid with so many bits more: steps halved as often, over the same range."""
    return Grid(grid.step / 2**extra, grid.limit * 2**extra)


def grid_of(values: Tensor) -> Grid | None:
    """The grid on which the values of a tensor on the CPU stand, as many places as its width in bits has."""
    parts = as_integers(values)
    if parts is None:
        return None
    width = (2 * int(parts[0].abs().max())).bit_length()
    return Grid(parts[1], 2 ** (width - 1) - 1)


def width_of(name: str, bits: int | Mapping[str, int]) -> int | None:
    """The width of a tensor: that of the longest prefix of its name; None where there is none."""
    if isinstance(bits, int):
        return bits
    found = [prefix for prefix in bits if name == prefix or not prefix or name.startswith(f"{prefix}.")]
    return bits[max(found, key=len)] if found else None


def _mean(values: Tensor, kept: Tensor, dims: tuple[int, ...]) -> Tensor:
    shape = _shape(values, dims)
    total = torch.where(kept, values.double(), 0.0).sum_to_size(shape)
    return total / kept.double().sum_to_size(shape).clamp_min(1)


def _largest(mean: Tensor, kept: Tensor, dims: tuple[int, ...]) -> Tensor:
    others = [dim for dim in range(mean.dim()) if dim not in dims]
    values = torch.where(kept, mean.abs().double(), 0.0)
    return values.amax(others, keepdim=True) if others else values


def _shape(values: Tensor, dims: tuple[int, ...]) -> list[int]:
    return [size if dim in dims else 1 for dim, size in enumerate(values.shape)]


def _max_integer(dtype: torch.dtype) -> int:
    return min(MAX_INTEGER, 2 ** _significant_bits(dtype) - 1)


def _significant_bits(dtype: torch.dtype) -> int:
    return 1 - round(math.log2(torch.finfo(dtype).eps))


def _short(step: Tensor, limit: int, dtype: torch.dtype) -> Tensor:
    """The steps with so few significant bits that products with integers up to the limit are exact; 8 at most.

    Fewer than eight are rounded up, so that the largest weights are not clipped.
    """
    bits = max(1, min(8, _significant_bits(dtype) - limit.bit_length()))
    smallest = max(_SMALLEST_STEP, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * 2 ** (bits - 1))
    eight = step.nan_to_num(1.0, 1.0, 1.0).clamp_min(smallest).to(torch.bfloat16).double()
    mantissas, exponents = torch.frexp(eight)
    return torch.ldexp((mantissas * 2**bits).ceil() / 2**bits, exponents)
