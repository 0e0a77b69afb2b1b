"""The best scale of a group of weights, in closed form: empirical Bayes, and under a half-Cauchy prior of the scale.

n weights N(0, u) with posteriors of second moments e = m^2 + s^2, E = sum(e), and the scale sqrt(u) ~ C+(0, tau), of
density 2 tau / (pi (tau^2 + u)). What depends on u, its KL and its prior, is

    n/2 ln u + E / (2 u) + ln(1 + k u)    nats,    k = 1 / tau^2,

the mode of the scale itself (of its logarithm there would be n - 1 for n, and the prior would draw small scales up to
tau; so it only ever shrinks). It is convex in ln u, and smallest at the one positive root of

    (n + 2) k u^2 + (n - k E) u - E = 0,

which is E / n for k = 0 (no prior: automatic relevance determination), and goes to E / (n + 2) for u far above tau^2:
as a point estimate the half-Cauchy density is worth two more weights of zero.
"""

import torch
from torch import Tensor

from bayesprune.priors.base import TINY

_NUM_STEPS = 20  # of `best_shrinkage`, each of which about halves what is left


def best_variance(energy: Tensor, count: Tensor | float, shrinkage: Tensor | float) -> Tensor:
    """The u of each group with this E, n and k; next to nothing where n is 0. n may be a sum of probabilities."""
    count = count.clamp_min(TINY) if isinstance(count, Tensor) else count
    if isinstance(shrinkage, Tensor):
        shrinkage = shrinkage.clamp_min(TINY)
    elif shrinkage == 0:
        return (energy / count).clamp_min(TINY)
    linear = count - shrinkage * energy
    root = (linear.square() + 4 * (count + 2) * shrinkage * energy).clamp_min(TINY).sqrt()
    small = 2 * energy / (linear.abs() + root)  # each form where it does not subtract nearly equal numbers
    large = (linear.abs() + root) / (2 * (count + 2) * shrinkage)
    return torch.where(linear > 0, small, large).clamp_min(TINY)


def shrinkage_step(variance: Tensor, shrinkage: Tensor, present: Tensor) -> Tensor:
    """A better k for scales at these u, (): the maximum likelihood of tau is where the mean of 1 / (1 + k u) is 1/2.

    sum[ ln(tau^2 + u) - ln tau ] is bounded from above by a line in tau^2 through the present value, which gives
    tau^2 = sum(w u) / sum(w) with w = 1 / (tau^2 + u); no step makes it worse.
    """
    weights = present / (1 + shrinkage * variance)
    return weights.sum().clamp_min(TINY) / (weights * variance).sum().clamp_min(TINY)


def best_shrinkage(energy: Tensor, count: Tensor | float, present: Tensor) -> Tensor:
    """The k of groups that share it, where k and the scales are at their best together, ()."""
    variance = best_variance(energy, count, 0.0)
    shrinkage = shrinkage_step(variance, torch.zeros_like(variance), present)
    for _ in range(_NUM_STEPS):
        shrinkage = shrinkage_step(best_variance(energy, count, shrinkage), shrinkage, present)
    return shrinkage
