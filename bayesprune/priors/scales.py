"""Densities of a group's scale, and which scale is the best given the posterior.

n weights N(0, u) have posteriors of second moments e = m^2 + s^2, E = sum(e). What depends on u, their KL and the prior
of u, is

    n/2 ln u + E / (2 u) - ln p(u)    nats.

It is convex in ln u for each density here, and u is at its minimum, the mode: a point estimate. Each density has one
number, its rate k, which is 0 for none.

- Flat: u = E / n, automatic relevance determination.
- Half-Cauchy, sqrt(u) ~ C+(0, tau), of density 2 tau / (pi (tau^2 + u)), k = 1 / tau^2. It is the mode of the scale
  itself; of its logarithm there would be n - 1 for n, and the prior would draw small scales up to tau; so it only ever
  shrinks. The minimum is the one positive root of

      (n + 2) k u^2 + (n - k E) u - E = 0,

  which is E / n for k = 0, and goes to E / (n + 2) for u far above tau^2: as a point estimate the half-Cauchy density
  is worth two more weights of zero. With a slab c the weights are N(0, v), 1 / v = 1 / u + 1 / c^2 (Piironen and
  Vehtari, 2017, arXiv 1707.01694).
- Gamma, u ~ Gamma((n + 1) / 2, k / 2), k = lambda^2: with u integrated out the weights of a group have a density
  proportional to exp(-lambda norm(w)), the group lasso (Park and Casella, 2008; Kyung et al., 2010). The mode is

      u = 2 E / (1 + sqrt(1 + 4 k E)).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesprune.priors.base import TINY

_NUM_STEPS = 20  # of `best_rate`, each of which about halves what is left
_NUM_HALVINGS = 48  # of the search for a scale under a slab; a factor of 1e30 to float32's last bit


@dataclass(frozen=True)
class ScaleDensity(ABC):
    """The prior of the variances of groups of weights.

    Attributes:
        rate: The number k; None where it is learned, at its most likely value for the groups that share it.
    """

    rate: float | None

    @abstractmethod
    def variance(self, energy: Tensor, count: Tensor | float, rate: Tensor | float) -> Tensor:
        """The prior variance of the weights of each group with this E, n and k, at its best.

        Next to nothing where n is 0. n may be a sum of probabilities.
        """

    @abstractmethod
    def cost(self, variance: Tensor, count: Tensor | float, rate: Tensor | float) -> Tensor:
        """-ln p of each group's variance in nats, up to what depends on nothing."""

    @abstractmethod
    def better_rate(self, variance: Tensor, count: Tensor | float, rate: Tensor | float, present: Tensor) -> Tensor:
        """A k that is at least as likely for groups with these variances, ()."""

    def best_rate(self, energy: Tensor, count: Tensor | float, present: Tensor) -> Tensor:
        """The k of groups that share it, where k and the variances are at their best together, ()."""
        rate = self.better_rate(energy / _positive(count), count, 0.0, present)
        for _ in range(_NUM_STEPS):
            rate = self.better_rate(self.variance(energy, count, rate), count, rate, present)
        return rate


@dataclass(frozen=True)
class Flat(ScaleDensity):
    """No preference for any scale."""

    rate: float | None = 0.0

    def variance(self, energy: Tensor, count: Tensor | float, rate: Tensor | float) -> Tensor:
        """E / n."""
        return (energy / _positive(count)).clamp_min(TINY)

    def cost(self, variance: Tensor, count: Tensor | float, rate: Tensor | float) -> Tensor:
        """Nothing."""
        return torch.zeros_like(variance)

    def better_rate(self, variance: Tensor, count: Tensor | float, rate: Tensor | float, present: Tensor) -> Tensor:
        """There is none to learn."""
        return variance.new_zeros(())


