"""Slow references, written independently of the library: what its fast paths are compared with."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

STANDARD_ERRORS = 5


def linear_map(function: Callable[..., Tensor], *parameters: Tensor) -> list[Tensor]:
    """The Jacobian of a function that is linear in its parameters: for each parameter (num_outputs, numel)."""
    jacobians = torch.autograd.functional.jacobian(function, parameters)
    num_outputs = function(*parameters).numel()
    return [jacobian.reshape(num_outputs, -1) for jacobian in jacobians]


def output_covariance(function: Callable[..., Tensor], means: Iterable[Tensor], stds: Iterable[Tensor]) -> Tensor:
    """Covariance of all outputs of `function`, linear in parameters that are independent Gaussians."""
    means = list(means)
    variances = [std.double().expand(mean.shape).reshape(-1).square() for mean, std in zip(means, stds, strict=True)]
    pairs = zip(linear_map(function, *means), variances, strict=True)
    return sum((jacobian * variance) @ jacobian.T for jacobian, variance in pairs)


def assert_covariance(samples: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Mean and second moments of samples (S, D) agree with these to five standard errors; prints the z-scores."""
    deviations = samples - mean
    squares = deviations.square()
    covariance_found = deviations.T @ deviations / len(samples)
    spread = (squares.T @ squares / len(samples) - covariance_found.square()).clamp_min(0).sqrt()
    _assert_close("mean", deviations.mean(0), deviations.std(0), len(samples))
    _assert_close("covariance", covariance_found - covariance, spread, len(samples))


def _assert_close(name: str, error: Tensor, spread: Tensor, num_samples: int) -> None:
    assert (spread > 0).any(), f"{name}: nothing varies"
    z = error.abs() / (spread / num_samples**0.5 + 1e-9 * spread.max())
    print(f"{name}: largest |z| {z.max():.2f} of {z.numel()}")
    assert z.max() < STANDARD_ERRORS, f"{name}: |z| = {z.max():.2f}"


def assert_mean(samples: Tensor, expected: float, name: str = "mean") -> None:
    """The mean of independent samples agrees with `expected` to five standard errors; prints the z-score."""
    samples = samples.double().flatten()
    z = float((samples.mean() - expected) / (samples.std() / samples.numel() ** 0.5))
    print(f"{name}: z = {z:.2f}")
    assert abs(z) < STANDARD_ERRORS, f"{name}: z = {z:.2f}, mean {samples.mean():.4g}, expected {expected:.4g}"


def gaussian_kl(mean: Tensor, std: Tensor, scale: Tensor | float, center: Tensor | float = 0.0) -> Tensor:
    """KL(N(mean, std^2) || N(center, scale^2)) of every weight, by torch.distributions in float64."""
    mean = mean.double()
    prior = Normal(torch.as_tensor(center, dtype=torch.float64), torch.as_tensor(scale, dtype=torch.float64))
    return kl_divergence(Normal(mean, std.double().expand(mean.shape)), prior)


def log_uniform_approximation(mean: float, std: float) -> float:
    """Eq. 14 of Molchanov et al. (2017), negated, in plain Python."""
    alpha = std**2 / mean**2
    gate = 1 / (1 + math.exp(-(1.87320 + 1.48695 * math.log(alpha))))
    return -(0.63576 * gate - 0.5 * math.log(1 + 1 / alpha) - 0.63576)


def log_uniform_exact(alpha: float) -> float:
    """KL of N(m, alpha m^2) from p(|w|) ~ 1/|w|, with the constant that makes it vanish for a large alpha.

    E ln |1 + sqrt(alpha) eps| is half the expected log of a noncentral chi-square variable of one degree of freedom, a
    Poisson mixture of digamma values.
    """
    rate = 0.5 / alpha
    width = 12 * math.sqrt(rate) + 40
    j = torch.arange(max(0, math.floor(rate - width)), math.ceil(rate + width), dtype=torch.float64)
    poisson = (j * math.log(rate) - rate - torch.lgamma(j + 1)).exp()
    expected_log = 0.5 * (math.log(2 * alpha) + float((poisson * torch.digamma(j + 0.5)).sum()))
    expected_log_of_noise = -0.5 * (float(-torch.digamma(torch.ones((), dtype=torch.float64))) + math.log(2))
    return -0.5 * math.log(alpha) + expected_log - expected_log_of_noise


def best_scale(mean: Tensor, std: Tensor) -> float:
    """The scale of a zero-centred Gaussian prior that minimises the KL of these weights, by golden-section search."""
    low, high, ratio = math.log(1e-4), math.log(1e4), (math.sqrt(5) - 1) / 2

    def objective(log_scale: float) -> float:
        return float(gaussian_kl(mean, std, math.exp(log_scale)).sum())

    for _ in range(100):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if objective(left) < objective(right) else (left, high)
    return math.exp((low + high) / 2)


class HandMadeAdam:
    """Adam as Kingma and Ba (2015) write it, one tensor."""

    def __init__(self, lr: float) -> None:
        self.lr, self.t, self.first, self.second = lr, 0, 0.0, 0.0

    def moved(self, value: Tensor, gradient: Tensor) -> Tensor:
        """`value` after one more step."""
        self.t += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        corrected = self.first / (1 - 0.9**self.t)
        return value - self.lr * corrected / ((self.second / (1 - 0.999**self.t)) ** 0.5 + 1e-8)
