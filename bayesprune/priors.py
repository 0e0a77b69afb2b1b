"""Prior densities over weights and their KL divergence in nats, summed over weights, with closed-form gradients.

A `Prior` is bound to each weight tensor once, when training starts; the bound prior holds that tensor's constants
(a scale, a centre). All densities are elementwise: mean m, std s, sigma^2 = s^2, e = m^2 + s^2.

Sources: Blundell et al., 2015 (Gaussian); Krishnan et al., 2020 (centred on trained weights); MacKay, 1994 (automatic
relevance determination); Molchanov et al., 2017 (log-uniform).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

_TINY = 1e-30  # below any squared weight that float32 training produces; keeps logs and quotients finite


@dataclass(frozen=True)
class Binding:
    """What a prior may know of the tensor it is bound to.

    Attributes:
        mean: The posterior means when training starts.
        layer_rms: Root mean square of the layer's weights; for a bias, at least that of the bias itself.
        unit_dims: Dimensions of the tensor that number output units; empty for a bias.
    """

    mean: Tensor
    layer_rms: float
    unit_dims: tuple[int, ...]


class BoundPrior(ABC):
    """The prior of one tensor. Subclasses are dataclasses whose tensor fields are their state."""

    @abstractmethod
    def kl(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor:
        """KL divergence of the posterior from the prior, in nats, summed over the kept weights: a scalar.

        Args:
            mean: Posterior means.
            log_std: Log stds, broadcastable to `mean`.
            keep: True where the weight has not been removed; None keeps all.
        """

    def kl_gradient(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gradients of `kl` for every weight's mean and log std, both of `mean`'s shape, in nats."""
        with torch.enable_grad():
            mean = mean.detach().requires_grad_()
            log_std = log_std.detach().expand(mean.shape).clone().requires_grad_()
            mean_gradient, std_gradient = torch.autograd.grad(self.kl(mean, log_std, keep), (mean, log_std))
        return mean_gradient, std_gradient

    @property
    def max_log_std(self) -> float:
        """Largest sensible log std: that of the prior itself where it has one."""
        return float("inf")

    def state(self) -> dict[str, Tensor | float]:
        """The constants, by field name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]
        return {name: value for name, value in values if isinstance(value, Tensor | float)}


class Prior(ABC):
    """A family of prior densities; `bind` makes the density of one tensor."""

    @abstractmethod
    def bind(self, binding: Binding) -> BoundPrior:
        """The prior of this tensor."""


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
class ARD(Prior):
    """N(0, s_g^2) with the scale of each group at its best value, s_g^2 = mean(e) (empirical Bayes, closed form).

    Attributes:
        group: What shares a scale: "weight" (strongly sparsifying: the KL is 1/2 ln(1 + SNR^2)), "channel" (an output
            unit) or "layer". A bias is one group, but for "weight".
    """

    group: Literal["weight", "channel", "layer"] = "channel"

    def __post_init__(self) -> None:
        if self.group not in ("weight", "channel", "layer"):
            raise ValueError(f'ARD group is {self.group!r}; expected "weight", "channel" or "layer".')

    def bind(self, binding: Binding) -> "BoundARD":
        """The prior of this tensor."""
        if self.group == "weight":
            return BoundARD(())
        units = binding.unit_dims if self.group == "channel" else ()
        return BoundARD(tuple(dim for dim in range(binding.mean.dim()) if dim not in units))


@dataclass(frozen=True)
class LogUniform(Prior):
    """p(|w|) proportional to 1 / |w|, improper (sparse variational dropout).

    Its KL, up to a constant that makes it vanish for a std far above the mean, is approximate to 0.01 nats a weight.
    """

    def bind(self, binding: Binding) -> "BoundLogUniform":
        """The prior of this tensor; it has no constants."""
        return BoundLogUniform()


@dataclass(frozen=True)
class BoundGaussian(BoundPrior):
    """N(center, scale^2); center None is zero."""

    scale: float
    center: Tensor | None = None

    def kl(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor:
        """1/2 sum[ (m - c)^2 / s_p^2 + s^2 / s_p^2 - 1 - ln(s^2 / s_p^2) ]."""
        distance = mean if self.center is None else mean - self.center
        return _gaussian_kl(distance, log_std, log_std.new_tensor(self.scale).square(), keep)

    def kl_gradient(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """((m - c) / s_p^2, s^2 / s_p^2 - 1)."""
        distance = mean if self.center is None else mean - self.center
        return _gaussian_kl_gradient(distance, log_std, log_std.new_tensor(self.scale).square(), keep)

    @property
    def max_log_std(self) -> float:
        """The log of the scale: data can only make a weight more certain than its prior."""
        return float(torch.tensor(self.scale).log())


@dataclass(frozen=True)
class BoundARD(BoundPrior):
    """N(0, mean(e)) with the mean over `group_dims`; no dimension at all makes every weight its own group."""

    group_dims: tuple[int, ...]

    def kl(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor:
        """1/2 sum_g [ n_g ln mean_g(e) - sum ln s^2 ]: the Gaussian KL at the best scale of each group."""
        return _gaussian_kl(mean, log_std, self._variance(mean, log_std, keep), keep)

    def kl_gradient(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(m / mean_g(e), s^2 / mean_g(e) - 1): at the best scale its own gradient vanishes."""
        return _gaussian_kl_gradient(mean, log_std, self._variance(mean, log_std, keep), keep)

    def _variance(self, mean: Tensor, log_std: Tensor, keep: Tensor | None) -> Tensor:
        e = mean.to(log_std.dtype).square() + (2 * log_std).exp()
        if not self.group_dims:
            return e.clamp_min(_TINY)
        if keep is None:
            return e.mean(self.group_dims, keepdim=True).clamp_min(_TINY)
        count = keep.sum(self.group_dims, keepdim=True).clamp_min(1)
        return ((e * keep).sum(self.group_dims, keepdim=True) / count).clamp_min(_TINY)


