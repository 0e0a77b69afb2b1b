"""The KL divergence of a model's posterior from its prior: the complexity term of the ELBO."""

import torch
from torch import Tensor, nn

from bayesprune.layers import Posterior, VariationalLayer, named_posteriors
from bayesprune.layers.sharding import whole
from bayesprune.priors import Binding, BoundPrior, Gaussian, Prior


def kl_divergence(model: nn.Module, prior: Prior | None = None) -> Tensor:
    """KL divergence in nats, summed over all posterior weights: a scalar, differentiable in means and log stds.

    Tied weights count once, removed weights not at all. A prior whose scale is "layer_rms" takes it from the present
    means, as a constant; `attach` fixes it when training starts.

    Args:
        model: A variational model.
        prior: The prior; None is `Gaussian("layer_rms")`.

    Raises:
        ValueError: the model has no variational layer.
    """
    return sum_kl(bind_prior(model, Gaussian() if prior is None else prior))


def bind_prior(model: nn.Module, prior: Prior) -> dict[Posterior, BoundPrior]:
    """The prior of every posterior of the model, its constants fixed from now on.

    Raises:
        ValueError: the model has no variational layer.
    """
    bound = {posterior: prior.bind(_binding(posterior)) for posterior in named_posteriors(model)}
    if not bound:
        raise ValueError("the model has no variational layer; call to_variational first.")
    return bound


def sum_kl(bound: dict[Posterior, BoundPrior]) -> Tensor:
    """KL divergence of these posteriors from their priors, in nats: a scalar."""
    terms = [prior.kl(posterior.mean, posterior.log_std, posterior.mask) for posterior, prior in bound.items()]
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def _binding(posterior: Posterior) -> Binding:
    layer, mean = posterior.layer, posterior.mean
    weights = [name for name in layer.active_names() if getattr(layer, name).dim() > 1]
    scale = _rms(layer, [posterior.parameter])
    if not posterior.is_weight:
        scale = max(scale, _rms(layer, weights))
    return Binding(mean, scale or getattr(layer, weights[0])[0].numel() ** -0.5, posterior.unit_dims)


def _rms(layer: VariationalLayer, names: list[str]) -> float:
    """Root mean square of the weights that are kept."""
    means, masks = [getattr(layer, name).detach() for name in names], [layer.mask(name, whole=True) for name in names]
    count = sum(mean.numel() if mask is None else int(mask.sum()) for mean, mask in zip(means, masks, strict=True))
    return (sum(float(whole(mean.double().square().sum())) for mean in means) / max(count, 1)) ** 0.5
