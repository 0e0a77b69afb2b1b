"""How one forward pass of a layer sees the posterior of its weights."""

from bayesprune.estimators.draws import sample
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
    "run",
    "sample",
    "uncertain",
]
