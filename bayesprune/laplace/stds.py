"""From the precision of every weight to the stds of a layer, whatever their structure."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bayesprune.errors import UnsupportedModelError
from bayesprune.layers import Posterior
from bayesprune.priors import BoundGaussian, BoundPrior, Gaussian, Prior
from bayesprune.train.kl import bind_prior

_MAX_SWEEPS, _TOLERANCE = 200, 1e-7


def collapse(precision: Tensor, shapes: Sequence[tuple[int, ...]], keep: Tensor | None = None) -> list[Tensor]:
    """Log stds of these shapes, whose broadcast sum l is the best structured fit to independent Gaussians.

    Best is the smallest KL(q || p) of q = N(m, exp(2 l)) from p = N(m, 1 / precision), the direction of variational
    inference: with t = exp(2 l) precision it is 1/2 sum[ t - 1 - ln t ] nats. Its derivative by one number of one part
    is the sum of (t - 1) over the weights that share it, so t has mean 1 over them:

    - per weight: t = 1, the variance is 1 / precision.
    - per channel: the variance is 1 / (mean precision of the channel).
    - rank one: t has mean 1 over each row and over each column, which alternating between rows and columns reaches
      (Sinkhorn's scaling of a positive matrix; the KL is convex in the log stds). Only the sum of the parts is unique.

    Args:
        precision: Precision of every weight, positive.
        shapes: Shape of each part, 1 in the dimensions along which a number is shared.
        keep: True for the weights that count; None is all. Numbers that no kept weight shares are NaN.
    """
    precision = precision.double()
    counted = torch.ones_like(precision) if keep is None else keep.to(precision)
    counts = [counted.sum_to_size(shape) for shape in shapes]
    parts = [torch.zeros_like(count) for count in counts]
    for _ in range(_MAX_SWEEPS if len(parts) > 1 else 1):
        change = 0.0
        for index, part in enumerate(parts):
            others = sum((other for i, other in enumerate(parts) if i != index), start=precision.new_zeros(()))
            scaled = (precision * (2 * others).exp() * counted).sum_to_size(part.shape)
            parts[index] = torch.where(counts[index] > 0, -0.5 * (scaled / counts[index]).log(), 0.0)
            change = max(change, float((parts[index] - part).abs().max()))
        if change < _TOLERANCE:
            break
    return [part.masked_fill(count == 0, torch.nan) for part, count in zip(parts, counts, strict=True)]


@torch.no_grad()
def set_precision(posterior: Posterior, precision: Tensor) -> None:
    """Sets the stds of a posterior to the best fit of its structure, in place; those of removed weights stay."""
    stds = posterior.log_std_parts
    fitted = collapse(precision, [tuple(part.shape) for part in stds], posterior.mask)
    for part, values in zip(stds, fitted, strict=True):
        part.copy_(torch.where(values.isnan(), part, values.to(part)))


def prior_precisions(model: nn.Module, prior: Prior | None) -> dict[Posterior, float]:
    """1 / variance of the prior of every posterior; None is `Gaussian("layer_rms")`.

    Raises:
        ValueError: the model has no variational layer.
        UnsupportedModelError: the prior is not Gaussian.
    """
    bound = bind_prior(model, Gaussian() if prior is None else prior)
    return {posterior: _precision(posterior.name, its) for posterior, its in bound.items()}


def _precision(name: str, prior: BoundPrior) -> float:
    if not isinstance(prior, BoundGaussian):
        raise UnsupportedModelError(
            f"the prior of {name} is {type(prior).__name__}, which has no precision of its own; expected "
            "priors.Gaussian."
        )
    return prior.scale**-2
