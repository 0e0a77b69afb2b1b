"""Rounds a model's weights by how exactly its posterior says that they have to be known."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayesprune.bits.others import (
    embedding_precisions,
    named_embeddings,
    ordinary_names,
    ordinary_tensors,
    rest_of,
    significant,
)
from bayesprune.bits.report import Quantization, QuantizedTensor
from bayesprune.bits.rounding import Sweep, round_alone, round_columns, sweeps
from bayesprune.bits.steps import Grid, posterior_grid, width_grid, width_of
from bayesprune.convert import to_variational
from bayesprune.errors import InfeasibleTargetError, UnsupportedModelError
from bayesprune.foundation.batches import device_of, on_device, split
from bayesprune.foundation.model import eval_mode
from bayesprune.foundation.progress import progress_bar
from bayesprune.foundation.sharding import check_whole
from bayesprune.foundation.text import first_names
from bayesprune.laplace import KroneckerFactors, KroneckerPosterior, fit_kronecker, fit_laplace, output_metric
from bayesprune.laplace.calibration import Loss, own_loss
from bayesprune.laplace.matrices import damped, from_matrix, to_matrix
from bayesprune.layers import Posterior, VariationalLayer, named_posteriors
from bayesprune.storage.coding import CODED, encoded, entropy_bits
from bayesprune.train import kl_divergence

_DAMPING = 0.01
_POSITIONS = 128  # a column, for the Kronecker factors
_FACTOR, _STEPS = 8.0, 6  # of bisection: three percent of kappa, a percent and a half of the steps
_SMALLEST, _LARGEST = 1e-12, 1e12


@torch.no_grad()
def quantize(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    *,
    tolerance: float | None = None,
    bits: int | Mapping[str, int] | None = None,
    bytes: int | None = None,
    per: Literal["tensor", "channel"] = "tensor",
    compensate: bool = True,
    loss: Loss | None = None,
) -> Quantization:
    """Rounds the weights to grids, in place, so that `save(coding="entropy")` writes a small file; says what it did.

    A weight that the posterior knows to within sigma needs no finer grid: one constant sets the steps of the whole
    model (see `bayesprune.bits.steps`), and is searched for the largest tolerated loss, or the largest file. Weights
    that are zero stay zero. With data the weights of a row make up for each other's rounding (see
    `bayesprune.bits.rounding`). Biases of converted layers are rounded like weights, and so are embeddings where there
    are data. What else has no posterior, such as norms and their running statistics, keeps 11 significant bits, as many
    as float16 has. The values remain ordinary tensors of the same dtype: nothing is attached to the model. Training on
    makes it an ordinary one again, unless `bits.StraightThrough` holds it to its grids.

    Args:
        model: A variational model, whose own stds are used, or a stock one; that is given a diagonal Laplace posterior
            on the data for this alone, in the metric of the logits (`laplace.output_metric`).
        data: Batches in any form that `bayesprune.foundation.batches` names; all are kept in memory. Training data.
        tolerance: By how many nats the mean loss on the data may rise. Needs data.
        bits: Instead, a fixed width: 2^bits - 1 places about zero for each tensor, or channel; 2 to 12. A mapping gives
            the widths by the longest prefix of a tensor's name; weights and biases of other names stay as they are.
        bytes: Instead, the largest size of all tensors of the state dict, coded; the header of the file comes on top,
            some 300 bytes.
        per: Whether a tensor has one step, or each of its output channels.
        compensate: False rounds each weight by itself even where there are data.
        loss: loss(model, batch), a mean over examples in nats. None is the model's own, where its forward takes
            `labels` as those of transformers do, else `laplace.cross_entropy`, of the data's labels.

    Raises:
        ValueError: not exactly one of tolerance, bits and bytes is given, or one is out of range; data are missing.
        InfeasibleTargetError: no step is small enough for the tolerance, or large enough for the bytes. The model is
            as it was then.
        StorageError: bytes are asked for, and `constriction` is missing.
        UnsupportedModelError: the model is sharded over processes.

    Examples:
        >>> import torch, bayesprune as bp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> data = [(torch.randn(64, 8), torch.randint(3, (64,)))]
        >>> report = bp.quantize(model, data, bits=4)
        >>> [tensor.width for tensor in report.tensors]
        [4, 4, 4, 4]
    """
    check_whole(model, "quantize")
    _check(tolerance, bits, bytes, per)
    batches = None if data is None else [on_device(batch, device_of(model)) for batch in data]
    if tolerance is not None and not batches:
        raise ValueError("tolerance needs data to measure the loss on; pass batches, or ask for bits or bytes.")
    source = _with_posterior(model, batches)
    kl_nats = float(kl_divergence(model)) if source is model else None
    weights = [*_weights(source, model, per), *_embeddings(source, model, per, batches)]
    if isinstance(bits, Mapping) and (
        unknown := [name for name in bits if not any(width_of(weight.name, {name: 2}) for weight in weights)]
    ):
        raise ValueError(
            f"bits names {first_names(unknown)}; expected prefixes of names of tensors that are rounded, such as "
            f"{first_names(weight.name for weight in weights)}."
        )
    if bits is not None:
        weights = [weight for weight in weights if weight.posterior or width_of(weight.name, bits)]
    factors = _factors(source, batches) if batches and compensate else None
    work = _Work(model, weights, factors, batches, own_loss if loss is None else loss)
    before = work.loss() if work.can_measure() else None
    kappa = None
    try:
        if bits is not None:
            work.round(lambda weight: _fixed(weight, bits))
        elif tolerance is not None:
            limit = work.loss() + tolerance
            kappa = _search(work, lambda: work.loss() <= limit, f"a loss within {tolerance:g} nats")
        elif bytes is not None:
            kappa = _search(work, lambda: work.coded_bytes() <= bytes, f"{bytes:,} bytes", larger_fits=True)
    except BaseException:
        work.restore()
        raise
    return Quantization(
        tensors=tuple(_row(weight, work.grids[weight.name]) for weight in weights),
        kappa=kappa,
        loss_before=before,
        loss_after=None if before is None else work.loss(),
        coded_bytes=work.coded_bytes() if find_spec("constriction") else None,
        float_bytes=sum(tensor.nbytes for tensor in work.saved().values()),
        kl_nats=kl_nats,
        grids={name: grid for name, grid in work.grids.items() if grid is not None},
    )


@dataclass
class _Weight:
    """One tensor to round, as it was and how exactly it is known; on the CPU. Embeddings have no posterior."""

    name: str
    posterior: Posterior | None
    target: Tensor
    mean: Tensor
    precision: Tensor
    kept: Tensor
    dims: tuple[int, ...]


class _Work:
    """A model and its values before rounding, to which every trial goes back."""

    def __init__(
        self,
        model: nn.Module,
        weights: list[_Weight],
        factors: KroneckerPosterior | None,
        batches: list[Any] | None,
        loss: Loss,
    ) -> None:
        self.model, self.weights = model, weights
        self.grids: dict[str, Grid | None] = {}
        self._batches, self._loss, self._factors = batches, loss, factors or {}
        self._plans: dict[str, list[tuple[int, slice, list[Sweep]]]] = {}
        self._names = ordinary_names(model)
        rest = rest_of(self.saved(), [weight.target for weight in weights])
        self._rest = [(tensor, tensor.clone()) for tensor in rest]

    def round(self, grid_of: Callable[[_Weight], Grid | None]) -> None:
        """Rounds what has a grid, from what it was before; the rest to fewer significant bits."""
        for tensor, before in self._rest:
            tensor.copy_(significant(before))
        self.grids = {weight.name: grid_of(weight) for weight in self.weights}
        done: set[str] = set()
        for name, factors in progress_bar(self._factors.items(), "Round", "layer"):
            done |= self._round_layer(name, factors)
        for weight in self.weights:
            grid = self.grids[weight.name]
            if weight.name not in done:
                weight.target.copy_(weight.mean if grid is None else round_alone(weight.mean, weight.kept, grid))

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

    def can_measure(self) -> bool:
        """Whether there are data, with what the loss needs."""
        if not self._batches:
            return False
        return self._loss is not own_loss or isinstance(split(self.model, self._batches[0]).labels, Tensor)

    def loss(self) -> float:
        """The mean loss on the data."""
        assert self._batches, "checked before"
        total, number = 0.0, 0
        with eval_mode(self.model):
            for batch in self._batches:
                count = split(self.model, batch).num_examples
                total += count * float(self._loss(self.model, batch))
                number += count
        return total / number

    def _round_layer(self, name: str, factors: KroneckerFactors) -> set[str]:
        """Rounds the matrix of a layer column by column; the names of what it rounded."""
        own = {weight.name: weight for weight in self.weights}
        weight, bias = own.get(_joined(name, "weight")), own.get(_joined(name, "bias"))
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
        found = torch.zeros_like(mean)
        if name not in self._plans:
            self._plans[name] = list(_plan(kept, factors))
        for group, part, plan in self._plans[name]:
            at = (group, slice(None), part)
            found[at] = round_columns(mean[at], kept[at], step[at], plan, limits[part])
        weight.target.copy_(from_matrix(layer, found[..., :num_columns]) + 0.0)
        if has_bias and bias is not None:
            bias.target.copy_(found[..., -1].reshape(bias.mean.shape) + 0.0)
        self._shift_norm(factors, found - mean)
        return {each.name for each, _ in parts}

    @staticmethod
    def _matrices(layer: VariationalLayer, weight: _Weight, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
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


def _search(work: _Work, fits: Callable[[], bool], what: str, *, larger_fits: bool = False) -> float:
    """The largest kappa that fits (or the smallest, where larger ones do), by bisection; the model is left there.

    Raises:
        InfeasibleTargetError: none does.
    """

    def is_small(kappa: float) -> bool:
        work.round(lambda weight: posterior_grid(weight.mean, weight.precision, weight.kept, kappa, weight.dims))
        return fits() is not larger_fits

    low = high = 1.0
    if is_small(low):
        while high < _LARGEST and is_small(high := high * _FACTOR):
            low = high
    else:
        while low > _SMALLEST and not is_small(low := low / _FACTOR):
            high = low
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if is_small(middle) else (low, middle)
    kappa = high if larger_fits else low
    if is_small(kappa) is larger_fits:
        raise InfeasibleTargetError(f"quantize found no steps that give {what}. Ask for less.")
    return kappa


def _with_posterior(model: nn.Module, batches: list[Any] | None) -> nn.Module:
    """The model itself where it is variational, else a copy with a diagonal Laplace posterior."""
    if any(isinstance(module, VariationalLayer) for module in model.modules()):
        return model
    if not batches:
        raise ValueError(
            f"quantize got a {type(model).__name__} without posterior, and no data to give it one. Pass batches of "
            "training data, or a model from to_variational whose stds were trained."
        )
    return fit_laplace(to_variational(copy.deepcopy(model)), batches, loss=output_metric)


def _factors(source: nn.Module, batches: list[Any]) -> KroneckerPosterior | None:
    try:
        return fit_kronecker(source, batches, num_positions=_POSITIONS)
    except UnsupportedModelError:  # no layer is a matrix product, or none takes examples along its first dimension
        return None


def _plan(kept: Tensor, factors: KroneckerFactors) -> Iterator[tuple[int, slice, list[Sweep]]]:
    """Of each group and block of columns, (G, R, C), in what order they are rounded."""
    start = 0
    for block in factors.inputs:
        part = slice(start, start := start + block.shape[-1])
        for group, precision in enumerate(damped(block, _DAMPING)):
            yield group, part, sweeps(kept[group][:, part], precision)


def _weights(source: nn.Module, model: nn.Module, per: str) -> list[_Weight]:
    """The tensors of `model` that have a posterior in `source`."""
    found = []
    for posterior in named_posteriors(source):
        mean = posterior.mean.detach().cpu().clone()
        kept = mean != 0
        if posterior.mask is not None:
            kept &= posterior.mask.cpu()
        precision = (-2 * posterior.log_std.detach().cpu().double()).exp().expand(mean.shape)
        dims = posterior.unit_dims if per == "channel" else ()
        target = model.get_parameter(posterior.name)
        found.append(_Weight(posterior.name, posterior, target, mean, precision, kept, dims))
    return found


def _embeddings(source: nn.Module, model: nn.Module, per: str, batches: list[Any] | None) -> Iterator[_Weight]:
    """The embeddings of `model`, as exactly known as gradients say; none without data."""
    if not batches or not named_embeddings(source):
        return
    for name, precision in embedding_precisions(source, batches, has_own_stds=source is model).items():
        target = model.get_parameter(name)
        mean = target.detach().cpu().clone()
        everywhere = torch.full((), precision, dtype=torch.double).expand(mean.shape)
        yield _Weight(name, None, target, mean, everywhere, mean != 0, (0,) if per == "channel" else ())


def _fixed(weight: _Weight, bits: int | Mapping[str, int]) -> Grid | None:
    width = width_of(weight.name, bits)
    return None if width is None else width_grid(weight.mean, weight.precision, weight.kept, width, weight.dims)


def _row(weight: _Weight, grid: Grid | None) -> QuantizedTensor:
    value = weight.target.detach().cpu()
    step = torch.ones(()) if grid is None else grid.step
    largest = 0 if grid is None else int((value.double() / step).abs().max().round())
    moved = (value.double() - weight.mean.double()).square() * weight.precision
    return QuantizedTensor(
        name=weight.name,
        numel=value.numel(),
        num_zeros=int((value == 0).sum()),
        step=0.0 if grid is None else float(step.mean()),
        width=8 * value.element_size() if grid is None else (2 * largest).bit_length(),
        entropy_bits=entropy_bits((value.double() / step).round() if grid is not None else value),
        predicted_cost=0.5 * float(moved.sum()),
    )


def _joined(layer: str, parameter: str) -> str:
    return f"{layer}.{parameter}" if layer else parameter


def _check(tolerance: float | None, bits: int | Mapping[str, int] | None, num_bytes: int | None, per: str) -> None:
    """Refuses what is out of range.

    Raises:
        ValueError: it is.
    """
    if sum(option is not None for option in (tolerance, bits, num_bytes)) != 1:
        raise ValueError(
            f"quantize got tolerance={tolerance!r}, bits={bits!r}, bytes={num_bytes!r}; expected one of the three."
        )
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance!r}; expected nats that the loss may rise by, above 0.")
    if num_bytes is not None and num_bytes <= 0:
        raise ValueError(f"bytes is {num_bytes!r}; expected the size of the coded tensors, above 0.")
    widths = [] if bits is None else list(bits.values()) if isinstance(bits, Mapping) else [bits]
    if any(type(width) is not int or not 2 <= width <= 12 for width in widths):
        raise ValueError(f"bits is {bits!r}; expected whole numbers from 2 to 12, or a mapping of names to them.")
    if per not in ("tensor", "channel"):
        raise ValueError(f'per is {per!r}; expected "tensor" or "channel".')
