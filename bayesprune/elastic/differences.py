"""What a fit has moved, rounded: the differences between a level's weights and the larger model's, as few bits.

A layer that was fitted to make up for lost channels differs a little in every weight. The differences go to a grid of
their own, the columns to come making up for each other's error (see `bayesprune.bits.rounding`). The steps cost the
same for every weight, kappa / 2 nats an example, by the Kronecker factors of the larger model: step^2 = 12 kappa /
(mean diagonal of A, mean diagonal of G). kappa is the largest with which the whole level's predictions move little.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from bayesprune.bits.rounding import Sweep, round_columns, sweeps
from bayesprune.bits.steps import posterior_grid
from bayesprune.laplace import KroneckerFactors, KroneckerPosterior
from bayesprune.laplace.kronecker import variational_layer
from bayesprune.laplace.matrices import definite, from_matrix, removed_columns, to_matrix

_DAMPING = 0.01
_FACTOR, _STEPS, _MOST = 8.0, 3, 8  # of the search for kappa: a fifth of kappa in the end, and no more trials


@torch.no_grad()
def rounded(
    dense: nn.Module,
    fitted: nn.Module,
    lost: Mapping[str, Sequence[int]],
    posterior: KroneckerPosterior,
    divergence: Callable[[nn.Module], float],
    tolerance: float,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The fitted model with its weights at rounded distances from the dense ones, and these distances by name.

    Args:
        dense: The larger model, variational.
        fitted: The same, uncut, with weights that make up for lost inputs.
        lost: Inputs that each layer loses.
        posterior: Of the dense model.
        divergence: Of a model's predictions from the dense model's, in nats.
        tolerance: By so many nats, and a tenth of itself, the fitted model's divergence may rise.
    """
    moves = [_Move(dense, fitted, name, factors, lost.get(name, ())) for name, factors in posterior.items()]
    moves = [move for move in moves if move.differences.any()]
    reached = divergence(fitted)
    allowed = 0.1 * reached + tolerance
    if not moves or math.isnan(allowed):
        return fitted, {}
    low, high = 0.0, math.inf
    kappa = 2 * allowed / sum(int(move.kept.sum()) for move in moves)  # which the quadratic loss would allow
    best: tuple[nn.Module, dict[str, Tensor]] = fitted, {}
    for trial in range(_MOST):
        found = copy.deepcopy(fitted)
        moved = dict(move.apply(found, kappa) for move in moves)
        if divergence(found) <= reached + allowed:
            low, best = kappa, (found, moved)
        else:
            high = kappa
        if low and high < math.inf and trial >= _STEPS and high < 2 * low:
            break
        kappa = low * _FACTOR if high == math.inf else math.sqrt(low * high) if low else high / _FACTOR
    return best


class _Move:
    """How far a layer's weights were moved, and the order in which that is rounded.

    Attributes:
        differences: (G, R, C), float64.
        kept: False where the layer loses the input, (G, R, C).
    """

    def __init__(
        self, dense: nn.Module, fitted: nn.Module, name: str, factors: KroneckerFactors, lost: Sequence[int]
    ) -> None:
        self._name, self._factors = name, factors
        layer, stock = variational_layer(fitted, name), variational_layer(dense, name)
        self._start = to_matrix(stock, stock.get_parameter("weight")).cpu()
        kept = ~removed_columns(layer, list(lost))
        self.kept = kept[:, None].expand(self._start.shape)
        moved = to_matrix(layer, layer.get_parameter("weight")).cpu().double() - self._start
        self.differences = torch.where(self.kept, moved, 0.0)
        columns = self._start.shape[2]
        sides = (
            torch.cat([block.diagonal(dim1=1, dim2=2) for block in blocks], dim=1)
            for blocks in (factors.inputs, factors.outputs)
        )
        inputs, outputs = sides
        self._precision = float(inputs[:, :columns].mean() * outputs.mean())
        self._plans: list[tuple[tuple[int, slice, slice], list[Sweep]]] = []
        for group, part, between in factors.blocks() if self.differences.any() else ():
            width = min(part.stop, columns) - part.start
            at = (group, slice(None), slice(part.start, part.start + width))
            if width > 0:
                self._plans.append((at, sweeps(self.kept[at], definite(between[:width, :width], _DAMPING))))

    def apply(self, fitted: nn.Module, kappa: float) -> tuple[str, Tensor]:
        """Rounds the layer of a model, in place; its weight by name, and what was added to it.

        Bias or batch norm take up the mean of the error.
        """
        layer = variational_layer(fitted, self._name)
        precision = torch.full_like(self.differences, self._precision)
        weight = layer.get_parameter("weight")
        grid = posterior_grid(self.differences.to(weight.dtype), precision, self.kept, kappa, ())
        found, step = torch.zeros_like(self.differences), grid.step.expand(self.differences.shape)
        for at, plan in self._plans:
            limits = [grid.limit] * found[at].shape[1]
            found[at] = round_columns(self.differences[at], self.kept[at], step[at], plan, limits)
        moved = found.to(weight.dtype)
        weight.copy_(from_matrix(layer, torch.where(self.kept, self._start + moved, 0.0)))
        _take_up(fitted, layer, self._factors, found - self.differences)
        return f"{self._name}.weight".lstrip("."), from_matrix(layer, moved)


def _take_up(fitted: nn.Module, layer: nn.Module, factors: KroneckerFactors, error: Tensor) -> None:
    """Lets bias or batch norm make up for the mean of an error (G, R, C)."""
    columns = error.shape[2]
    if factors.norm is not None and factors.centre is not None:
        shift = (error * factors.centre[:, None, :columns]).sum(2).flatten()
        mean = fitted.get_submodule(factors.norm).get_buffer("running_mean")
        mean.add_(shift.to(mean))
    elif factors.mean.shape[2] > columns and factors.inputs[-1].shape[-1] == columns + 1:  # one block, the bias last
        centre = factors.inputs[-1][:, -1, :columns]
        bias = layer.get_parameter("bias")
        bias.sub_((error * centre[:, None]).sum(2).flatten().to(bias))