@dataclass(frozen=True)
class HalfCauchy(ScaleDensity):
    """Half-Cauchy scales; with a slab no weight's prior std exceeds it.

    Attributes:
        slab: c, in the unit of the scales; None for no slab.
    """

    slab: float | None = None

    def variance(self, energy: Tensor, count: Tensor | float, rate: Tensor | float) -> Tensor:
        """The root of the quadratic; under a slab, by bisection."""
        count = _positive(count)
        rate = rate.clamp_min(TINY) if isinstance(rate, Tensor) else max(rate, TINY)
        if self.slab is not None:
            return _below_the_slab(energy, count, rate, self.slab**2)
        linear = count - rate * energy
        root = (linear.square() + 4 * (count + 2) * rate * energy).clamp_min(TINY).sqrt()
        small = 2 * energy / (linear.abs() + root)  # each form where it does not subtract nearly equal numbers
        large = (linear.abs() + root) / (2 * (count + 2) * rate)
        return torch.where(linear > 0, small, large).clamp_min(TINY)

    def cost(self, variance: Tensor, count: Tensor | float, rate: Tensor | float) -> Tensor:
        """ln(1 + k u), relative to the density at zero where k is a constant."""
        cost = (self._scales(variance) * rate).log1p()
        return cost - 0.5 * _like(rate, variance).log() if self.rate is None else cost

    def better_rate(self, variance: Tensor, count: Tensor | float, rate: Tensor | float, present: Tensor) -> Tensor:
        """The maximum likelihood of tau is where the mean of 1 / (1 + k u) is 1/2.

        sum[ ln(tau^2 + u) - ln tau ] is bounded from above by a line in tau^2 through the present value, which gives
        tau^2 = sum(w u) / sum(w) with w = 1 / (tau^2 + u); no step makes it worse.
        """
        scales = self._scales(variance)
        weights = present / (1 + rate * scales)
        return weights.sum().clamp_min(TINY) / (weights * scales).sum().clamp_min(TINY)

    def _scales(self, variance: Tensor) -> Tensor:
        """u of the prior variance."""
        if self.slab is None:
            return variance
        return variance / (1 - variance / self.slab**2).clamp_min(torch.finfo(variance.dtype).eps)


def _below_the_slab(energy: Tensor, count: Tensor | float, rate: Tensor | float, slab: float) -> Tensor:
    """The v in (0, c^2) where n/2 ln v + E / (2 v) + ln(1 + k u) is smallest, u = v / (1 - v / c^2).

    Its slope along ln v rises, since k u is convex in ln v on a logarithmic scale: n/2 - E / (2 v) + k u / (1 + k u) *
    (1 + u / c^2).
    """
    low, high = torch.full_like(energy, math.log(TINY)), torch.full_like(energy, math.log(slab))
    for _ in range(_NUM_HALVINGS):
        middle = 0.5 * (low + high)
        v = middle.exp()
        u = v / (1 - v / slab).clamp_min(torch.finfo(v.dtype).eps)
        slope = 0.5 * count - 0.5 * energy / v + rate * u / (1 + rate * u) * (1 + u / slab)
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
    return (0.5 * (low + high)).exp()


@dataclass(frozen=True)
class Gamma(ScaleDensity):
    """The scales of the group lasso."""

    def variance(self, energy: Tensor, count: Tensor | float, rate: Tensor | float) -> Tensor:
        """2 E / (1 + sqrt(1 + 4 k E))."""
        return (2 * energy / (1 + (1 + 4 * rate * energy).sqrt())).clamp_min(TINY)

    def cost(self, variance: Tensor, count: Tensor | float, rate: Tensor | float) -> Tensor:
        """k u / 2 - (n - 1) / 2 ln u - (n + 1) / 2 ln(k / 2) + ln Gamma((n + 1) / 2)."""
        count, rate = _like(count, variance), _like(rate, variance)
        shape = 0.5 * (count + 1)
        return 0.5 * rate * variance - (shape - 1) * variance.log() - shape * (0.5 * rate).log() + torch.lgamma(shape)

    def better_rate(self, variance: Tensor, count: Tensor | float, rate: Tensor | float, present: Tensor) -> Tensor:
        """sum(n + 1) / sum(u), the most likely k for these variances."""
        return ((_like(count, variance) + 1) * present).sum().clamp_min(TINY) / (variance * present).sum().clamp_min(
            TINY
        )


def _like(number: Tensor | float, other: Tensor) -> Tensor:
    return torch.as_tensor(number, dtype=other.dtype, device=other.device)


def _positive(count: Tensor | float) -> Tensor | float:
    return count.clamp_min(TINY) if isinstance(count, Tensor) else count
