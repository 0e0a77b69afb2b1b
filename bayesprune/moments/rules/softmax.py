"""Rules for softmax, its logarithm and log-sum-exp.

Means are of second order: E p = softmax(m + v (1 - 2 p) / (2 + v)), which is p + 1/2 sum_j v_j d2p/dm_j2 for a small v
and keeps the order of the logits for a large one; E logsumexp = logsumexp(m) + 1/2 sum_j p_j (1 - p_j) v_j.
Variances are of first order at that mean: with the Jacobian J = diag(p) - p p^T, var = diag(J diag(v) J^T), so that
var_i = p_i^2 ((1 - 2 p_i) v_i + sum_j p_j^2 v_j), and no matrix is formed. What all logits of a row share cancels,
since J 1 = 0, and is taken off v first. Probabilities add to one, so they share -mean(var) / (n - 1) along the row.

Seen against samples, n = 5 and 30 logits of std 1: the mean is off by 0.03 stds of p at v = 0.5 and 0.05 at v = 1
(0.12 and 0.16 to first order), the variance by 4 % at v = 0.1, 15 to 20 % at v = 0.5. No product of matrices.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesprune.moments.registry import register_rule
from bayesprune.moments.rules.reductions import dims_of, of_value
from bayesprune.moments.settings import current
from bayesprune.moments.shared import aligned, is_tracked
from bayesprune.moments.tensor import Moments, parts


@register_rule(F.softmax, torch.softmax, Tensor.softmax)
def softmax(input: Moments, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Moments:
    """Along a dimension; where a logit is -inf, probability and variance are 0."""
    dim = _dim(input, dim)
    variance = without_shared(input, dim)
    logits = parts(input).mean.to(variance.dtype)
    p = torch.softmax(logits, dim)
    if not current().taylor:
        p = torch.softmax(logits + variance * (1 - 2 * p) / (2 + variance), dim)
    squares = p.square()
    own = squares * variance
    total = (own * (1 - 2 * p) + squares * own.sum(dim, keepdim=True)).clamp_min(0)
    count, shared = p.shape[dim], None
    if is_tracked() and count > 1:
        shared = total.sum(dim, keepdim=True) / (-count * (count - 1))
    return Moments(p.to(dtype or input.dtype), total, shared)


@register_rule(F.log_softmax, torch.log_softmax, Tensor.log_softmax)
def log_softmax(
    input: Moments, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Moments:
    """Along a dimension: var_i = (1 - 2 p_i) v_i + sum_j p_j^2 v_j."""
    dim = _dim(input, dim)
    variance = without_shared(input, dim)
    value = torch.log_softmax(parts(input).mean.to(variance.dtype), dim)
    p = value.exp()
    if not current().taylor:
        value = value - 0.5 * (p * (1 - p) * variance).sum(dim, keepdim=True)
    total = (1 - 2 * p) * variance + (p.square() * variance).sum(dim, keepdim=True)
    return Moments(value.to(dtype or input.dtype), total.clamp_min(0))


@register_rule(torch.logsumexp, Tensor.logsumexp)
def logsumexp(input: Moments, dim: Any, keepdim: bool = False) -> Moments:
    """var = sum_j p_j^2 v_j, and all of what the entries share."""
    mean = parts(input).mean
    dims = dims_of(dim, mean.dim())
    whole = torch.logsumexp(mean, dims, True)
    p = (mean - whole).exp()
    if not current().taylor:
        alone = without_shared(input, dims[0]) if len(dims) == 1 else parts(input).variance
        whole = whole + (0.5 * (p * (1 - p) * alone).sum(dims, keepdim=True)).to(mean.dtype)  # type: ignore[operator]
    return of_value(whole if keepdim else whole.squeeze(dims), input, p, dims, keepdim)


def without_shared(x: Moments, dim: int) -> Tensor:
    """The variance, less what entries share along this dimension."""
    _, variance, shared = parts(x)
    assert variance is not None, "a rule is for uncertain tensors"
    if shared is None or not is_tracked():
        return variance
    shared = aligned(shared, variance.dim())
    return (variance - shared).clamp_min(0) if shared.shape[dim] == 1 < variance.shape[dim] else variance


def _dim(x: Moments, dim: int | None) -> int:
    """The dimension, or the one that torch assumes."""
    return dim if dim is not None else 0 if x.dim() in (0, 1, 3) else 1
