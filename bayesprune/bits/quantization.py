"""Rounds a model's weights by how exactly its posterior says that they have to be known."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayesprune.bits.others import either, embedding_precisions, named_embeddings
from bayesprune.bits.report import Quantization, QuantizedTensor
from bayesprune.bits.rounding import round_alone
from bayesprune.bits.steps import Grid, posterior_grid, width_grid, width_of
from bayesprune.bits.work import Weight, Work
from bayesprune.convert import to_variational
from bayesprune.errors import InfeasibleTargetError
from bayesprune.foundation.batches import with_examples
from bayesprune.foundation.model import bare_model
from bayesprune.foundation.sharding import check_whole
from bayesprune.foundation.text import first_names
from bayesprune.laplace import fit_laplace, output_metric
from bayesprune.laplace.calibration import Loss, own_loss
from bayesprune.layers import VariationalLayer, named_posteriors
from bayesprune.storage.coding import entropy_bits
from bayesprune.train import kl_divergence

_COARSE, _FINE = (8.0, 6), (1.25, 2)
"""By what factors kappa is bracketed, and how often the bracket is halved: to three to six percent of kappa."""
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
    compensate: bool | Literal["alone"] = True,
    loss: Loss | None = None,
) -> Quantization:
    """Rounds the weights to grids, in place, so that `save(coding="entropy")` writes a small file; says what it did.

    A weight that the posterior knows to within sigma needs no finer grid: one constant sets the steps of the whole
    model (see `bayesprune.bits.steps`), and is searched for the largest tolerated loss, or the largest file. Weights
    that are zero stay zero. With data the weights of a row make up for each other's rounding (see
    `bayesprune.bits.rounding`), and each layer for those before it (`bayesprune.bits.work`). Biases of converted layers
    are rounded like weights, and so are embeddings where there are data. What else has no posterior, such as norms,
    their running statistics and frozen layers (`requires_grad=False`), keeps 11 significant bits, as many as float16
    has. The values remain ordinary tensors of the same dtype: nothing is attached to the model. Training on makes it an
    ordinary one again, unless `bits.StraightThrough` holds it to its grids.

    Args:
        model: A variational model, whose own stds are used, or a stock one; that is given a diagonal Laplace posterior
            on the data for this alone, in the metric of the logits (`laplace.output_metric`).
        data: Batches in any form that `bayesprune.foundation.batches` names; all are kept in memory. Training data.
        tolerance: By how many nats the mean loss on the data may rise. Needs data.
        bits: Instead, a fixed width: 2^bits - 1 places about zero for each tensor, or channel; 2 to 12, of which
            bfloat16 has 9. A mapping gives the widths by the longest prefix of a tensor's name; weights and biases of
            other names stay as they are.
        bytes: Instead, the largest size of all tensors of the state dict, coded; the header of the file comes on top,
            some 300 bytes.
        per: Whether a tensor has one step, or each of its output channels. Coded files have steps along the first
            dimension alone, so a weight whose outputs another one numbers (transposed convolutions, `Conv1D` of GPT-2,
            stacked experts) has one step in either case.
        compensate: How weights make up for rounding where there are data. True goes through the layers in the order of
            the forward: each is fitted to what the model gave before rounding, from what the rounded layers before it
            give, and rounded column by column. "alone" does not fit and takes the inputs that the layers had before:
            faster, and less exact. False rounds each weight by itself.
        loss: loss(model, batch), a mean over examples in nats. None is the model's own, where its forward takes
            `labels` as those of transformers do, else `laplace.cross_entropy`, of the data's labels; where neither can
            be computed and nothing needs it, the report has no losses. Of a model whose outputs are neither (examples,
            classes) nor (examples, tokens, classes) it also says how exactly weights have to be known.

    Raises:
        TypeError: the loss returned no number, or one without a gradient where one is taken.
        ValueError: not exactly one of tolerance, bits and bytes is given, or one is out of range; data are missing, or
            have no loss that is a number.
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
    model = bare_model(model)
    _check(tolerance, bits, bytes, per, compensate)
    batches = None if data is None else list(with_examples(model, data))
    if tolerance is not None and not batches:
        raise ValueError("tolerance needs data to measure the loss on; pass batches, or ask for bits or bytes.")
    loss = own_loss if loss is None else loss
    metric = either(output_metric, loss)
    source = _with_posterior(model, batches, metric)
    kl_nats = float(kl_divergence(model)) if source is model else None
    weights = [*_weights(source, per), *_embeddings(source, per, batches, metric, has_own_stds=source is model)]
    if isinstance(bits, Mapping) and (
        unknown := [name for name in bits if not any(width_of(weight.name, {name: 2}) for weight in weights)]
    ):
        raise ValueError(
            f"bits names {first_names(unknown)}; expected prefixes of names of tensors that are rounded, such as "
            f"{first_names(weight.name for weight in weights)}."
        )
    if bits is not None:
        weights = [weight for weight in weights if weight.posterior or width_of(weight.name, bits)]
    work = Work(source, weights, batches, loss, compensate=compensate)
    before = work.measured()
    kappa = None
    try:
        if bits is not None:
            work.round_in_sequence(lambda weight: _fixed(weight, bits))
        elif tolerance is not None:
            limit = _finite(work.loss() if before is None else before) + tolerance
            kappa = _search(work, lambda: work.loss() <= limit, f"a loss within {tolerance:g} nats")
        elif bytes is not None:
            kappa = _search(work, lambda: work.coded_bytes() <= bytes, f"{bytes:,} bytes", larger_fits=True)
        report = Quantization(
            tensors=tuple(_row(weight, work.grids[weight.name]) for weight in weights),
            kappa=kappa,
            loss_before=before,
            loss_after=None if before is None else work.loss(),
            coded_bytes=work.coded_bytes() if find_spec("constriction") else None,
            float_bytes=sum(tensor.nbytes for tensor in work.saved().values()),
            kl_nats=kl_nats,
            grids={name: grid for name, grid in work.grids.items() if grid is not None},
        )
    except BaseException:
        work.restore()
        raise
    if source is not model:
        found = source.state_dict()
        pairs = [(tensor, found[name]) for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)]
        for tensor, value in pairs:
            tensor.copy_(value)
    return report


