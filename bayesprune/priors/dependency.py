"""Gaussian priors with one scale for every unit that leaves together, in all layers that lose weights with it.

A weight lies in up to two groups, that of its output and that of its input, so its std is a product,

    s_w = s_layer z_out z_in,    z = 1 where there is no group,

with s_layer the layer's root mean square when training starts. The KL at given posteriors is convex in all ln z
together. Given the others, the best z of a unit is that of `scales` with e / (the rest of s_w)^2 for e.
All z move at once, each by 1 / C of its way there in ln z, where C is the largest number of groups that one of its
weights lies in; by Jensen's inequality the KL cannot rise, whatever depends on what (as in generalised iterative
scaling; Darroch and Ratcliff, 1972). Binding a prior iterates these updates to convergence. Every step of training does
one of them, so that the scales follow the posterior at the cost of a few sums.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bayesprune.errors import UnsupportedModelError
from bayesprune.priors.base import Binding, BoundGaussian, BoundNormal, BoundPrior, second_moments
from bayesprune.priors.scales import Flat, ScaleDensity

MIN_SCALE = 1e-3
"""Smallest z. The weights of such a unit have a millionth of their layer's variance; from here on the prior stays where
it is, so that the posterior of what the data does not need becomes the prior, without a signal, instead of following
scales that shrink for ever and from which no gradient of the data could bring it back."""

COLLAPSED = 1e-2
"""A group none of whose units has a z above this has collapsed."""

_MAX_SWEEPS = 500


@dataclass(frozen=True)
class Member:
    """One dimension of one parameter that loses positions with the units of a group.

    Attributes:
        parameter: The parameter's name in the model.
        dim: The dimension.
        units: The unit that each position belongs to; -1 for one that belongs to none.
    """

    parameter: str
    dim: int
    units: tuple[int, ...] = field(repr=False)


@dataclass(frozen=True)
class DependencyGroup:
    """Units that leave together, each from every member: channels with all that reads them, or heads.

    Attributes:
        name: The layer that the group starts from.
        num_units: How many units it has.
        members: What loses positions.
    """

    name: str
    num_units: int
    members: tuple[Member, ...] = field(repr=False)


class _Scales:
    """ln z of every unit and the rate k of its group; the last entry of each stands for no group at all."""

    def __init__(self, groups: Sequence[DependencyGroup], density: ScaleDensity, like: Tensor) -> None:
        self.groups: dict[str, slice] = {}
        start = 0
        for group in groups:
            self.groups[group.name] = slice(start, start + group.num_units)
            start += group.num_units
        self.density = density
        self.has_prior = not isinstance(density, Flat)
        self.log_units = like.new_zeros(start + 1)
        self.rate = torch.full_like(self.log_units, 1.0 if density.rate is None else density.rate)
        self.count = torch.zeros_like(self.log_units)
        self.num_shared = torch.ones_like(self.log_units)  # the C of the text
        self.present = torch.zeros_like(self.log_units, dtype=torch.bool)

    def sweep(self, sums: Iterable["_Sums"]) -> Tensor:
        """Moves all z once; the largest change of a ln z."""
        energy, count = torch.zeros_like(self.log_units), torch.zeros_like(self.log_units)
        for tensor in sums:
            tensor.add_to(energy, count)
        self.present, self.count = count > 0, count
        self.present[-1] = False
        best = self.density.variance(energy * (2 * self.log_units).exp(), count, self.rate).sqrt().clamp_min(MIN_SCALE)
        change = (best.log() - self.log_units) / self.num_shared * self.present
        self.log_units += change
        if self.density.rate is None:
            for units in self.groups.values():
                if self.present[units].any():
                    variance = (2 * self.log_units[units]).exp()
                    self.rate[units] = self.density.better_rate(
                        variance, count[units], self.rate[units], self.present[units]
                    )
        return change.abs().max()


@dataclass(frozen=True, eq=False)
class BoundDependency(BoundNormal):
    """N(0, (scale z_out z_in)^2), at the present scales.

    Attributes:
        scales: Those of all groups of the model, which move.
        scale: The layer's own, which does not.
        slots: By dimension, where in `scales` the unit of each position is.
        owned: The units whose prior is counted with this tensor.
    """

    scales: _Scales
    scale: float
    slots: dict[int, Tensor]
    owned: Tensor

    def variance(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor:
        """The square of the product of scales; this posterior does not move them, `refresh` does."""
        return self.scale**2 * self.unit_variance(mean).to(log_std)

    def unit_variance(self, mean: Tensor, *, but: int | None = None) -> Tensor:
        """The product of z^2 over this tensor's dimensions, all or all but one, broadcastable to `mean`."""
        product = self.scales.log_units.new_zeros((1,) * mean.dim())
        for dim, slots in self.slots.items():
            if dim != but:
                shape = [-1 if d == dim else 1 for d in range(mean.dim())]
                product = product + 2 * self.scales.log_units[slots].view(shape)
        return product.exp()

    def cost(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor | float:
        """-ln p of the scales of the units that are counted here."""
        scales, own = self.scales, self.owned[self.scales.present[self.owned]]
        if not scales.has_prior:
            return 0.0
        variance = (2 * scales.log_units[own]).exp()
        return scales.density.cost(variance, scales.count[own], scales.rate[own]).sum().to(log_std)

    def collapsed_groups(self) -> list[str]:
        """Names of the model's groups, those of other tensors too, none of whose units has a scale left."""
        largest = self.scales.log_units.exp().masked_fill(~self.scales.present, 0.0)
        return [name for name, units in self.scales.groups.items() if 0 < float(largest[units].max()) < COLLAPSED]

    def state(self) -> dict[str, Tensor | float]:
        """The layer's scale, and those of the units at each position."""
        state: dict[str, Tensor | float] = {"scale": self.scale}
        for dim, slots in self.slots.items():
            state[f"log_units_{dim}"] = self.scales.log_units[slots]
            if self.scales.has_prior:
                state[f"rate_{dim}"] = self.scales.rate[slots]
        return state

    def with_state(self, state: Any) -> "BoundDependency":
        """The same prior; its units' scales, which other tensors share, become those of `state`."""
        for dim, slots in self.slots.items():
            self.scales.log_units[slots] = state[f"log_units_{dim}"].to(self.scales.log_units)
            if self.scales.has_prior:
                self.scales.rate[slots] = state[f"rate_{dim}"].to(self.scales.rate)
        return replace(self, scale=state["scale"])


class _Sums:
    """What a sweep needs of one tensor: second moments, summed over the dimensions without groups."""

    def __init__(self, prior: BoundDependency, mean: Tensor, log_std: Tensor, keep: Tensor | None) -> None:
        self.prior = prior
        others = [dim for dim in range(mean.dim()) if dim not in prior.slots]
        energy = second_moments(mean, (2 * log_std).exp(), keep) / prior.scale**2
        self.energy = energy.sum(others, keepdim=True) if others else energy
        if keep is None:
            self.count = torch.full_like(self.energy, mean.numel() // self.energy.numel())
        else:
            self.count = keep.sum(others, keepdim=True) if others else keep

    def add_to(self, energy: Tensor, count: Tensor) -> None:
        """Adds what belongs to each unit: the sum of e / s_w^2, and the number of weights."""
        scaled = self.energy.to(energy) / self.prior.unit_variance(self.energy)
        for dim, slots in self.prior.slots.items():
            others = [other for other in range(scaled.dim()) if other != dim]
            for total, values in ((energy, scaled), (count, self.count.to(count))):
                total.index_add_(0, slots, values.sum(others) if others else values)


def bind_groups(
    groups: Sequence[DependencyGroup], bindings: Sequence[Binding], density: ScaleDensity
) -> list[BoundNormal]:
    """The priors of all tensors of a model, every z at 1; a fixed Gaussian for a tensor outside all groups.

    Raises:
        ValueError: the groups are those of another model, or of this one before it was pruned.
        UnsupportedModelError: the model is sharded (FSDP 2).
    """
    if any(hasattr(binding.mean, "full_tensor") for binding in bindings):
        raise UnsupportedModelError(
            "scales of dependency groups are sums over whole tensors, and FSDP 2 has sharded the model; expected "
            'scales within one tensor, such as ARD("channel"), or DDP.'
        )
    scales = _Scales(groups, density, torch.zeros((), device=bindings[0].mean.device, dtype=_dtype(bindings)))
    slots: dict[str, dict[int, Tensor]] = {binding.name: {} for binding in bindings}
    shapes = {binding.name: binding.mean.shape for binding in bindings}
    for group in groups:
        first = scales.groups[group.name].start
        for member in group.members:
            if member.parameter not in slots:
                continue  # deterministic, as a norm's shift
            _check_fits(group, member, shapes[member.parameter])
            of = torch.tensor(member.units, device=scales.log_units.device)
            rest = slots[member.parameter].setdefault(member.dim, torch.full_like(of, len(scales.log_units) - 1))
            slots[member.parameter][member.dim] = torch.where(of < 0, rest, of + first)
    if not any(slots.values()):
        raise ValueError(
            f"none of the {len(groups)} groups has a member among the model's posteriors ({bindings[0].name}, ...); "
            "expected dependency_groups of this very model."
        )
    return [_bound(scales, binding, slots[binding.name]) for binding in bindings]


def _bound(scales: _Scales, binding: Binding, slots: dict[int, Tensor]) -> BoundNormal:
    if not slots:
        return BoundGaussian(binding.layer_rms)
    touched = torch.cat(list(slots.values())).unique()
    touched = touched[touched < len(scales.log_units) - 1]
    scales.num_shared[touched] = scales.num_shared[touched].clamp_min(len(slots))
    owned = touched[~scales.present[touched]]
    scales.present[touched] = True  # until the first sweep counts
    return BoundDependency(scales, binding.layer_rms, slots, owned)


def _dtype(bindings: Sequence[Binding]) -> torch.dtype:
    return torch.float64 if any(binding.mean.dtype == torch.float64 for binding in bindings) else torch.float32


def _check_fits(group: DependencyGroup, member: Member, shape: Sequence[int]) -> None:
    size = shape[member.dim] if member.dim < len(shape) else 0
    if size != len(member.units):
        raise ValueError(
            f"the group of {group.name} has {len(member.units)} positions along dimension {member.dim} of "
            f"{member.parameter}, which has {size}; call dependency_groups on the model as it is now."
        )


@torch.no_grad()
def refresh(tensors: Iterable[tuple[BoundPrior, Tensor, Tensor, Tensor | None]], *, until_rest: bool = False) -> None:
    """Sweeps the scales that tensors share, given the prior, means, log stds and mask of each of a model's tensors.

    Args:
        tensors: All of them; priors without shared scales are passed over.
        until_rest: Whether to sweep until the scales rest, instead of once.
    """
    sums: dict[_Scales, list[_Sums]] = {}
    for prior, mean, log_std, keep in tensors:
        if isinstance(prior, BoundDependency):
            sums.setdefault(prior.scales, []).append(_Sums(prior, mean, log_std, keep))
    for scales, of_tensors in sums.items():
        tolerance = torch.finfo(scales.log_units.dtype).eps ** 0.5
        for _ in range(_MAX_SWEEPS if until_rest else 1):
            change = scales.sweep(of_tensors)
            if until_rest and change < tolerance:
                break
