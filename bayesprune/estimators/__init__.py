"""How one forward pass of a layer sees the posterior of its weights."""

from bayesprune.estimators.draws import has_seeds, sample, sample_together
from bayesprune.estimators.functions import ESTIMATORS, center, check, run, uncertain
from bayesprune.estimators.types import Bilinear, Gaussian, Gradients, LogGaussian, Operation, Posterior, as_gaussian

__all__ = [
    "ESTIMATORS",
    "Bilinear",
    "Gaussian",
    "Gradients",
    "LogGaussian",
    "Operation",
    "Posterior",
    "as_gaussian",
    "center",
    "check",
    "has_seeds",
    "run",
    "sample",
    "sample_together",
    "uncertain",
]
