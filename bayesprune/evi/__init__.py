"""Extended variational inference by name: the training and the self-compression of the paper this library started from.

Sources: Dera, Rasool, Bouaynaya, *Extended Variational Inference for Propagating Uncertainty in Convolutional Neural
Networks* (MLSP 2019), with the authors' code (github.com/dimahdera/Variational-Density-Propagation-CNN-MNIST);
Carannante, Dera, Rasool, Bouaynaya, *Self-Compression in Bayesian Neural Networks* (2020, arXiv:2111.05950).
What differs: stds are parametrised by their log where the authors take softplus(rho) as the variance, batches are
propagated at once, and the full spatial covariance is kept as a product of factors.
"""

from bayesprune.evi.propagation import ClassMoments, propagate
from bayesprune.evi.training import (
    PUBLISHED_KL_WEIGHTS,
    convert,
    gaussian_kl,
    gaussian_nll,
    kernel_norm,
    loss,
    published_kl,
    self_compress,
)

__all__ = [
    "PUBLISHED_KL_WEIGHTS",
    "ClassMoments",
    "convert",
    "gaussian_kl",
    "gaussian_nll",
    "kernel_norm",
    "loss",
    "propagate",
    "published_kl",
    "self_compress",
]
