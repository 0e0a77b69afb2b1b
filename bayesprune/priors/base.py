"""What a prior is: a family of densities, and the density of one tensor with its KL divergence."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

TINY = 1e-30  # below any squared weight that float32 training produces; keeps logs and quotients finite


@dataclass(frozen=True)
class Binding:
    """What a prior may know of the tensor it is bound to.

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
        """What the scales themselves cost under a prior of their own, in nats: a scalar."""
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
