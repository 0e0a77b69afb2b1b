"""A model on the way to its grids: rounded again and again from what it was, for one set of grids after the other.

Weights are rounded each by itself; or column by column, where the rest of a row makes up for each (`round_columns`); or
in sequence, where each layer is first fitted to what the model computed before rounding, from what the rounded layers
before it give (`laplace.compensation`), and its columns are rounded against those inputs. GPTQ (Frantar et al., 2022)
goes through the layers in the same order, and does not fit them.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayesprune.bits.others import either, ordinary_names, ordinary_tensors, rest_of, significant
from bayesprune.bits.rounding import Sweep, round_alone, round_columns, sweeps
from bayesprune.bits.steps import Grid
from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.batches import split
from bayesprune.foundation.model import eval_mode
from bayesprune.foundation.numbers import as_number
from bayesprune.foundation.progress import progress_bar
from bayesprune.laplace import KroneckerFactors, KroneckerPosterior, fit_kronecker, output_metric
from bayesprune.laplace.calibration import Loss, own_loss
from bayesprune.laplace.compensation import ROWS_PER_COLUMN, refit
from bayesprune.laplace.matrices import definite, from_matrix, is_matrix_product, to_matrix
from bayesprune.laplace.regression import Moments
from bayesprune.laplace.sequence import fit_in_sequence
from bayesprune.laplace.sites import Site, fittable_experts, fittable_layers, sites_of
from bayesprune.layers import Posterior, VariationalLayer, variational_layers
from bayesprune.storage.coding import CODED, encoded

_DAMPING = 0.01
_POSITIONS = 128  # a column, for the Kronecker factors

Plan = tuple[int, slice, list[Sweep]]
"""A group, a block of its columns, and in what order these are rounded."""


@dataclass
class Weight:
    """One tensor to round, as it was and how exactly it is known; on the CPU. Embeddings have no posterior."""

    name: str
    posterior: Posterior | None
    target: Tensor
    mean: Tensor
    precision: Tensor
    kept: Tensor
    dims: tuple[int, ...]


class Work:
    """A variational model and its values before rounding, to which every trial goes back.

    Args:
        model: What is rounded.
        weights: Its tensors to round.
        batches: On its device; None is no data.
        loss: A mean over examples, in nats.
        compensate: Whether weights make up for each other's rounding: True in sequence, "alone" in each layer alone.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: list[Weight],
        batches: list[Any] | None,
        loss: Loss,
        *,
        compensate: bool | Literal["alone"],
    ) -> None:
        self.model, self.weights = model, weights
        self.grids: dict[str, Grid | None] = {}
        self._by_name = {weight.name: weight for weight in weights}
        self._batches, self._loss = batches, loss
        self._factors: KroneckerPosterior | None = None  # fitted for the first layers that are rounded by them
        self._plans: dict[str, list[Plan]] = {}
        self._names = ordinary_names(model)
        rest = rest_of(self.saved(), [weight.target for weight in weights])
        self._rest = [(tensor, tensor.clone()) for tensor in rest]
        self._by_columns: set[str] = set()
        if batches and compensate:
            self._by_columns = {name for name, layer in variational_layers(model) if is_matrix_product(layer)}
        self._dense, self._sites = model, list[Site]()
        if batches and compensate is True:
            self._dense = copy.deepcopy(model)
            layers = fittable_layers(self._dense) | fittable_experts(self._dense, all_matrices=True)
            self._sites = sites_of(self._dense, batches, layers, rows_per_column=ROWS_PER_COLUMN, all_matrices=True)

    @property
    def is_sequential(self) -> bool:
        """Whether `round_in_sequence` does more than `round`."""
        return bool(self._sites)

    def round(self, grid_of: Callable[[Weight], Grid | None], *, later: Collection[str] = ()) -> None:
        """Rounds what has a grid, from what it was before; the rest to fewer significant bits.

        Args:
            grid_of: The grid of a tensor; None leaves it as it was.
            later: Layers that will be rounded anew: their columns need not make up for each other yet.
        """
        by_columns = self._by_columns.difference(later)
        if by_columns and self._factors is None and self._batches:
            self._factors = _factors(self._dense, self._batches, self._loss)
        for tensor, before in self._rest:
            tensor.copy_(significant(before))
        self.grids = {weight.name: grid_of(weight) for weight in self.weights}
        done: set[str] = set()
        found = {name: factors for name, factors in (self._factors or {}).items() if name in by_columns}
        for name, factors in progress_bar(found.items(), "Round", "layer"):
            done |= self._round_layer(name, factors)
        for weight in self.weights:
            grid = self.grids[weight.name]
            if weight.name not in done:
                weight.target.copy_(weight.mean if grid is None else round_alone(weight.mean, weight.kept, grid))

    def round_in_sequence(self, grid_of: Callable[[Weight], Grid | None]) -> None:
        """Rounds everything, then, in sequence, each layer anew, fitted to what it gave before any was rounded."""
        self.round(grid_of, later={site.name for site in self._sites})
        if not self._batches or not self._sites:
            return
        fit_in_sequence(
            self.model, self._dense, self._batches, self._sites, self._fit_and_round, progress=None, title="Round"
        )

    def restore(self) -> None:
        """Makes the model what it was."""
        for tensor, before in (*self._rest, *((weight.target, weight.mean) for weight in self.weights)):
            tensor.copy_(before)

    def saved(self) -> dict[str, Tensor]:
        """The tensors of the model as an ordinary one, each once."""
        return ordinary_tensors(self.model, self._names)

    def coded_bytes(self) -> int:
        """How long they are, coded."""
        once = {(t.data_ptr(), t.shape): (name, t.cpu()) for name, t in reversed(self.saved().items())}
        return encoded(dict(reversed(once.values())))[CODED].numel()

    def measured(self) -> float | None:
        """The mean loss on the data; None without data, or where the default loss cannot be computed."""
        try:
            return self.loss() if self._batches else None
        except (LookupError, RuntimeError, TypeError, ValueError):
            if self._loss is own_loss:
                return None
            raise

    def loss(self) -> float:
        """The mean loss on the data."""
        assert self._batches, "checked before"
        total, number = 0.0, 0
        with eval_mode(self.model):
            for batch in self._batches:
                count = split(self.model, batch).num_examples
                total += count * as_number(self._loss(self.model, batch), "loss")
                number += count
        return total / number

    def _round_layer(self, name: str, factors: KroneckerFactors) -> set[str]:
        """Rounds the matrix of a layer column by column; the names of what it rounded."""
        weight, bias = (self._by_name.get(_joined(name, parameter)) for parameter in ("weight", "bias"))
        if weight is None or weight.posterior is None or (grid := self.grids[weight.name]) is None:
            return set()
        layer = weight.posterior.layer
        num_columns = to_matrix(layer, weight.mean).shape[2]
        has_bias = factors.mean.shape[2] > num_columns
        parts = [(weight, grid)]
        if has_bias:
            bias_grid = None if bias is None else self.grids[bias.name]
            if bias is None or bias_grid is None:
                return set()
            parts.append((bias, bias_grid))
        matrices = [self._matrices(layer, each, its) for each, its in parts]
        mean, kept, step = (torch.cat(part, dim=2) for part in zip(*matrices, strict=True))
        limits = [grid.limit] * num_columns + [its.limit for _, its in parts[1:]]
        if name not in self._plans:
            self._plans[name] = list(_plans(kept, factors.inputs))
        found = _rounded(mean, kept, step, self._plans[name], limits)
        weight.target.copy_(from_matrix(layer, found[..., :num_columns]) + 0.0)
        if has_bias and bias is not None:
            bias.target.copy_(found[..., -1].reshape(bias.mean.shape) + 0.0)
        self._shift_norm(factors, found - mean)
        return {each.name for each, _ in parts}

    def _fit_and_round(self, site: Site, moments: tuple[Moments, Moments]) -> Tensor | None:
        """Fits and rounds a matrix; returns what the mean of the norm behind it has become smaller by, or None."""
        weight, bias = (self._by_name.get(name) for name in (site.weight, _joined(site.name, "bias")))
        if weight is None or weight.posterior is None or (grid := self.grids[weight.name]) is None:
            return None
        its = None if bias is None else self.grids[bias.name]
        layer = weight.posterior.layer
        if its is None and layer._parameters.get("bias") is not None:
            return None
        _, kept, step = self._matrices(layer, weight, grid)

        def settle(found: Tensor, xx: Tensor) -> Tensor:
            plans, limits = list(_plans(kept, [xx.cpu()])), [grid.limit] * kept.shape[2]
            return _rounded(found.cpu(), kept, step, plans, limits).to(found)

        norm = None if site.norm is None else self.model.get_submodule(site.norm)
        mean = None if norm is None else norm.get_buffer("running_mean")
        refit(self.model, self._dense, site, moments, kept=kept, settle=settle)
        shift = None
        if norm is not None and mean is not None:
            before, after = mean.clone(), significant(norm.get_buffer("running_mean"))
            norm._buffers["running_mean"] = mean.copy_(after)  # the tensor that the next trial restores
            shift = before - after
        if bias is not None and its is not None:
            bias.target.copy_(round_alone(bias.target.cpu(), bias.kept, its))
        return shift

    @staticmethod
    def _matrices(layer: VariationalLayer, weight: Weight, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, what is kept, and steps as (G, R, C)."""
        tensors = (weight.mean.double(), weight.kept, grid.step.expand(weight.mean.shape))
        if weight.posterior is not None and weight.posterior.is_weight:
            first, kept, step = (to_matrix(layer, tensor) for tensor in tensors)
        else:
            groups = to_matrix(layer, layer.get_parameter("weight")).shape[0]
            first, kept, step = (tensor.reshape(groups, -1, 1) for tensor in tensors)
        return first, kept, step

    def _shift_norm(self, factors: KroneckerFactors, moved: Tensor) -> None:
        """Lets the batch norm behind take up what the outputs moved by on average."""
        if factors.norm is None or factors.centre is None:
            return
        shift = (moved * factors.centre[:, None]).sum(2).flatten()
        buffer = self.model.get_submodule(factors.norm).get_buffer("running_mean")
        buffer.copy_(significant(buffer + shift.to(buffer)))


def _plans(kept: Tensor, inputs: Sequence[Tensor]) -> Iterator[Plan]:
    """Of what is kept, (G, R, C), how it is rounded, with blocks (G, b, b) along the diagonal of E[x x^T]."""
    start = 0
    for block in inputs:
        part = slice(start, start := start + block.shape[-1])
        for group, precision in enumerate(definite(block, _DAMPING)):
            yield group, part, sweeps(kept[group][:, part], precision)


def _rounded(mean: Tensor, kept: Tensor, step: Tensor, plans: Sequence[Plan], limits: Sequence[int]) -> Tensor:
    """Weights (G, R, C) rounded as planned; `limits` are the largest integers of the columns."""
    found = torch.zeros_like(mean)
    for group, part, plan in plans:
        at = (group, slice(None), part)
        found[at] = round_columns(mean[at], kept[at], step[at], plan, limits[part])
    return found


def _joined(layer: str, parameter: str) -> str:
    return f"{layer}.{parameter}" if layer else parameter


def _factors(source: nn.Module, batches: list[Any], loss: Loss) -> KroneckerPosterior:
    """Only its factors of inputs are used, which are the same for every loss."""
    try:
        return fit_kronecker(source, batches, num_positions=_POSITIONS, loss=either(output_metric, loss))
    except UnsupportedModelError:  # no layer is a matrix product, or none takes examples along its first dimension
        return {}
