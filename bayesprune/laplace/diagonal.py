"""The diagonal Laplace posterior: a source of stds for a converted model that needs no training.

The precision of a weight is num_data times its Fisher information, the mean over examples of the squared gradient of
one example's loss, plus the precision of the prior (MacKay, 1992; Kirkpatrick et al., 2017). SNR^2 = mu^2 * precision
is then twice the saliency of Optimal Brain Damage (LeCun et al., 1989), with the prior added to the curvature.

Squares are of true per-example gradients, summed over an example's positions first. They come layer by layer from
inputs and output gradients, one batched matrix product a layer; layers that are no matrix product (transposed or
weight-standardised convolutions) run backward once for each example.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.model import eval_mode
from bayesprune.foundation.sharding import check_whole
from bayesprune.foundation.text import first_names
from bayesprune.laplace.calibration import Call, Loss, check_sums, record
from bayesprune.laplace.matrices import from_matrix, input_rows, is_matrix_product, output_rows
from bayesprune.layers import Posterior, named_posteriors
from bayesprune.priors import BoundGaussian, BoundPrior, Gaussian, Prior
from bayesprune.train.kl import bind_prior

_MAX_NUMBERS = 2**25  # of per-example gradients held at a time: 128 MiB


def fit_laplace(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    num_data: int | None = None,
    loss: Loss | None = None,
    prior: Prior | None = None,
    num_batches: int | None = None,
) -> nn.Module:
    """The model with the stds of a diagonal Laplace posterior around its means, in place; nothing is trained.

    Where stds are shared (rank_one, per_channel) they are the best fit to those of single weights, see
    `bayesprune.laplace.collapse`. A layer whose gradients cannot be told apart by example keeps its stds, and a warning
    names it: `nn.MultiheadAttention`, stacked experts, and layers that did not run.

    Cost: a forward and a backward over the data, and for each layer as many multiplications again as its forward has.
    Memory: the batch's layer inputs and outputs, 128 MiB of per-example gradients (one example's, if that is more).

    Args:
        model: A variational model that is trained; its means stay as they are.
        loader: Calibration batches: (inputs, labels), (x1, x2, labels), or mappings of keyword arguments and `labels`.
        num_data: How many examples the posterior stands for: the size of the training set. None is the number seen.
        loss: loss(model, batch), the mean over examples of each one's negative log-likelihood. None is that of a
            classifier with labels drawn from its own predictions, `bayesprune.laplace.sampled_cross_entropy`;
            `bayesprune.laplace.cross_entropy` takes those of the data.
        prior: A `priors.Gaussian`, whose precision is added; None is `Gaussian("layer_rms")`.
        num_batches: No more batches than these.

    Raises:
        ValueError: there is no batch, no variational layer, or gradients are not finite.
        UnsupportedModelError: the prior has no precision, layers do not take examples along the first dimension, or
            the model is sharded over processes.

    Examples:
        >>> import torch, bayesprune as bp
        >>> model = bp.to_variational(torch.nn.Linear(4, 3))
        >>> batches = [(torch.randn(32, 4), torch.randint(3, (32,)))]
        >>> model = bp.laplace.fit_laplace(model, batches, num_data=50_000)
    """
    check_whole(model, "fit_laplace")
    precisions = prior_precisions(model, prior)
    squares, seen = sums_of_squares(model, loader, loss=loss, num_batches=num_batches)
    for name, total in squares.items():
        check_sums(name, seen, [total])
    scale = (seen if num_data is None else num_data) / seen
    for posterior, precision in precisions.items():
        if posterior.name in squares:
            set_precision(posterior, scale * squares[posterior.name] + precision)
    _warn_of_others(precisions, squares)
    return model


@torch.no_grad()
def sums_of_squares(
    model: nn.Module, loader: Iterable[Any], *, loss: Loss | None = None, num_batches: int | None = None
) -> tuple[dict[str, Tensor], int]:
    """Sums over examples of squared per-example gradients, by parameter name and of its shape; how many examples.

    A tied parameter's gradients are summed over its layers, a layer that runs twice over its runs, before squaring.
    """
    names = {id(posterior.mean): posterior.name for posterior in named_posteriors(model)}
    sums: dict[str, Tensor] = {}
    seen = 0
    for batch in record(model, loader, loss=loss, num_batches=num_batches):
        seen += batch.num_examples
        users: dict[str, list[tuple[Call, str]]] = defaultdict(list)
        for call in (call for calls in batch.calls.values() for call in calls):
            for parameter in call.layer.active_names():
                users[names[id(getattr(call.layer, parameter))]].append((call, parameter))
        for name, calls in users.items():
            total = _sum_of_squares(calls, batch.num_examples).double()
            sums[name] = sums[name] + total if name in sums else total
    return sums, seen


def per_example_gradients(call: Call, parameter: str, num_examples: int) -> Tensor:
    """Gradients of each example's loss, (N, *parameter's shape), float32 at least."""
    layer, inputs, gradients, _ = call
    if not is_matrix_product(layer):
        return _one_by_one(call, parameter, num_examples)
    outer = output_rows(layer, _wide(gradients), num_examples)
    if parameter == "bias":
        return outer.sum(1).flatten(1)
    products = torch.einsum("ntgr,ntgc->ngrc", outer, input_rows(layer, _wide(inputs), num_examples))
    return torch.vmap(lambda product: from_matrix(layer, product))(products)


def _sum_of_squares(calls: list[tuple[Call, str]], num_examples: int) -> Tensor:
    call, parameter = calls[0]
    numel = getattr(call.layer, parameter).numel()
    size = max(1, min(num_examples, _MAX_NUMBERS // numel))
    total: Tensor | float = 0.0
    for start in range(0, num_examples, size):
        count = min(size, num_examples - start)
        first, *others = (
            per_example_gradients(_examples(call, start, count, num_examples), parameter, count)
            for call, parameter in calls
        )
        total = total + sum(others, start=first).square_().sum(0)
    assert isinstance(total, Tensor), "a batch has examples"
    return total


def _examples(call: Call, start: int, count: int, num_examples: int) -> Call:
    """The call on some of the batch's examples."""
    rows = slice(*(len(call.inputs) // num_examples * at for at in (start, start + count)))
    return call._replace(inputs=call.inputs[rows], gradients=call.gradients[rows])


@torch.enable_grad()
def _one_by_one(call: Call, parameter: str, num_examples: int) -> Tensor:
    """The same for any layer: backward once for each example."""
    layer = call.layer
    tensors = {name: _wide(getattr(layer, name).detach()).requires_grad_() for name in layer.active_names()}
    own = (*layer._parameters.items(), *layer._buffers.items())
    others = {name: _wide(tensor.detach()) for name, tensor in own if tensor is not None and name not in tensors}
    found = []
    for index in range(num_examples):
        _, inputs, gradients, operation = _examples(call, index, 1, num_examples)
        with eval_mode(layer), layer.substituted(**others):
            output = operation(_wide(inputs), tensors["weight"], tensors.get("bias"))
        found += torch.autograd.grad(output, tensors[parameter], _wide(gradients))
    return torch.stack(found)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _warn_of_others(posteriors: Iterable[Posterior], found: Mapping[str, Any]) -> None:
    others = [posterior.name for posterior in posteriors if posterior.name not in found]
    if others:
        warnings.warn(
            f"{len(others)} parameters keep the stds that they had, since nothing is known of their gradients: "
            f"{first_names(others, most=5)}.",
            stacklevel=3,
        )


_MAX_SWEEPS, _TOLERANCE = 200, 1e-7


def collapse(precision: Tensor, shapes: Sequence[tuple[int, ...]], keep: Tensor | None = None) -> list[Tensor]:
    """Log stds of these shapes, whose broadcast sum l is the best structured fit to independent Gaussians.

    Best is the smallest KL(q || p) of q = N(m, exp(2 l)) from p = N(m, 1 / precision), the direction of variational
    inference: with t = exp(2 l) precision it is 1/2 sum[ t - 1 - ln t ] nats. Its derivative by one number of one part
    is the sum of (t - 1) over the weights that share it, so t has mean 1 over them:

    - per weight: t = 1, the variance is 1 / precision.
    - per channel: the variance is 1 / (mean precision of the channel).
    - rank one: t has mean 1 over each row and over each column, which alternating between rows and columns reaches
      (Sinkhorn's scaling of a positive matrix; the KL is convex in the log stds). Only the sum of the parts is unique.

    Args:
        precision: Precision of every weight, positive.
        shapes: Shape of each part, 1 in the dimensions along which a number is shared.
        keep: True for the weights that count; None is all. Numbers that no kept weight shares are NaN.
    """
    precision = precision.double()
    counted = torch.ones_like(precision) if keep is None else keep.to(precision)
    counts = [counted.sum_to_size(shape) for shape in shapes]
    parts = [torch.zeros_like(count) for count in counts]
    for _ in range(_MAX_SWEEPS if len(parts) > 1 else 1):
        change = 0.0
        for index, part in enumerate(parts):
            others = sum((other for i, other in enumerate(parts) if i != index), start=precision.new_zeros(()))
            scaled = (precision * (2 * others).exp() * counted).sum_to_size(part.shape)
            parts[index] = torch.where(counts[index] > 0, -0.5 * (scaled / counts[index]).log(), 0.0)
            change = max(change, float((parts[index] - part).abs().max()))
        if change < _TOLERANCE:
            break
    return [part.masked_fill(count == 0, torch.nan) for part, count in zip(parts, counts, strict=True)]


@torch.no_grad()
def set_precision(posterior: Posterior, precision: Tensor) -> None:
    """Sets the stds of a posterior to the best fit of its structure, in place; those of removed weights stay."""
    stds = posterior.log_std_parts
    fitted = collapse(precision, [tuple(part.shape) for part in stds], posterior.mask)
    for part, values in zip(stds, fitted, strict=True):
        part.copy_(torch.where(values.isnan(), part, values.to(part)))


def prior_precisions(model: nn.Module, prior: Prior | None) -> dict[Posterior, float]:
    """1 / variance of the prior of every posterior; None is `Gaussian("layer_rms")`.

    Raises:
        ValueError: the model has no variational layer.
        UnsupportedModelError: the prior is not Gaussian.
    """
    bound = bind_prior(model, Gaussian() if prior is None else prior)
    return {posterior: _precision(posterior.name, its) for posterior, its in bound.items()}


def _precision(name: str, prior: BoundPrior) -> float:
    if not isinstance(prior, BoundGaussian):
        raise UnsupportedModelError(
            f"the prior of {name} is {type(prior).__name__}, which has no precision of its own; expected "
            "priors.Gaussian."
        )
    return prior.scale**-2
