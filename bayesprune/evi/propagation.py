"""Mean and covariance of the class probabilities in one pass."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bayesprune.evi import spatial
from bayesprune.moments import parts, settings
from bayesprune.prediction.predict import sampling


class ClassMoments(NamedTuple):
    """Class probabilities under the posterior, to first order.

    Attributes:
        mean: (N, C), the softmax of the mean logits.
        covariance: (N, C, C), of rank C - 1 at most, since probabilities sum to one.
    """

    mean: Tensor
    covariance: Tensor


def propagate(model: nn.Module, x: Tensor, *, covariance: Literal["diagonal", "spatial"] = "diagonal") -> ClassMoments:
    """Mean and covariance of the class probabilities, by the paper's first-order rules; differentiable.

    With J = diag(p) - p p^T the softmax takes the covariance S of the logits to J S J^T.

    Args:
        model: A variational classifier whose output are logits (N, C). It runs in the mode that it is in.
        x: Inputs, certain.
        covariance: "diagonal": variances only, through any model that `bayesprune.moments` knows; logits are taken as
            uncorrelated. "spatial": the full covariance between the positions of each channel, and between logits,
            through an `nn.Sequential` of convolutions, activations, max-pooling, dropout and linear layers with one
            std per kernel.

    Raises:
        ValueError: the covariance is unknown or the model has no variational layer.
        UnsupportedModelError: "spatial", and the model is not such a chain.
        UnsupportedFunctionError: "diagonal", and the model calls a function that has no rule.
    """
    if covariance == "spatial":
        mean, logit_covariance = spatial.logit_moments(model, x)
    elif covariance == "diagonal":
        mean, logit_covariance = _diagonal(model, x)
    else:
        raise ValueError(f'covariance is {covariance!r}; expected "diagonal" or "spatial".')
    probabilities = mean.softmax(-1)
    slope = torch.diag_embed(probabilities) - probabilities.unsqueeze(2) * probabilities.unsqueeze(1)
    return ClassMoments(probabilities, slope @ logit_covariance @ slope)


def _diagonal(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with sampling(model, "moments"), settings(covariance="diagonal", taylor=True):
        mean, variance, _ = parts(model(x))
    return mean, torch.diag_embed(torch.zeros_like(mean) if variance is None else variance)
