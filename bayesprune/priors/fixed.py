"""Priors that training does not move: Gaussians and the log-uniform density."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bayesprune.priors.base import TINY, Binding, BoundNormal, BoundPrior, Prior, kept


@dataclass(frozen=True)
class Gaussian(Prior):
    """N(centre, scale^2) for every weight.

    Attributes:
        scale: The std, or "layer_rms": the root mean square of the layer's trained weights (scale-free).
        centered: Whether the centre is the trained weight instead of zero (MOPED). SNR then says nothing about what
            can be removed: a weight that the data does not need stays at its trained value.
    """

    scale: float | Literal["layer_rms"] = "layer_rms"
    centered: bool = False

    def __post_init__(self) -> None:
        if self.scale != "layer_rms" and not (isinstance(self.scale, int | float) and self.scale > 0):
            raise ValueError(f'Gaussian scale is {self.scale!r}; expected a positive number or "layer_rms".')

    def bind(self, binding: Binding) -> "BoundGaussian":
        """The Gaussian of this tensor, its scale and centre fixed from now on."""
        scale = binding.layer_rms if self.scale == "layer_rms" else float(self.scale)
        return BoundGaussian(scale, binding.mean.detach().clone() if self.centered else None)


@dataclass(frozen=True)
class LogUniform(Prior):
    """p(|w|) proportional to 1 / |w|, improper (sparse variational dropout).

    Its KL, up to a constant that makes it vanish for a std far above the mean, is approximate to 0.01 nats a weight.
    """

    def bind(self, binding: Binding) -> "BoundLogUniform":
        """The prior of this tensor; it has no constants."""
        return BoundLogUniform()


@dataclass(frozen=True)
class BoundGaussian(BoundNormal):
    """N(center, scale^2); center None is zero."""

    scale: float
    center: Tensor | None = None

    def variance(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor:
        """The square of the scale."""
        return log_std.new_tensor(self.scale).square()

    @property
    def fixed_variance(self) -> float:
        """The square of the scale."""
        return self.scale**2

    @property
    def max_log_std(self) -> float:
        """The log of the scale: data can only make a weight more certain than its prior."""
        return math.log(self.scale)


@dataclass(frozen=True)
class BoundLogUniform(BoundPrior):
    """The approximation of Molchanov et al. (2017), Eq. 14; a = s^2 / m^2."""

    def kl(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor:
        """-sum[ k1 S(k2 + k3 ln a) - 1/2 ln(1 + 1/a) - k1 ], S the logistic function."""
        log_alpha = _log_alpha(mean, log_std)
        penalty = _K1 * torch.sigmoid(-_K2 - _K3 * log_alpha) + 0.5 * torch.nn.functional.softplus(-log_alpha)
        return kept(penalty, keep).sum()

    def kl_gradient(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(-2 / m dKL/dln a, 2 dKL/dln a)."""
        log_alpha = _log_alpha(mean, log_std)
        gate = torch.sigmoid(-_K2 - _K3 * log_alpha)
        slope = -_K1 * _K3 * gate * (1 - gate) - 0.5 * torch.sigmoid(-log_alpha)
        mean = mean.to(slope.dtype)
        return kept(-2 * slope * mean / (mean.square() + TINY), keep), kept(2 * slope, keep)


_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695


def _log_alpha(mean: Tensor, log_std: Tensor) -> Tensor:
    return 2 * log_std - (mean.to(log_std.dtype).square() + TINY).log()
