"""Rules for normalisations: the divisor is taken at its expected square, E x^2 = mean square + mean variance.

For n entries normalised together, y = c / r with c = x - mean(x), to first order
dy_i = (dc_i - y_i mean_j(y_j dc_j)) / r. So for independent entries, with w = var c,
var y_i = (w_i (1 - 2 y_i^2 / n) + y_i^2 mean_j(y_j^2 w_j) / n) / r^2.
No product.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesprune.moments.covariance import aligned, is_tracked, linearised, mean_over, products_of_pairs, shared_dims
from bayesprune.moments.elementwise import affine
from bayesprune.moments.gaussian import std
from bayesprune.moments.memory import MomentTensors
from bayesprune.moments.registry import follows_directions, register_rule
from bayesprune.moments.tensor import Moments, is_uncertain, known, parts


@register_rule(F.batch_norm)
@follows_directions
def batch_norm(
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Per channel of (N, C, ...): by running statistics, or by those of the batch.

    The mean of the batch takes out what all its positions have in common. Between examples that is what it is inside
    one: the weights are the same (seen: 0.572 and 0.573 of the variance, and 0.000 of it behind the norm).
    """
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("batch_norm got training=False and no running statistics; expected one of the two.")
        return _by_statistics(input, running_mean, running_var, weight, bias, eps)
    alone, centre, square = _statistics(input, [dim for dim in range(input.dim()) if dim != 1])
    if running_mean is not None and running_var is not None:
        count = input.numel() // input.shape[1]
        _track(running_mean, running_var, centre, square * (count / max(count - 1, 1)), momentum)
    if known(input).directions is None:
        return _by_statistics(alone, centre, square, weight, bias, eps)

    def rule(x: Any, *_: Any) -> Any:
        return _by_statistics(x, centre, square, weight, bias, eps)

    return linearised(_by_its_own_statistics, rule)(input, weight, bias, eps)


