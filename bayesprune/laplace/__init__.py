"""Posteriors around trained weights without training (Laplace), and removal as conditioning on zero."""

from bayesprune.laplace.calibration import cross_entropy, output_metric, sampled_cross_entropy
from bayesprune.laplace.compensation import compensate
from bayesprune.laplace.conditioning import condition_on_channels, condition_on_zeros, conditional_mean
from bayesprune.laplace.diagonal import collapse, fit_laplace
from bayesprune.laplace.kronecker import KroneckerFactors, KroneckerPosterior, fit_kronecker, set_marginal_stds
from bayesprune.laplace.running import RunningLaplace, ivon_posterior

__all__ = [
    "KroneckerFactors",
    "KroneckerPosterior",
    "RunningLaplace",
    "collapse",
    "compensate",
    "condition_on_channels",
    "condition_on_zeros",
    "conditional_mean",
    "cross_entropy",
    "fit_kronecker",
    "fit_laplace",
    "ivon_posterior",
    "output_metric",
    "sampled_cross_entropy",
    "set_marginal_stds",
]
