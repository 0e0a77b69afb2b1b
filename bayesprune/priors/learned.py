"""Gaussian priors whose scales are learned with the posterior: which weights share one, and what it is.

Every scale is at its best value for the present posterior, so it needs no gradient of its own (envelope theorem).
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bayesprune.priors.base import Binding, BoundNormal, BoundPrior, Prior, kept, second_moments
from bayesprune.priors.dependency import DependencyGroup, best_shrinkage, best_variance, bind_groups

Sharing = Literal["weight", "channel", "input_channel", "layer"]
SHARING: tuple[Sharing, ...] = ("weight", "channel", "input_channel", "layer")


@dataclass(frozen=True)
class _Learned(Prior):
    """What ARD and the horseshoe share: what has a scale of its own.

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
    def shrinkage(self, layer_rms: float) -> float | None:
        """1 / tau^2 of the scales' half-Cauchy prior in a layer of this size; 0 without one, None to learn it."""

    def bind(self, binding: Binding) -> BoundPrior:
        """The prior of this tensor."""
        if not isinstance(self.group, str):
            return self.bind_all([binding])[0]
        return BoundLearned(_Sums.over(self.group, binding), self.shrinkage(binding.layer_rms))

    def bind_all(self, bindings: Sequence[Binding]) -> list[BoundPrior]:
        """The priors of all tensors of a model, in their order; dependency groups are shared among them."""
        if isinstance(self.group, str):
            return super().bind_all(bindings)
        return list(bind_groups(self.group, bindings, self.shrinkage(1.0)))


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

    def shrinkage(self, layer_rms: float) -> float:
        """No prior of the scale."""
        return 0.0


@dataclass(frozen=True)
class Horseshoe(_Learned):
    """N(0, s_g^2) with s_g ~ C+(0, tau), a half-Cauchy prior of each group's scale, at its mode given the posterior.

    What a full posterior over the scales would add (Louizos et al., 2017; Ghosh et al., 2018) is not here: as a point
    estimate the scale of a group of n weights differs from that of ARD by a factor between n and n + 2, so the two
    differ where groups are small, and hardly for whole channels. There is no slab.

    Attributes:
        group: As for `ARD`.
        global_scale: tau in units of the layer's root mean square when training starts, or "auto": the most likely one
            of the groups that share it, those of a tensor or the units of a dependency group.
    """

    global_scale: float | Literal["auto"] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        scale = self.global_scale
        if scale != "auto" and not (isinstance(scale, int | float) and 0 < scale < float("inf")):
            raise ValueError(f'Horseshoe global_scale is {scale!r}; expected a positive number or "auto".')

    def shrinkage(self, layer_rms: float) -> float | None:
        """1 / tau^2, None where it is learned."""
        return None if self.global_scale == "auto" else (float(self.global_scale) * layer_rms) ** -2


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
    shrinkage: float | None

    def variance(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor:
        """The best variance of each weight's group."""
        return self.variance_from(mean, log_std, (2 * log_std).exp(), keep)

    def variance_from(self, mean: Tensor, log_std: Tensor, squares: Tensor, keep: Tensor | None = None) -> Tensor:
        """The same, of known squares of the stds."""
        best, _, _ = self._best(mean, squares, keep)
        return self.sums.spread(best, mean.shape[0])

    def cost(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor | float:
        """sum_g ln(1 + u / tau^2), the negative log of the half-Cauchy density, relative to that at zero."""
        if self.shrinkage == 0:
            return 0.0
        variance, shrinkage, present = self._best(mean, (2 * log_std).exp(), keep)
        cost = (variance * shrinkage).log1p()
        if self.shrinkage is None:
            cost = cost - 0.5 * torch.as_tensor(shrinkage).log()
        return kept(cost, present).sum()

    def state(self) -> dict[str, Tensor | float]:
        """1 / tau^2, where that is a constant."""
        return {"shrinkage": self.shrinkage} if self.shrinkage else {}

    def _best(self, mean: Tensor, squares: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | float, Tensor]:
        """u, k, and whether anything is left, of each group."""
        energy = self.sums(second_moments(mean, squares, keep))
        if keep is None:
            count: Tensor | float = float(mean.numel() // energy.numel())
            present = torch.ones_like(energy, dtype=torch.bool)
        else:
            count = self.sums(keep.to(energy.dtype))
            present = count > 0
        shrinkage = self.shrinkage
        if shrinkage is None:
            shrinkage = best_shrinkage(energy.detach(), count, present)
        return best_variance(energy, count, shrinkage), shrinkage, present