@register_rule(torch.batch_norm)
@follows_directions
def batch_norm_of_torch(
    input: Any,
    weight: Any,
    bias: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    """The same, its arguments in another order."""
    return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


@register_rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    input: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Moments:
    """Over the last dimensions."""
    return _scaled(_normalised(parts(input), len(normalized_shape), eps), weight, bias)


@register_rule(F.rms_norm, torch.rms_norm)
def rms_norm(input: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Moments:
    """Over the last dimensions, without subtracting a mean."""
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _scaled(_normalised(parts(input), len(normalized_shape), eps, is_centred=False), weight, None)


@register_rule(F.group_norm, torch.group_norm)
def group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Moments:
    """Over the channels of a group and all positions of (N, C, ...)."""
    grouped = input.reshape(input.shape[0], num_groups, -1, *input.shape[2:])
    result = _normalised(parts(grouped), grouped.dim() - 2, eps).reshape(input.shape)
    shape = (-1, *(1,) * (input.dim() - 2))
    return _scaled(result, *(None if p is None else p.reshape(shape) for p in (weight, bias)))


@register_rule(F.instance_norm)
@follows_directions
def instance_norm(
    input: Any,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """Over the positions of each channel; by running statistics where it does not use the input's."""
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    if running_mean is not None and running_var is not None:
        _, centre, square = _statistics(input, list(range(2, input.dim())), correction=1)
        _track(running_mean, running_var, centre.mean(0), square.mean(0), momentum)
    return F.group_norm(input, input.shape[1], weight, bias, eps)


@register_rule(F.normalize)
def normalize(input: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Any:
    """Divided by the Euclidean norm over a dimension."""
    if p != 2.0 or not isinstance(dim, int):
        raise NotImplementedError(f"moments: normalize(p={p}, dim={dim}) has no rule; expected p=2 and one dimension.")
    x = input.movedim(dim, -1)
    count = x.shape[-1]
    return (_normalised(parts(x), 1, eps**2 / count, is_centred=False) * count**-0.5).movedim(-1, dim)


def _statistics(x: Any, dims: list[int], *, correction: int = 0) -> tuple[Any, Tensor, Tensor]:
    """What is left of x when its mean over dimensions is taken out of its noise; that mean, and the expected square."""
    (mean, variance, shared), directions, residual = known(x)
    raised = mean.to(torch.promote_types(mean.dtype, torch.float32))
    square, centre = torch.var_mean(raised, dims, correction=correction)
    if directions is not None:
        spread = directions.var([dim + 1 for dim in dims], correction=correction).sum(0)
        return x, centre, square + (spread if residual is None else spread + residual.mean(dims))
    if variance is None:
        return x, centre, square
    if shared is not None and shared_dims(parts(x)):
        variance = (variance - shared).clamp_min(0)
        x = Moments(mean, variance, torch.zeros_like(shared))
    return x, centre, square + variance.mean(dims)


@torch.no_grad()
def _track(running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, momentum: float) -> None:
    """Moves running statistics towards those of a batch."""
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(variance.to(running_var.dtype), momentum)


def _by_its_own_statistics(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Batch norm in training, written out: the derivative of torch's own cannot be recorded by `make_fx`."""
    dims, shape = [dim for dim in range(x.dim()) if dim != 1], (1, -1, *(1,) * (x.dim() - 2))
    centred = x - x.mean(dims, keepdim=True)
    normalised = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    normalised = normalised if weight is None else normalised * weight.reshape(shape)
    return normalised if bias is None else normalised + bias.reshape(shape)


def _by_statistics(x: Any, centre: Tensor, square: Tensor, weight: Any, bias: Any, eps: float) -> Any:
    shape = (1, -1, *(1,) * (x.dim() - 2))
    scale = torch.rsqrt(square + eps)
    if is_uncertain(weight) or is_uncertain(bias):
        weight, bias = (None if p is None else p.reshape(shape) for p in (weight, bias))
        return _scaled(_scaled(x, scale.reshape(shape), (-centre * scale).reshape(shape)), weight, bias)
    scale = scale if weight is None else scale * weight
    offset = -centre * scale if bias is None else bias - centre * scale
    return _scaled(x, scale.reshape(shape), offset.reshape(shape))


def _normalised(x: MomentTensors, num_dims: int, eps: float, *, is_centred: bool = True) -> Moments:
    dims, count = tuple(range(-num_dims, 0)), torch.Size(x.mean.shape[-num_dims:]).numel()
    mean = x.mean.to(torch.promote_types(x.mean.dtype, torch.float32))
    shared = aligned(x.shared, mean.dim()) if x.shared is not None and is_tracked() else None
    variance = x.variance
    if is_centred:
        mean = mean - mean.mean(dims, keepdim=True)
        if variance is not None:
            variance, shared = _centred(variance, shared, dims, count)
    inverse = torch.rsqrt(_energy(mean, variance).mean(dims, keepdim=True) + eps)
    normalised = mean * inverse
    if variance is None:
        return Moments(normalised.to(x.mean.dtype))
    squares = normalised.square() / count
    if shared is not None:
        pairs = products_of_pairs(normalised, shared.shape) / count
        along = (pairs * shared).sum(dims, keepdim=True)
        left = shared * (1 - 2 * mean_over(squares, shared.shape)) + pairs * along
        shared = left * _carried(variance, inverse, shared, dims)
    along = (squares * variance).sum(dims, keepdim=True)
    variance = (variance * (1 - 2 * squares) + squares * along) * inverse.square()
    return Moments(normalised.to(x.mean.dtype), variance, shared)


def _centred(
    variance: Tensor, shared: Tensor | None, dims: tuple[int, ...], count: int
) -> tuple[Tensor, Tensor | None]:
    """Variance and shared part of x - mean(x): Cov(x_i, mean) is v_i / n, and more where positions are among the n."""
    within = 1 if shared is None else torch.Size(variance.shape[d] for d in dims if shared.shape[d] == 1).numel()
    if shared is None or within == 1:
        centred = variance * (1 - 2 / count) + variance.mean(dims, keepdim=True) / count
        if shared is not None:
            shared = shared * (1 - 2 / count) + shared.mean(dims, keepdim=True) / count
        return centred, shared
    with_mean = (variance + (within - 1) * shared) / count
    change = with_mean.mean(dims, keepdim=True) - 2 * with_mean
    return (variance + change).clamp_min(0), shared + mean_over(change, shared.shape)


def _carried(variance: Tensor, inverse: Tensor, shared: Tensor, dims: tuple[int, ...]) -> Tensor:
    """What scales of (..., 1) make of a shared part: positions weigh as much as they vary."""
    shape = [1 if size == 1 else inverse.shape[d] for d, size in enumerate(shared.shape)]
    weights = std(variance.mean(dims, keepdim=True))
    return products_of_pairs(inverse * weights, shape) / products_of_pairs(weights, shape).clamp_min(1e-30)


def _energy(mean: Tensor, variance: Tensor | None) -> Tensor:
    return mean.square() if variance is None else mean.to(variance.dtype).square() + variance


def _scaled(x: Any, weight: Any, bias: Any) -> Any:
    if is_uncertain(weight) or is_uncertain(bias) or not is_uncertain(x):
        x = x if weight is None else x * weight
        return x if bias is None else x + bias
    if weight is None and bias is None:
        return x
    return affine(x, 1 if weight is None else weight, 0 if bias is None else bias)
