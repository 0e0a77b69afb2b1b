"""What a prior is, and the priors that training does not move: Gaussians and the log-uniform density."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

TINY = 1e-30  # below any squared weight that float32 training produces; keeps logs and quotients finite


@dataclass(frozen=True)
class Binding:
    """Facts about a tensor that a prior may use when it is bound to it.

    Attributes:
        mean: The posterior means when training starts.
        layer_rms: Root mean square of the layer's weights; for a bias, at least that of the bias itself.
        unit_dims: Dimensions of the tensor that number output units; empty for a bias and a norm's scale.
        input_dims: Dimensions that number input channels, those of one block; empty for these two.
        num_blocks: Equal blocks of the first dimension that read input channels of their own: the groups of a
            convolution that is not transposed.
        name: The parameter's name in the model.
    """

    mean: Tensor
    layer_rms: float
    unit_dims: tuple[int, ...]
    input_dims: tuple[int, ...] = ()
    num_blocks: int = 1
    name: str = ""


class BoundPrior(ABC):
    """The prior of one tensor. Subclasses are dataclasses whose tensor fields are their state."""

    @abstractmethod
    def kl(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor:
        """KL divergence of the posterior from the prior, in nats, summed over the kept weights: a scalar.

        Args:
            mean: Posterior means.
            log_std: Log stds, broadcastable to `mean`.
            keep: True where the weight has not been removed; None keeps all.
        """

    def kl_gradient(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gradients of `kl` for every weight's mean and log std, both of `mean`'s shape, in nats."""
        with torch.enable_grad():
            mean = mean.detach().requires_grad_()
            log_std = log_std.detach().expand(mean.shape).clone().requires_grad_()
            mean_gradient, std_gradient = torch.autograd.grad(self.kl(mean, log_std, keep), (mean, log_std))
        return mean_gradient, std_gradient

    @property
    def max_log_std(self) -> float:
        """Largest sensible log std: that of the prior itself where it has one."""
        return float("inf")

    def state(self) -> dict[str, Tensor | float]:
        """The constants, by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]
        return {name: value for name, value in values if isinstance(value, Tensor | float)}

    def with_state(self, state: Mapping[str, Any]) -> "BoundPrior":
        """The same prior with the constants of `state`."""
        return replace(self, **state)  # type: ignore[type-var]


class BoundNormal(BoundPrior):
    """A Gaussian for every weight, around zero where there is no `center`."""

    center: Tensor | None = None

    @property
    def fixed_variance(self) -> float | None:
        """The variance where it is one number, whatever the posterior; the hook of `attach` is fastest then."""
        return None

    @abstractmethod
    def variance(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor:
        """The prior's variance, broadcastable to `mean`; where it is learned, the best for this posterior."""

    def variance_from(self, mean: Tensor, log_std: Tensor, squares: Tensor, keep: Tensor | None = None) -> Tensor:
        """`variance` where the squares of the stds are known already."""
        return self.variance(mean, log_std, keep)

    def cost(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor | float:
        """The cost of the scales under a prior of their own, in nats: a scalar."""
        return 0.0

    def kl(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor:
        """1/2 sum[ (m - c)^2 / s_p^2 + s^2 / s_p^2 - 1 - ln(s^2 / s_p^2) ], and the cost of the scales."""
        squares = (2 * log_std).exp()
        variance = self.variance_from(mean, log_std, squares, keep)
        e = self._distance(mean).to(log_std.dtype).square() + squares
        divergence = e / variance - 1 - 2 * log_std + variance.log()
        return 0.5 * kept(divergence, keep).sum() + self.cost(mean, log_std, keep)

    def kl_gradient(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """((m - c) / s_p^2, s^2 / s_p^2 - 1): at its best value a scale has no gradient of its own."""
        squares = (2 * log_std).exp()
        variance = self.variance_from(mean, log_std, squares, keep)
        std_gradient = (squares / variance - 1).expand(mean.shape)
        return kept(self._distance(mean).to(log_std.dtype) / variance, keep), kept(std_gradient, keep)

    def _distance(self, mean: Tensor) -> Tensor:
        return mean if self.center is None else mean - self.center


class Prior(ABC):
    """A family of prior densities; `bind` makes the density of one tensor."""

    @abstractmethod
    def bind(self, binding: Binding) -> BoundPrior:
        """The prior of this tensor."""

    def bind_all(self, bindings: Sequence[Binding]) -> list[BoundPrior]:
        """The priors of all tensors of a model, in their order."""
        return [self.bind(binding) for binding in bindings]


def kept(values: Tensor, keep: Tensor | None) -> Tensor:
    """The values, zero where the weight has been removed."""
    return values if keep is None else values * keep


def second_moments(mean: Tensor, squares: Tensor, keep: Tensor | None) -> Tensor:
    """m^2 + s^2 of each weight, in the stds' dtype and the means' shape; zero where the weight has been removed."""
    return kept(mean.to(squares.dtype).square() + squares, keep)


@dataclass(frozen=True)
class Gaussian(Prior):
    """N(centre, scale^2) for every weight.

    Attributes:
        scale: The std, or "layer_rms": the root mean square of the layer's trained weights (scale-free).
        centered: Whether the centre is the trained weight instead of zero (MOPED). SNR then says nothing about what
            can be removed: a weight that the data does not need stays at its trained value.
    """

    scale: float | Literal["layer_rms"] = "layer_rms"
    centered: bool = False

    def __post_init__(self) -> None:
        if self.scale != "layer_rms" and not (isinstance(self.scale, int | float) and self.scale > 0):
            raise ValueError(f'Gaussian scale is {self.scale!r}; expected a positive number or "layer_rms".')

    def bind(self, binding: Binding) -> "BoundGaussian":
        """The Gaussian of this tensor, its scale and centre fixed from now on."""
        scale = binding.layer_rms if self.scale == "layer_rms" else float(self.scale)
        return BoundGaussian(scale, binding.mean.detach().clone() if self.centered else None)


@dataclass(frozen=True)
class LogUniform(Prior):
    """p(|w|) proportional to 1 / |w|, improper (sparse variational dropout).

    Its KL, up to a constant that makes it vanish for a std far above the mean, is approximate to 0.01 nats a weight.
    """

    def bind(self, binding: Binding) -> "BoundLogUniform":
        """The prior of this tensor; it has no constants."""
        return BoundLogUniform()


@dataclass(frozen=True)
class BoundGaussian(BoundNormal):
    """N(center, scale^2); center None is zero."""

    scale: float
    center: Tensor | None = None

    def variance(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor:
        """The square of the scale."""
        return log_std.new_tensor(self.scale).square()

    @property
    def fixed_variance(self) -> float:
        """The square of the scale."""
        return self.scale**2

    @property
    def max_log_std(self) -> float:
        """The log of the scale: data can only make a weight more certain than its prior."""
        return math.log(self.scale)


@dataclass(frozen=True)
class BoundLogUniform(BoundPrior):
    """The approximation of Molchanov et al. (2017), Eq. 14; a = s^2 / m^2."""

    def kl(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> Tensor:
        """-sum[ k1 S(k2 + k3 ln a) - 1/2 ln(1 + 1/a) - k1 ], S the logistic function."""
        log_alpha = _log_alpha(mean, log_std)
        penalty = _K1 * torch.sigmoid(-_K2 - _K3 * log_alpha) + 0.5 * torch.nn.functional.softplus(-log_alpha)
        return kept(penalty, keep).sum()

    def kl_gradient(self, mean: Tensor, log_std: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(-2 / m dKL/dln a, 2 dKL/dln a)."""
        log_alpha = _log_alpha(mean, log_std)
        gate = torch.sigmoid(-_K2 - _K3 * log_alpha)
        slope = -_K1 * _K3 * gate * (1 - gate) - 0.5 * torch.sigmoid(-log_alpha)
        mean = mean.to(slope.dtype)
        return kept(-2 * slope * mean / (mean.square() + TINY), keep), kept(2 * slope, keep)


_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695


def _log_alpha(mean: Tensor, log_std: Tensor) -> Tensor:
    return 2 * log_std - (mean.to(log_std.dtype).square() + TINY).log()
