"""Rules for losses: the expected loss, a plain tensor. No product.

For logits z ~ N(m, S) with p = softmax(m), E logsumexp(z) = logsumexp(m) + (sum p v - p^T S p) / 2 to second order.
Error of the expected cross-entropy, as a fraction of what the variance adds to it, logits of one std s, averaged over
means drawn with the std in brackets:

| classes | s = 0.1 | s = 0.5       | s = 1         | s = 2          | s = 3          |
|---------|---------|---------------|---------------|----------------|----------------|
| 2       | < 1 %   | 3 % (0.5)     | 15 %, 3 % (3) | 46 %, 14 % (3) | 81 %, 27 % (3) |
| 10      | < 1 %   | 1 % (0.5)     | 6 %, 2 % (3)  | 22 %, 8 % (3)  | 44 %, 17 % (3) |
| 100     | < 1 %   | 0.1 % (0.5)   | 1 %, 2 % (3)  | 6 %, 8 % (3)   | 16 %, 16 % (3) |

It is too high for wide logits, so it is hard on variances. The bound of Knowles and Minka (2011), iterated, was no
better: 46 % for ten classes at s = 3 (69 % for sharp ones).

Linear ones (negative log-likelihood, divergence from certain probabilities) and the squared error are exact, as are the
absolute error and Huber's, for a Gaussian; those of single logits or probabilities are a quadrature of 21 nodes.
Cross-entropy is second order. A loss that a model writes out is a tensor with moments; its `backward` is that of the
expected loss.
`settings(taylor=True)` does not concern losses.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from bayesprune.moments.closed_forms import leaky, piecewise, squared
from bayesprune.moments.covariance import aligned
from bayesprune.moments.gaussian import Formula, gauss_hermite, std, total
from bayesprune.moments.memory import KnownMoments
from bayesprune.moments.registry import follows_directions, register_rule
from bayesprune.moments.rules import queries as _queries  # noqa: F401  (refuses `backward`: the rule here comes after)
from bayesprune.moments.tensor import Moments, is_uncertain, known, parts, plain

_NUM_NODES = 21  # functions of a few outputs cost next to nothing


def log_normaliser_excess(x: KnownMoments, dim: int) -> Tensor:
    """The part of the expected log-sum-exp that variance adds, to second order; without the summed dimension."""
    (mean, variance, shared), directions, residual = x
    assert variance is not None, "certain logits add nothing"
    p = torch.softmax(mean.to(variance.dtype), dim)
    if directions is not None:
        quadratic = (directions * p).sum(dim % p.dim() + 1).square().sum(0)
        if residual is not None:
            quadratic = quadratic + (p.square() * residual).sum(dim)
        return 0.5 * ((p * variance).sum(dim) - quadratic).clamp_min(0)
    if shared is not None and aligned(shared, p.dim()).shape[dim] == 1 < p.shape[dim]:
        variance = variance - aligned(shared, p.dim())  # the same for all logits, it cancels
    return 0.5 * (p * (1 - p) * variance).sum(dim)


def expected(x: Moments, function: Callable[[Tensor], Tensor]) -> Tensor:
    """E f(x) of an elementwise function, by quadrature over the tensor that x was made of."""
    source = x.source if x.source.is_gaussian else x.source.base
    mean, variance, _ = source.parts()
    assert variance is not None, "a certain tensor needs no expectation"
    m, s = mean.to(variance.dtype), std(variance)
    nodes, weights = gauss_hermite(_NUM_NODES)
    values = (function(m + s * node if source is x.source else x.source.value(m + s * node)) for node in nodes)
    return total([weight * value for weight, value in zip(weights, values, strict=True)])


@register_rule(F.cross_entropy)
@follows_directions
def cross_entropy(
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Classes along dimension 1, 0 of a single example; the target holds classes, or probabilities: their means."""
    reduction, target = _reduction(size_average, reduce, reduction), plain(target)
    options = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if not is_uncertain(input):
        return F.cross_entropy(plain(input), target, reduction=reduction, **options)
    x = known(input)
    assert x.parts.variance is not None, "it is uncertain"
    dim = min(input.dim() - 1, 1)
    logits = x.parts.mean.to(x.parts.variance.dtype)
    # The loss is linear in log p, and the expected normaliser adds the same to each of them.
    losses = F.cross_entropy(logits, target, reduction="none", **options)
    mass, count = _mass(logits, target, dim, weight, ignore_index, label_smoothing)
    losses = losses + log_normaliser_excess(x, dim) * mass
    return losses.sum() / count if reduction == "mean" else _reduced(losses, reduction)


