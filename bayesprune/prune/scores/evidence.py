"""What the log evidence gains where weights are pinned to zero: a criterion that needs no threshold.

Bayesian model reduction by the Savage-Dickey ratio (Friston & Penny, 2011; Beckers et al., 2022): with the posterior
N(mu, sigma^2) under the prior N(0, s^2), the model in which the weight is exactly zero has a log evidence that is
larger by

    dF = ln q(0) - ln p(0) = 1/2 ln(s^2 / sigma^2) - mu^2 / (2 sigma^2)    nats.

The posterior's weights are independent, so the dF of a group is the sum over its weights. Remove where dF > 0: a weight
with sigma = s / 32 goes if its SNR is below 2.6.

It takes the posterior at its word, so it means nothing
- right after `to_variational`, before training or `fit_laplace`;
- with a temperature below 1: the stds are then those of more data than there is (at 0.1, of ten times the data), and
  with `fit_laplace(num_data=...)` other than the size of the training set;
- with a prior other than the one that the stds were trained under;
- where all that is removed together has a learned scale of its own: with ARD per weight dF = 1/2 [ln(1 + SNR^2) -
  SNR^2] is never above 0, and channels under ARD over dependency groups are alike;
- with a prior that is centred on the trained weights or improper. These and the last are refused.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch_pruning.dependency import Group

from bayesprune.layers import Posterior, VariationalLayer
from bayesprune.priors import ARD, BoundNormal, BoundPrior, Gaussian, GroupLasso, Horseshoe, Prior
from bayesprune.prune.scores.channels import Criterion, removed_weights
from bayesprune.train.kl import bind_prior


def evidence(model: nn.Module, prior: Prior | None = None) -> dict[str, Tensor]:
    """dF in nats of removing each weight alone, by parameter name and of its shape; 0 where it was removed.

    Above 0 the model is better without the weight. See the module's text for when the number means nothing: before
    training, with a temperature below 1, with another prior than that of the training.

    Args:
        model: A variational model.
        prior: The prior of the training; None is `priors.Gaussian("layer_rms")`, of the present weights.

    Raises:
        ValueError: the model has no variational layer, or the prior allows no such comparison.
    """
    prior = _checked(prior)
    return {posterior.name: _evidence(posterior, its) for posterior, its in bind_prior(model, prior).items()}


class EvidenceImportance(Criterion):
    """A torch-pruning importance: -dF in nats, summed over all weights that leave with a channel; below 0 it may go.

    `prune_channels(model, x, "evidence=0")` removes exactly those, with no number to choose. As a ranking for
    another target it is Optimal Brain Damage less what the channel's weights cost in description length.
    Deterministic layers of a group contribute nothing; a group without any variational layer gets None.

    It means nothing before training, with a temperature below 1, or with another prior than that of the training; see
    `evidence`.

    Args:
        prior: The prior of the training; None is `priors.Gaussian("layer_rms")`, of the weights at scoring time.

    Raises:
        ValueError: the prior allows no such comparison.
    """

    target_kind: ClassVar[str | None] = "evidence"

    def __init__(self, prior: Prior | None = None) -> None:
        self.prior = _checked_for_channels(prior)

    @torch.no_grad()
    def scores(self, group: Group) -> Tensor | None:
        """Scores (C,) of the root channels of a dependency group; None where nothing in it is variational."""
        removed = removed_weights(group, self._weight_costs)
        return None if removed is None else removed.score

    def _weight_costs(self, layer: VariationalLayer, name: str) -> Tensor:
        bound = {posterior.parameter: (posterior, its) for posterior, its in bind_prior(layer, self.prior).items()}
        return -_evidence(*bound[name])


@torch.no_grad()
def _evidence(posterior: Posterior, prior: BoundPrior) -> Tensor:
    """dF of each weight."""
    mean, log_std, keep = posterior.mean.double(), posterior.log_std.double(), posterior.mask
    assert isinstance(prior, BoundNormal), "no other prior passes `_checked`"
    variance, prior_variance = (2 * log_std).exp(), prior.variance(mean, log_std, keep)
    change = 0.5 * prior_variance.log() - log_std - 0.5 * mean.square() / variance
    return (change if keep is None else change.masked_fill(~keep, 0)).float()


def _checked(prior: Prior | None) -> Prior:
    prior = Gaussian() if prior is None else prior
    if isinstance(prior, Gaussian) and not prior.centered:
        return prior
    if isinstance(prior, ARD | GroupLasso | Horseshoe) and prior.group != "weight":
        return prior
    raise ValueError(
        f"the evidence cannot be compared under {prior!r}: a scale of its own for every weight never favours removal, "
        "and a prior without density at zero, or around the trained weights, says nothing of it. Expected Gaussian, or "
        'ARD, GroupLasso or Horseshoe over "channel", "input_channel" or "layer".'
    )


def _checked_for_channels(prior: Prior | None) -> Prior:
    prior = _checked(prior)
    if isinstance(prior, ARD | GroupLasso | Horseshoe) and not isinstance(prior.group, str):
        raise ValueError(
            f"the evidence of channels cannot be compared under {type(prior).__name__} over dependency groups: a scale "
            "of its own for all that leaves together never favours removal. Rank channels with SNRImportance, or take "
            'Gaussian, or ARD, GroupLasso or Horseshoe over "channel", "input_channel" or "layer"; `evidence` compares '
            "weights."
        )
    return prior
