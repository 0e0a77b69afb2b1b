"""What an estimator works on: posteriors of a layer's weight and bias, and the layer's operation."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Operation = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Gaussian(NamedTuple):
    """An elementwise independent Gaussian: mean, and a std that broadcasts to the mean's shape (float32)."""

    mean: Tensor
    std: Tensor


class LogGaussian(NamedTuple):
    """A Gaussian whose log std is a broadcast sum of parts, nothing of it computed yet.

    Attributes:
        mean: The means.
        log_stds: The parts, each broadcastable to the mean.
        mask: True where the weight is kept; zero for certain elsewhere.
    """

    mean: Tensor
    log_stds: tuple[Tensor, ...]
    mask: Tensor | None = None


Posterior = Gaussian | LogGaussian


def as_gaussian(posterior: Posterior) -> Gaussian:
    """Mean and std, in the graph; both zero where the mask removed the weight."""
    if isinstance(posterior, Gaussian):
        return posterior
    mean, log_stds, mask = posterior
    std = sum(log_stds[1:], start=log_stds[0]).exp()
    return Gaussian(mean, std) if mask is None else Gaussian(mean * mask, std * mask)


class Factors(NamedTuple):
    """Log stds that add up to the log std of a weight in G groups, of (O / G, I / G, K) each.

    Attributes:
        rows: Of the output units, (G, O / G).
        columns: Of the inputs, (G or 1, I / G); None for zeros.
    """

    rows: Tensor
    columns: Tensor | None


class Bilinear:
    """An operation that is linear in its input and in its weight, with what makes the noise of its output cheap."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output."""
        raise NotImplementedError

    def pullback(
        self, gradient: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of an output without bias with respect to x and weight, None where not needed.

        This one runs the operation once more; an operation that knows its gradients overrides it.
        """
        with torch.enable_grad():
            x, weight = x.detach().requires_grad_(needed[0]), weight.detach().requires_grad_(needed[1])
            output = self(x, weight, None)
            wanted = [tensor for tensor in (x, weight) if tensor.requires_grad]
            gradients = iter(torch.autograd.grad(output, wanted, gradient))
        of_x, of_weight = (next(gradients) if need else None for need in needed)
        return of_x, of_weight

    def factors(self, log_stds: tuple[Tensor, ...]) -> Factors | None:
        """The parts of the weight's log std as rows and columns; None where they are no outer product."""
        return None

    def spread(self, energy: Tensor) -> Tensor:
        """What weights of one reach of a quantity with one channel for each group (N, G, ...), at each output."""
        raise NotImplementedError


def is_plain(*tensors: Tensor) -> bool:
    """Whether none is of a tensor class of its own, as those that are sharded or carry moments."""
    return all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
