"""The KL divergence of a model's posterior from its prior: the complexity term of the ELBO."""

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayesprune.foundation.kinds import kind_of
from bayesprune.foundation.sharding import full_tensor
from bayesprune.layers import Posterior, holders_of, named_posteriors
from bayesprune.priors import Binding, BoundDependency, BoundPrior, Gaussian, Prior, refresh
from bayesprune.train.complexity import Complexity, complexity_of


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
    complexity = complexity_of(model)
    return complexity.kl(bind_prior(model, Gaussian() if prior is None else prior, complexity))


def bind_prior(model: nn.Module, prior: Prior, complexity: Complexity | None = None) -> dict[Posterior, BoundPrior]:
    """The prior of every posterior of the model, its constants fixed from now on.

    Args:
        model: A variational model.
        prior: The family.
        complexity: The complexity term of the model; None looks for it.

    Raises:
        ValueError: the model has no variational layer.
    """
    posteriors = list(named_posteriors(model))
    if not posteriors:
        raise ValueError("the model has no variational layer; call to_variational first.")
    sizes = _sizes(model)
    bindings = [_binding(posterior, sizes) for posterior in posteriors]
    bound = dict(zip(posteriors, prior.bind_all(bindings), strict=True))
    refresh_scales(bound, (complexity or complexity_of(model)).keep, until_rest=True)
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


class _Size(NamedTuple):
    """Sum of the squares of a tensor's weights, and how many are kept."""

    energy: float
    num_kept: float


def _sizes(model: nn.Module) -> dict[int, _Size]:
    """Those of all posterior means, by the mean's id; the device is waited for once."""
    energies: dict[int, Tensor] = {}
    counts: dict[int, Tensor] = {}
    sizes: dict[int, int] = {}
    for key, ((layer, name), *_) in holders_of(model).items():
        mean, mask = getattr(layer, name).detach(), layer.mask(name, whole=True)
        energies[key], sizes[key] = full_tensor(mean.double().square().sum()), mean.numel()
        if mask is not None:
            counts[key] = mask.sum().double()
    waiting = [*energies.values(), *counts.values()]
    numbers = torch.stack([number.to(waiting[0].device) for number in waiting]).tolist()
    kept = sizes | dict(zip(counts, numbers[len(energies) :], strict=True))
    return {key: _Size(energy, kept[key]) for key, energy in zip(energies, numbers, strict=False)}


def _binding(posterior: Posterior, sizes: Mapping[int, _Size]) -> Binding:
    layer, mean = posterior.layer, posterior.mean
    weights = [name for name in layer.active_names() if layer.is_weight(name)]
    scale = _rms([sizes[id(mean)]])
    if not posterior.is_weight:
        scale = max(scale, _rms([sizes[id(getattr(layer, name))] for name in weights]))
    kind = kind_of(posterior.layer)
    return Binding(
        mean=mean,
        layer_rms=scale or getattr(layer, weights[0])[0].numel() ** -0.5,
        unit_dims=posterior.unit_dims,
        input_dims=kind.input_dims if posterior.is_weight else (),
        num_blocks=kind.num_input_blocks if posterior.is_weight else 1,
        name=posterior.name,
    )


def _rms(sizes: Sequence[_Size]) -> float:
    """Root mean square of the weights that are kept."""
    return (sum(size.energy for size in sizes) / max(sum(size.num_kept for size in sizes), 1)) ** 0.5
