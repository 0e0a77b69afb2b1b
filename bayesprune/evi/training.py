"""The paper's training and self-compression: the likelihood under the propagated probabilities, its KLs, the rounds.

Sources: Dera et al. (MLSP 2019); the authors' MNIST code (`EVI_CNN_mnist.py`).

Source: Carannante, Dera, Rasool, Bouaynaya, *Self-Compression in Bayesian Neural Networks* (2020), which ranks kernels
by the Frobenius norm of their mean.
"""

import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesprune.convert import to_variational
from bayesprune.evi.propagation import propagate
from bayesprune.layers import named_posteriors
from bayesprune.priors import BoundGaussian
from bayesprune.prune import smallest_within
from bayesprune.prune.search import Compression

PUBLISHED_KL_WEIGHTS = MappingProxyType({"mnist": 0.002, "cifar10": 1e-5})
"""Weight of the KL in the authors' published runs, whose loss is a mean per example."""

_CERTAIN_LOG_STD = -20.0  # std 2e-9, the least that `attach` allows: nothing beside any bias in float32


def convert(model: nn.Module, *, relative_std: float = 0.1) -> nn.Module:
    """The model with one variance for each kernel and output unit and none for biases, as in the paper; in place.

    This is `to_variational(model, std="per_channel")` with the stds of the biases fixed at zero to float32's precision.
    The log std is the parameter, where the authors take softplus(rho) as the variance.

    Args:
        model: As for `to_variational`.
        relative_std: Initial std as a fraction of the root mean square of the layer's weights.
    """
    to_variational(model, std="per_channel", relative_std=relative_std)
    for posterior in named_posteriors(model):
        if not posterior.is_weight:
            for part in posterior.log_std_parts:
                part.data.fill_(_CERTAIN_LOG_STD)
                part.requires_grad_(False)
    return model


def gaussian_nll(mean: Tensor, covariance: Tensor, target: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """Negative log-likelihood of one-hot labels under a Gaussian on the probabilities, in nats, (N,).

    0.5 (y - p)^T (S + ridge I)^-1 (y - p) + 0.5 ln det(S + ridge I), without the constant C/2 ln(2 pi): it goes down to
    C/2 ln(ridge). The authors' code also clips entries of S below 1e-10, which drops negative covariances; this does
    not.

    Args:
        mean: Probabilities p (N, C).
        covariance: Their covariance S (N, C, C).
        target: Labels (N,), integers.
        ridge: Added to the diagonal, since S has no full rank.
    """
    num_classes = mean.shape[1]
    factor = torch.linalg.cholesky(covariance + ridge * torch.eye(num_classes, dtype=mean.dtype, device=mean.device))
    residual = (F.one_hot(target, num_classes).to(mean.dtype) - mean).unsqueeze(2)
    whitened = torch.linalg.solve_triangular(factor, residual, upper=False).squeeze(2)
    return 0.5 * whitened.square().sum(1) + factor.diagonal(dim1=1, dim2=2).log().sum(1)


def gaussian_kl(model: nn.Module) -> Tensor:
    """KL divergence of all weights from the prior N(0, I), in nats: a scalar.

    Per kernel of n weights with mean M and variance s: 0.5 (n s + |M|^2 - n - n ln s), as in the paper's text, summed
    over the kernels. Biases do not count.
    """
    prior = BoundGaussian(1.0)
    weights = (posterior for posterior in named_posteriors(model) if posterior.is_weight)
    return torch.stack([prior.kl(w.mean, w.log_std, w.mask) for w in weights]).sum()


def published_kl(model: nn.Module) -> Tensor:
    """The complexity term of the authors' MNIST code, in its units: a scalar.

    Per layer 0.5 mean_k(sum|M| + n s_k - n - n ln s_k), where sum|M| is over *all* kernels of the layer and the rest is
    a mean over kernels. It is no KL divergence: the means are under an L1 penalty, and a kernel's variance counts less
    the more kernels there are.
    """
    terms = []
    for w in named_posteriors(model):
        if not w.is_weight:
            continue
        num_units = math.prod(w.mean.shape[dim] for dim in w.unit_dims)
        spread = 0.5 * ((2 * w.log_std).exp() - 1 - 2 * w.log_std).expand(w.mean.shape)
        size = 0.5 * w.mean.abs()
        terms.append(((spread / num_units + size) * (1 if w.mask is None else w.mask)).sum())
    return torch.stack(terms).sum()


def loss(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    covariance: Literal["diagonal", "spatial"] = "diagonal",
    kl: Callable[[nn.Module], Tensor] = gaussian_kl,
    tau: float = PUBLISHED_KL_WEIGHTS["mnist"],
    ridge: float = 1e-3,
) -> Tensor:
    """The paper's objective: mean Gaussian negative log-likelihood + tau * KL; a scalar for `backward`.

    It contains the KL, so train all parameters, stds too, with an ordinary optimizer and without `attach`.

    Args:
        model: A variational classifier, from `convert` say.
        x: Inputs.
        target: Labels (N,).
        covariance: As for `propagate`.
        kl: `gaussian_kl` (the text's) or `published_kl` (the code's).
        tau: Weight of the KL; `PUBLISHED_KL_WEIGHTS` has the published values.
        ridge: As for `gaussian_nll`.
    """
    mean, variance = propagate(model, x, covariance=covariance)
    return gaussian_nll(mean, variance, target, ridge=ridge).mean() + tau * kl(model)


@torch.no_grad()
def kernel_norm(group: Any) -> Tensor:
    """The paper's criterion, for `prune_channels` and `smallest_within`: Frobenius norm of each kernel's mean, (C,).

    Args:
        group: A dependency group of torch-pruning; its first layer is the one whose kernels are ranked.
    """
    layer, channels = group[0].dep.layer, group[0].idxs
    return layer.weight[channels].flatten(1).norm(dim=1)


def self_compress(
    model: nn.Module,
    example_inputs: Any,
    *,
    train: Callable[[nn.Module], object],
    evaluate: Callable[[nn.Module], float],
    tolerance: float,
    importance: Any = kernel_norm,
    **options: Any,
) -> Compression:
    """Trains, then removes kernels and trains on, while the validation score stays within the tolerance.

    It is `smallest_within` behind a first training, with the paper's criterion.

    Args:
        model: A network to start from; it is trained in place.
        example_inputs: Inputs of the model's forward, for counting and tracing.
        train: Trains a model in place, with an optimizer of its own: before the first cut and after each.
        evaluate: Score on validation data, higher is better; never the test split.
        tolerance: Largest loss of that score that is accepted, in its own unit.
        importance: `kernel_norm`, `bayesprune.SNRImportance()`, or another criterion of `prune_channels`.
        **options: Further options of `smallest_within` (`step`, `min_step`, `reference`, ...).
    """
    train(model)
    return smallest_within(
        model,
        example_inputs,
        evaluate=evaluate,
        tolerance=tolerance,
        fine_tune=train,
        importance=importance,
        **options,
    )