@register_rule(F.nll_loss)
@follows_directions
def nll_loss(input: Any, target: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Linear in the log-probabilities."""
    return F.nll_loss(plain(input), plain(target), *args, **kwargs)


@register_rule(F.kl_div)
@follows_directions
def kl_div(input: Any, target: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Linear in the log-probabilities `input`; the target must be certain."""
    if is_uncertain(target):
        raise NotImplementedError("moments: kl_div has no rule for an uncertain target; detach it: target.mean.")
    return F.kl_div(plain(input), target, *args, **kwargs)


@register_rule(F.mse_loss)
@follows_directions
def mse_loss(
    input: Any,
    target: Any,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Squared error of the mean, plus the variance."""
    losses = _expected(_difference(input, target), torch.square, squared)
    return _reduced(losses, _reduction(size_average, reduce, reduction), weight)


@register_rule(F.l1_loss)
@follows_directions
def l1_loss(
    input: Any,
    target: Any,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """Absolute error."""
    losses = _expected(_difference(input, target), torch.abs, leaky(-1.0))
    return _reduced(losses, _reduction(size_average, reduce, reduction), weight)


@register_rule(F.huber_loss)
@follows_directions
def huber_loss(
    input: Any, target: Any, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """Half the squared error up to `delta`, linear beyond."""
    losses = _expected_huber(_difference(input, target), delta)
    return _reduced(losses if weight is None else losses * weight, reduction)


@register_rule(F.smooth_l1_loss)
@follows_directions
def smooth_l1_loss(
    input: Any,
    target: Any,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    """Huber's loss over its threshold."""
    if beta == 0:
        return l1_loss(input, target, size_average, reduce, reduction)
    losses = _expected_huber(_difference(input, target), beta) / beta
    return _reduced(losses, _reduction(size_average, reduce, reduction))


@register_rule(F.binary_cross_entropy_with_logits)
@follows_directions
def binary_cross_entropy_with_logits(
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Linear in the targets, of which uncertain ones count by their mean."""
    reduction, target = _reduction(size_average, reduce, reduction), plain(target)
    stock = partial(F.binary_cross_entropy_with_logits, weight=weight, pos_weight=pos_weight)
    if not is_uncertain(input):
        return stock(plain(input), target, reduction=reduction)
    return _reduced(expected(input, lambda z: stock(z, target, reduction="none")), reduction)


@register_rule(F.binary_cross_entropy)
@follows_directions
def binary_cross_entropy(
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Of probabilities: right for those that are a function of logits, as a sigmoid in the same forward is."""
    reduction, target = _reduction(size_average, reduce, reduction), plain(target)
    if not is_uncertain(input):
        return F.binary_cross_entropy(plain(input), target, weight=weight, reduction=reduction)

    def loss(p: Tensor) -> Tensor:
        return F.binary_cross_entropy(p.clamp(0, 1), target.to(p.dtype), weight=weight, reduction="none")

    return _reduced(expected(input, loss), reduction)


@register_rule(F.gaussian_nll_loss)
@follows_directions
def gaussian_nll_loss(
    input: Any, target: Any, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Tensor:
    """Exact in input and target; the noise variance `var` must be certain."""
    if is_uncertain(var):
        raise NotImplementedError("moments: gaussian_nll_loss has no rule for an uncertain var; detach it: var.mean.")
    mean, variance, _ = parts(_difference(input, target))
    assert variance is not None, "one of them is uncertain"
    var = torch.as_tensor(var, dtype=variance.dtype, device=variance.device)
    losses = F.gaussian_nll_loss(mean, torch.zeros_like(mean), var.expand(mean.shape), full, eps, "none")
    return _reduced(losses + 0.5 * variance / var.clamp_min(eps), reduction)


@register_rule(Tensor.backward)
@follows_directions
def backward(self: Moments, *args: Any, **kwargs: Any) -> None:
    """Gradients of the mean: of the expected loss."""
    parts(self).mean.backward(*args, **kwargs)


def _mass(
    logits: Tensor, target: Tensor, dim: int, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor | float]:
    """The sum over classes of weight times target, for each example, and what their mean is divided by."""
    num_classes = logits.shape[dim]
    weight = torch.ones(num_classes, dtype=logits.dtype, device=logits.device) if weight is None else weight
    if target.is_floating_point():
        smoothed = target.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / num_classes
        shape = (-1, *(1,) * (logits.dim() - 1 - dim))
        return (smoothed * weight.reshape(shape)).sum(dim), logits.numel() / num_classes
    counts = target != ignore_index
    own = weight[target.where(counts, 0)] * counts
    return own * (1 - label_smoothing) + counts * (label_smoothing / num_classes) * weight.sum(), own.sum()


def _difference(input: Any, target: Any) -> Moments:
    if input.shape == target.shape:
        return input - target  # as they are: a view is no longer the tensor that another was made of
    shape = torch.broadcast_shapes(input.shape, target.shape)
    return input.expand(shape) - target.expand(shape)


def _expected(x: Moments, function: Callable[[Tensor], Tensor], formula: Formula) -> Tensor:
    if not x.source.is_gaussian:
        return expected(x, function)
    mean, variance, _ = parts(x)
    assert variance is not None, "one of them is uncertain"
    return formula(mean.to(variance.dtype), variance).mean


def _expected_huber(x: Moments, delta: float) -> Tensor:
    pieces = [(-(delta**2) / 2, -delta), (0.0, 0.0, 0.5), (-(delta**2) / 2, delta)]

    def loss(t: Tensor) -> Tensor:
        return F.huber_loss(t, torch.zeros_like(t), reduction="none", delta=delta)

    return _expected(x, loss, piecewise([-delta, delta], pieces))


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    return reduction if size_average is None and reduce is None else legacy_get_string(size_average, reduce)


def _reduced(losses: Tensor, reduction: str, weight: Tensor | None = None) -> Tensor:
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}; expected one of none, sum, mean.")
    losses = losses if weight is None else losses * weight
    if reduction == "mean":
        return losses.mean() if weight is None else losses.sum() / weight.sum()
    return losses.sum() if reduction == "sum" else losses
