"""Gaussian priors whose scales are learned with the posterior: which weights share one, and what it is.

Every scale is at its best value for the present posterior, so it needs no gradient of its own (envelope theorem).
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from bayesprune.priors.base import Binding, BoundNormal, BoundPrior, Prior, kept, second_moments
from bayesprune.priors.dependency import DependencyGroup, bind_groups
from bayesprune.priors.scales import Flat, Gamma, HalfCauchy, ScaleDensity

Sharing = Literal["weight", "channel", "input_channel", "layer"]
SHARING: tuple[Sharing, ...] = ("weight", "channel", "input_channel", "layer")


@dataclass(frozen=True)
class _Learned(Prior):
    """What ARD, the horseshoe and the group lasso share: what has a scale of its own.

    Attributes:
        group: What shares a scale.
    """

    group: Sharing | Sequence[DependencyGroup] = "channel"

    def __post_init__(self) -> None:
        if isinstance(self.group, str):
            known = self.group in SHARING
        else:
            known = bool(self.group) and all(isinstance(group, DependencyGroup) for group in self.group)
            object.__setattr__(self, "group", tuple(self.group))
        if not known:
            names = ", ".join(f'"{name}"' for name in SHARING)
            raise ValueError(
                f"{type(self).__name__} group is {self.group!r}; expected {names} or what "
                "bayesprune.prune.dependency_groups returns."
            )

    @abstractmethod
    def density(self, layer_rms: float) -> ScaleDensity:
        """The density of the scales in a layer of this size."""

    def bind(self, binding: Binding) -> BoundPrior:
        """The prior of this tensor."""
        if not isinstance(self.group, str):
            return self.bind_all([binding])[0]
        return BoundLearned(_Sums.over(self.group, binding), self.density(binding.layer_rms))

    def bind_all(self, bindings: Sequence[Binding]) -> list[BoundPrior]:
        """The priors of all tensors of a model, in their order; dependency groups are shared among them."""
        if isinstance(self.group, str):
            return super().bind_all(bindings)
        return list(bind_groups(self.group, bindings, self.density(1.0)))


@dataclass(frozen=True)
class ARD(_Learned):
    """N(0, s_g^2) with the scale of each group at its best value, s_g^2 = mean(e) (empirical Bayes, closed form).

    Attributes:
        group: What shares a scale: "weight" (strongly sparsifying: the KL is 1/2 ln(1 + SNR^2)), "channel" (an output
            unit), "input_channel" (all weights that read one input) or "layer"; a bias, or the scale of a norm, is one
            group, but for "weight".
            Or what `bayesprune.prune.dependency_groups` returns: a scale for every unit that leaves together, in all
            layers that lose weights with it. A weight then has the std of its layer at the start, times the scale of
            the unit that it belongs to, times that of the unit that it reads.

    Examples:
        >>> import torch, bayesprune as bp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = bp.to_variational(model)
        >>> prior = bp.priors.ARD(bp.prune.dependency_groups(model, torch.randn(1, 4)))
        >>> attachment = bp.attach(torch.optim.Adam(model.parameters()), model, num_data=1000, prior=prior)
    """

    def density(self, layer_rms: float) -> ScaleDensity:
        """No prior of the scale."""
        return Flat()


@dataclass(frozen=True)
class Horseshoe(_Learned):
    """N(0, s_g^2) with s_g ~ C+(0, tau), a half-Cauchy prior of each group's scale, at its mode given the posterior.

    What a full posterior over the scales would add (Louizos et al., 2017; Ghosh et al., 2018) is not here: as a point
    estimate the squared scale of a group of n weights lies between E / n, that of ARD, and E / (n + 2), for a sum E of
    second moments. So the two differ where groups are small, and hardly for whole channels.

    Attributes:
        group: As for `ARD`.
        global_scale: tau in units of the layer's root mean square when training starts, or "auto": the most likely one
            of the groups that share it, those of a tensor or the units of a dependency group.
        slab: The largest prior std that a weight can have, in the same unit: the regularised horseshoe of Piironen and
            Vehtari (2017), which keeps the weights of groups with a large scale finite. None is no slab. A slab costs
            some fifty passes over the scales in each step.
    """

    global_scale: float | Literal["auto"] = 1.0
    slab: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_global_scale("Horseshoe", self.global_scale)
        if self.slab is not None and not 0 < self.slab < math.inf:
            raise ValueError(f"Horseshoe slab is {self.slab!r}; expected a positive number or None.")

    def density(self, layer_rms: float) -> ScaleDensity:
        """Half-Cauchy with 1 / tau^2, None where it is learned."""
        return HalfCauchy(_rate(self.global_scale, layer_rms), None if self.slab is None else self.slab * layer_rms)


@dataclass(frozen=True)
class GroupLasso(_Learned):
    """N(0, s_g^2) with s_g^2 ~ Gamma((n + 1) / 2, lambda^2 / 2) for a group of n weights, at its mode.

    With the scale integrated out, the weights of a group have a density proportional to exp(-lambda norm(w)): the
    slab of the spike and slab of Jantre, Bhattacharya and Maiti (2023, arXiv 2308.09104). They learn a posterior over
    lambda; here it is fixed, or at its most likely value.

    Attributes:
        group: As for `ARD`.
        global_scale: 1 / lambda in units of the layer's root mean square when training starts, or "auto": the most
            likely one of the groups that share it, which for a single group is about its norm over n.
    """

    global_scale: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_global_scale("GroupLasso", self.global_scale)

    def density(self, layer_rms: float) -> ScaleDensity:
        """Gamma with lambda^2, None where it is learned."""
        return Gamma(_rate(self.global_scale, layer_rms))


def _check_global_scale(prior: str, scale: float | str) -> None:
    if scale != "auto" and not (isinstance(scale, int | float) and 0 < scale < math.inf):
        raise ValueError(f'{prior} global_scale is {scale!r}; expected a positive number or "auto".')


def _rate(scale: float | str, layer_rms: float) -> float | None:
    return None if scale == "auto" else (float(scale) * layer_rms) ** -2


@dataclass(frozen=True)
class _Sums:
    """Sums over the groups of one tensor: over `dims`, after its first dimension was split into equal blocks."""

    dims: tuple[int, ...]
    num_blocks: int = 1

    @classmethod
    def over(cls, sharing: str, binding: Binding) -> "_Sums":
        dims, num_blocks = range(binding.mean.dim()), 1
        if sharing == "weight":
            return cls(())
        separate: tuple[int, ...] = ()
        if sharing == "channel":
            separate = binding.unit_dims
        elif sharing == "input_channel" and binding.input_dims:
            separate, num_blocks = binding.input_dims, binding.num_blocks
        if num_blocks > 1:
            dims, separate = range(len(dims) + 1), (0, *(dim + 1 for dim in separate))
        return cls(tuple(dim for dim in dims if dim not in separate), num_blocks)

    def __call__(self, values: Tensor) -> Tensor:
        """The sum of each group."""
        if self.num_blocks > 1:
            values = values.unflatten(0, (self.num_blocks, -1))
        return values.sum(self.dims, keepdim=True) if self.dims else values

    def spread(self, of_groups: Tensor, size: int) -> Tensor:
        """What belongs to each group, broadcastable to the tensor, whose first dimension has this size."""
        if self.num_blocks == 1:
            return of_groups
        rows = size // self.num_blocks
        return of_groups.expand(self.num_blocks, rows, *of_groups.shape[2:]).flatten(0, 1)


@dataclass(frozen=True)
class BoundLearned(BoundNormal):
    """N(0, u) with the best u of each of the tensor's groups."""

    sums: _Sums
    density: ScaleDensity

    def variance(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor:
        """The best variance of each weight's group."""
        return self.variance_from(mean, log_std, (2 * log_std).exp(), keep)

    def variance_from(self, mean: Tensor, log_std: Tensor, squares: Tensor, keep: Tensor | None = None) -> Tensor:
        """The same, of known squares of the stds."""
        best, _, _, _ = self._best(mean, squares, keep)
        return self.sums.spread(best, mean.shape[0])

    def cost(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor | float:
        """-ln p of the groups' scales."""
        if isinstance(self.density, Flat):
            return 0.0
        variance, rate, count, present = self._best(mean, (2 * log_std).exp(), keep)
        return kept(self.density.cost(variance, count, rate), present).sum()

    def state(self) -> dict[str, Tensor | float]:
        """The rate of the scales' density, where that is a constant."""
        return {"rate": self.density.rate} if self.density.rate else {}

    def with_state(self, state: Mapping[str, Any]) -> "BoundLearned":
        """The same prior with the rate of `state`."""
        return replace(self, density=replace(self.density, **state)) if state else self

    def _best(
        self, mean: Tensor, squares: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, Tensor | float, Tensor | float, Tensor]:
        """u, k, the number of weights, and whether anything is left, of each group."""
        energy = self.sums(second_moments(mean, squares, keep))
        if keep is None:
            count: Tensor | float = float(mean.numel() // energy.numel())
            present = torch.ones_like(energy, dtype=torch.bool)
        else:
            count = self.sums(keep.to(energy.dtype))
            present = count > 0
        rate = self.density.rate
        if rate is None:
            rate = self.density.best_rate(energy.detach(), count, present)
        return self.density.variance(energy, count, rate), rate, count, present
