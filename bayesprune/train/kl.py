"""The KL divergence of a model's posterior from its prior: the complexity term of the ELBO."""

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor, nn

from bayesprune.foundation.kinds import kind_of
from bayesprune.foundation.sharding import full_tensor
from bayesprune.layers import Posterior, VariationalLayer, named_posteriors
from bayesprune.priors import Binding, BoundDependency, BoundPrior, Gaussian, Prior, refresh
from bayesprune.train.gates import GateOptimizer


def kl_divergence(model: nn.Module, prior: Prior | None = None) -> Tensor:
    """KL divergence in nats, summed over all posterior weights: a scalar, differentiable in means and log stds.

    Tied weights count once, removed weights not at all, those behind gates as far as the gates are open, which have a
    KL of their own. A prior whose scale is "layer_rms" takes it from the present means, as a constant; `attach` fixes
    it when training starts. Learned scales are at their best for the present posterior; those that an attachment keeps
    across tensors are one step behind it.

    Args:
        model: A variational model.
        prior: The prior; None is `Gaussian("layer_rms")`.

    Raises:
        ValueError: the model has no variational layer.
    """
    gates = GateOptimizer(model)
    return gates.kl(bind_prior(model, Gaussian() if prior is None else prior, gates))


def bind_prior(model: nn.Module, prior: Prior, gates: GateOptimizer | None = None) -> dict[Posterior, BoundPrior]:
    """The prior of every posterior of the model, its constants fixed from now on.

    Args:
        model: A variational model.
        prior: The family.
        gates: Those of the model; None looks for them.

    Raises:
        ValueError: the model has no variational layer.
    """
    posteriors = list(named_posteriors(model))
    if not posteriors:
        raise ValueError("the model has no variational layer; call to_variational first.")
    bound = dict(zip(posteriors, prior.bind_all([_binding(posterior) for posterior in posteriors]), strict=True))
    refresh_scales(bound, (gates or GateOptimizer(model)).keep, until_rest=True)
    return bound


@torch.no_grad()
def refresh_scales(
    bound: dict[Posterior, BoundPrior],
    keep: Callable[[Posterior], Tensor | None] = attrgetter("mask"),
    *,
    until_rest: bool = False,
) -> None:
    """Moves scales that tensors share towards their best for the present posteriors: one step, or until they rest.

    Args:
        bound: The priors of all posteriors of a model.
        keep: How much of each weight counts; by default its mask.
        until_rest: Whether to go on until the scales rest.
    """
    shared = [(p, prior) for p, prior in bound.items() if isinstance(prior, BoundDependency)]
    refresh([(prior, p.mean, p.log_std, keep(p)) for p, prior in shared], until_rest=until_rest)


def collapsed_groups(bound: dict[Posterior, BoundPrior]) -> list[str]:
    """Names of the dependency groups that a prior has switched off altogether."""
    found = (prior.collapsed_groups() for prior in bound.values() if isinstance(prior, BoundDependency))
    return next(found, [])


def _binding(posterior: Posterior) -> Binding:
    layer, mean = posterior.layer, posterior.mean
    weights = [name for name in layer.active_names() if layer.is_weight(name)]
    scale = _rms(layer, [posterior.parameter])
    if not posterior.is_weight:
        scale = max(scale, _rms(layer, weights))
    kind = kind_of(posterior.layer)
    return Binding(
        mean=mean,
        layer_rms=scale or getattr(layer, weights[0])[0].numel() ** -0.5,
        unit_dims=posterior.unit_dims,
        input_dims=kind.input_dims if posterior.is_weight else (),
        num_blocks=kind.num_input_blocks if posterior.is_weight else 1,
        name=posterior.name,
    )


def _rms(layer: VariationalLayer, names: list[str]) -> float:
    """Root mean square of the weights that are kept."""
    means, masks = [getattr(layer, name).detach() for name in names], [layer.mask(name, whole=True) for name in names]
    count = sum(mean.numel() if mask is None else int(mask.sum()) for mean, mask in zip(means, masks, strict=True))
    return (sum(float(full_tensor(mean.double().square().sum())) for mean in means) / max(count, 1)) ** 0.5
