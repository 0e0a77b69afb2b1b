"""What an estimator works on: posteriors of a layer's weight and bias, and the layer's operation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayesprune.foundation.kinds import LayerKind

Operation = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Gradients = tuple[Tensor | None, Tensor | None]
Pullback = Callable[[Tensor, Tensor, Tensor, tuple[bool, bool]], Gradients | None]


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


@dataclass(frozen=True, eq=False)
class Bilinear:
    """An operation that is linear in its input and in its weight, with what makes the noise of its output cheap.

    Attributes:
        operation: The operation.
        kind: How its weight is laid out.
        known_pullback: Gradients as of `pullback`, or None in place of both where it does not know them.
        has_factors: Whether its output is that of its kind, so that stds that are outer products may be used as such.
    """

    operation: Operation
    kind: LayerKind
    known_pullback: Pullback
    has_factors: bool

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output."""
        return self.operation(x, weight, bias)

    def pullback(self, gradient: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool]) -> Gradients:
        """Gradients of an output without bias with respect to x and weight, None where not needed.

        Where they are not known, the operation runs once more and is differentiated.
        """
        known = self.known_pullback(gradient, x, weight, needed)
        if known is not None:
            return known
        with torch.enable_grad():
            x, weight = x.detach().requires_grad_(needed[0]), weight.detach().requires_grad_(needed[1])
            output = self(x, weight, None)
            wanted = [tensor for tensor in (x, weight) if tensor.requires_grad]
            gradients = iter(torch.autograd.grad(output, wanted, gradient))
        of_x, of_weight = (next(gradients) if need else None for need in needed)
        return of_x, of_weight

    def std_factors(self, log_stds: tuple[Tensor, ...]) -> Factors | None:
        """The parts of the weight's log std as rows and columns of its groups; None where they are no outer product.

        What dimension 0 of the weight counts, it counts for all groups.
        """
        rows, columns = log_stds[0], log_stds[1] if len(log_stds) > 1 else None
        output_dim, groups = self.kind.output_dim, self.kind.num_groups
        others = [size for dim, size in enumerate(rows.shape) if dim != output_dim]
        if not self.has_factors or any(size != 1 for size in others):
            return None
        by_group = rows.view(groups, -1) if output_dim == 0 else rows.view(1, -1).expand(groups, -1)
        if columns is None:
            return Factors(by_group, None)
        return Factors(by_group, columns.view(1, -1) if output_dim == 0 else columns.view(groups, -1))

    def receptive_field_sum(self, energies: Tensor, kernel_size: Sequence[int]) -> Tensor:
        """Sums of energies with one channel for each group, (N, G, *spatial), within reach of each output."""
        return self(energies, energies.new_ones((self.kind.num_groups, 1, *kernel_size)), None)


def is_plain(*tensors: Tensor) -> bool:
    """Whether none is of a tensor class of its own, as those that are sharded or carry moments."""
    return all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)


def runs_once() -> bool:
    """Whether what is computed now is for a backward pass, none of it to be thrown away and computed again there."""
    if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None  # type: ignore[attr-defined]