def _finite(loss: float) -> float:
    """The loss before anything is rounded.

    Raises:
        ValueError: it is no number.
    """
    if not math.isfinite(loss):
        raise ValueError(
            f"the mean loss on the data is {loss}, to which no tolerance can be added; expected a finite number. Leave "
            "out batches of which no label counts (all are -100), or ask for bits or bytes."
        )
    return loss


def _search(work: Work, fits: Callable[[], bool], what: str, *, larger_fits: bool = False) -> float:
    """The largest kappa that fits (or the smallest, where larger ones do); the model is left there.

    By bisection, each layer rounded alone, and from there in sequence, which takes longer.

    Raises:
        InfeasibleTargetError: none does.
    """
    at = None

    def is_small(kappa: float) -> bool:
        nonlocal at
        if kappa != at:
            rounded(lambda weight: posterior_grid(weight.mean, weight.precision, weight.kept, kappa, weight.dims))
            at = kappa
        return fits() is not larger_fits

    rounded, kappa = work.round, 1.0
    for factor, steps in (_COARSE, _FINE)[: 1 + work.is_sequential]:
        low = high = kappa
        if is_small(low):
            while high < _LARGEST and is_small(high := high * factor):
                low = high
        else:
            while low > _SMALLEST and not is_small(low := low / factor):
                high = low
        for _ in range(steps):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if is_small(middle) else (low, middle)
        kappa = high if larger_fits else low
        if is_small(kappa) is larger_fits:
            advice = "Allow more of them." if larger_fits else "Allow a larger loss, or ask for bits or bytes."
            raise InfeasibleTargetError(f"quantize found no steps that give {what}. {advice}")
        rounded, at = work.round_in_sequence, None
    return kappa