@dataclass(frozen=True)
class BoundLogUniform(BoundPrior):
    """The approximation of Molchanov et al. (2017), Eq. 14; a = s^2 / m^2."""

    def kl(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor:
        """-sum[ k1 S(k2 + k3 ln a) - 1/2 ln(1 + 1/a) - k1 ], S the logistic function."""
        log_alpha = _log_alpha(mean, log_std)
        return _kept_sum(
            _K1 * torch.sigmoid(-_K2 - _K3 * log_alpha) + 0.5 * torch.nn.functional.softplus(-log_alpha), keep
        )

    def kl_gradient(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(-2 / m dKL/dln a, 2 dKL/dln a)."""
        log_alpha = _log_alpha(mean, log_std)
        gate = torch.sigmoid(-_K2 - _K3 * log_alpha)
        slope = -_K1 * _K3 * gate * (1 - gate) - 0.5 * torch.sigmoid(-log_alpha)
        mean = mean.to(slope.dtype)
        return _kept(-2 * slope * mean / (mean.square() + _TINY), keep), _kept(2 * slope, keep)


_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695


def _log_alpha(mean: Tensor, log_std: Tensor) -> Tensor:
    return 2 * log_std - (mean.to(log_std.dtype).square() + _TINY).log()


def _gaussian_kl(distance: Tensor, log_std: Tensor, variance: Tensor, keep: Tensor | None) -> Tensor:
    e = distance.to(log_std.dtype).square() + (2 * log_std).exp()
    return 0.5 * _kept_sum(e / variance - 1 - 2 * log_std + variance.log(), keep)


def _gaussian_kl_gradient(
    distance: Tensor, log_std: Tensor, variance: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    std_gradient = ((2 * log_std).exp() / variance - 1).expand(distance.shape)
    return _kept(distance.to(log_std.dtype) / variance, keep), _kept(std_gradient, keep)


def _kept(values: Tensor, keep: Tensor | None) -> Tensor:
    return values if keep is None else values * keep


def _kept_sum(values: Tensor, keep: Tensor | None) -> Tensor:
    return _kept(values, keep).sum()