def _with_posterior(model: nn.Module, batches: list[Any] | None, metric: Loss) -> nn.Module:
    """The model itself where it is variational, else a copy with a diagonal Laplace posterior in this metric."""
    if any(isinstance(module, VariationalLayer) for module in model.modules()):
        return model
    if not batches:
        raise ValueError(
            f"quantize got a {type(model).__name__} without posterior, and no data to give it one. Pass batches of "
            "training data, or a model from to_variational whose stds were trained."
        )
    return fit_laplace(to_variational(copy.deepcopy(model)), batches, loss=metric)


def _weights(source: nn.Module, per: str) -> list[Weight]:
    """The tensors that have a posterior."""
    found = []
    for posterior in named_posteriors(source):
        mean = posterior.mean.detach().cpu().clone()
        kept = mean != 0
        if posterior.mask is not None:
            kept &= posterior.mask.cpu()
        precision = (-2 * posterior.log_std.detach().cpu().double()).exp().expand(mean.shape)
        dims = (0,) if per == "channel" and posterior.unit_dims == (0,) else ()
        found.append(Weight(posterior.name, posterior, posterior.mean, mean, precision, kept, dims))
    return found


def _embeddings(
    source: nn.Module, per: str, batches: list[Any] | None, metric: Loss, *, has_own_stds: bool
) -> Iterator[Weight]:
    """The embeddings, as exactly known as gradients say; none without data."""
    if not batches or not named_embeddings(source):
        return
    precisions = embedding_precisions(source, batches, has_own_stds=has_own_stds, metric=metric)
    for name, precision in precisions.items():
        target = source.get_parameter(name)
        mean = target.detach().cpu().clone()
        everywhere = torch.full((), precision, dtype=torch.double).expand(mean.shape)
        yield Weight(name, None, target, mean, everywhere, mean != 0, (0,) if per == "channel" else ())


def _fixed(weight: Weight, bits: int | Mapping[str, int]) -> Grid | None:
    width = width_of(weight.name, bits)
    return None if width is None else width_grid(weight.mean, weight.precision, weight.kept, width, weight.dims)


def _row(weight: Weight, grid: Grid | None) -> QuantizedTensor:
    value = weight.target.detach().cpu()
    step = torch.ones(()) if grid is None else grid.step
    largest = 0 if grid is None else int((value.double() / step).abs().max().round())
    alone = weight.mean if grid is None else round_alone(weight.mean, weight.kept, grid)
    moved = (alone.double() - weight.mean.double()).square() * weight.precision
    return QuantizedTensor(
        name=weight.name,
        numel=value.numel(),
        num_zeros=int((value == 0).sum()),
        step=0.0 if grid is None else float(step.mean()),
        width=8 * value.element_size() if grid is None else (2 * largest).bit_length(),
        entropy_bits=entropy_bits((value.double() / step).round() if grid is not None else value),
        predicted_cost=0.5 * float(moved.sum()),
    )


def _check(
    tolerance: float | None,
    bits: int | Mapping[str, int] | None,
    num_bytes: int | None,
    per: str,
    compensate: bool | str,
) -> None:
    """Refuses what is out of range.

    Raises:
        ValueError: it is.
    """
    if sum(option is not None for option in (tolerance, bits, num_bytes)) != 1:
        raise ValueError(
            f"quantize got tolerance={tolerance!r}, bits={bits!r}, bytes={num_bytes!r}; expected one of the three."
        )
    if tolerance is not None and not (isinstance(tolerance, Real) and tolerance > 0):
        raise ValueError(f"tolerance is {tolerance!r}; expected nats that the loss may rise by, above 0.")
    if num_bytes is not None and not (isinstance(num_bytes, Real) and num_bytes > 0):
        raise ValueError(f"bytes is {num_bytes!r}; expected the size of the coded tensors, above 0.")
    widths = [] if bits is None else list(bits.values()) if isinstance(bits, Mapping) else [bits]
    if any(type(width) is not int or not 2 <= width <= 12 for width in widths):
        raise ValueError(f"bits is {bits!r}; expected whole numbers from 2 to 12, or a mapping of names to them.")
    if per not in ("tensor", "channel"):
        raise ValueError(f'per is {per!r}; expected "tensor" or "channel".')
    if compensate not in (True, False, "alone"):
        raise ValueError(f'compensate is {compensate!r}; expected True, "alone" or False.')
