"""One pass over the posteriors of a model: the KL's gradient is added to that of the data in place, stds are bounded.

For a Gaussian prior of variance v around c, and a KL of weight w, the gradients are

    w (m - c) / v  for a mean,    w (s^2 / v - 1)  for a log std,

where w s^2 / v is one power of two (on a processor torch's exp2 takes a quarter of the time of its exp). Nothing of a
tensor's size is made on the way: a processor goes through pieces that stay in its cache, a GPU through bounded groups
of tensors. A log std that many weights share has the sum of theirs: with one v, and s^2 a product over the parts of the
log std, the sum over what the other parts number is a product of their sums.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesprune.estimators.seeded import LOG2_E
from bayesprune.estimators.squares import square_of
from bayesprune.foundation.device import has_cheap_calls
from bayesprune.foundation.foreach import foreach
from bayesprune.foundation.sharding import place_like
from bayesprune.priors import BoundNormal, BoundPrior
from bayesprune.train.joined import joined, split_like, spread, sums_of

_CACHED = 1 << 17  # elements of a piece on a processor: with what is made of it, less than a core's second cache
_GROUPED = 1 << 24  # elements of a group elsewhere
_SMALL = 1 << 12  # elements up to which a tensor goes with a group on a processor, too
_WITH_KL = "_bayesprune_with_kl"


class KLTerm(NamedTuple):
    """One posterior in one step.

    Attributes:
        mean: The means, with or without a gradient.
        parts: The parameters that add up to the log stds, each with or without a gradient.
        prior: Their prior.
        keep: How much of each weight counts; None is all.
    """

    mean: Tensor
    parts: Sequence[Tensor]
    prior: BoundPrior
    keep: Tensor | None = None

    @property
    def is_elementwise(self) -> bool:
        """Whether each weight has a std of its own."""
        return len(self.parts) == 1 and self.parts[0].shape == self.mean.shape

    @property
    def variance(self) -> float | None:
        """That of the prior where it is one number."""
        return self.prior.fixed_variance if isinstance(self.prior, BoundNormal) else None

    @property
    def center(self) -> Tensor | None:
        """That of the prior; None is zero."""
        return self.prior.center if isinstance(self.prior, BoundNormal) else None


@torch.no_grad()
def add_kl_gradients(targets: Iterable[KLTerm], weight: float, scale: Tensor | None = None) -> None:
    """Adds `weight` times the gradient of the KL to the gradients of means and log stds that are there.

    Args:
        targets: The posteriors.
        weight: Weight of the KL.
        scale: What a gradient scaler multiplied the gradients by; None where it did not.
    """
    if not weight:
        return
    by_group: dict[tuple, list[KLTerm]] = defaultdict(list)
    for target in targets:
        mean, variance = target.mean, target.variance
        if variance is None or (_is_sharded(mean) and not target.is_elementwise):
            _add_any(target, weight, scale)
        elif _goes_with_others(target):
            by_group[mean.device, mean.dtype, target.parts[0].dtype].append(target)
        elif not target.is_elementwise:
            _add_mean(target, weight / variance, scale)
            _add_shared(target, variance, weight, scale)
        else:
            _add_mean(target, weight / variance, scale)
            _add_elementwise(target, variance, weight, scale)
    for alike in by_group.values():
        add_together(alike, weight, scale)


def mark_with_kl(targets: Iterable[KLTerm]) -> None:
    """Writes on the gradients of the means that they have the KL: from a draw or, where from none, in which version."""
    for target in targets:
        if (gradient := target.mean.grad) is not None:
            has_draw = any(part.grad is not None for part in target.parts)
            setattr(gradient, _WITH_KL, None if has_draw else gradient._version)


def has_kl(gradient: Tensor | None) -> bool:
    """Whether a gradient that comes from no new draw has the KL already: no backward has added to it since."""
    version = getattr(gradient, _WITH_KL, -1)
    return version is None or (gradient is not None and version == gradient._version)


def add_together(targets: Sequence[KLTerm], weight: float, scale: Tensor | None = None) -> None:
    """The gradients of fixed Gaussians around zero, all weights kept, of tensors that lie alike.

    Log stds of a size go by groups; those that weights share, and small ones, are all in one tensor on the way.
    """
    means: list[tuple[Tensor, Tensor, float]] = []
    large: list[tuple[Tensor, Tensor, float]] = []
    small: list[KLTerm] = []
    for target in targets:
        mean, variance, single = target.mean, _known(target), target.is_elementwise
        if mean.grad is not None:
            if has_cheap_calls(mean.device) and mean.numel() > _SMALL and scale is None:
                _add_mean(target, weight / variance, None)
            else:
                means.append((mean, mean.grad, weight / variance))
        if not single or mean.numel() <= _SMALL:
            small.append(target)
        elif has_cheap_calls(mean.device):
            _add_elementwise(target, variance, weight, scale)
        elif (gradient := target.parts[0].grad) is not None:
            large.append((target.parts[0], gradient, weight / variance))
    for group in _groups(means):
        values, gradients, factors = zip(*group, strict=True)
        _add_scaled(gradients, foreach("mul", values, factors), scale)
    for group in _groups(large):
        log_stds, gradients, factors = zip(*group, strict=True)
        terms = foreach("mul", log_stds, 2.0)
        foreach("add_", terms, [math.log(factor) for factor in factors])
        foreach("exp_", terms)
        foreach("sub_", terms, weight)
        _add_scaled(gradients, terms, scale)
    if small:
        _add_small(small, weight, scale)


def _add_small(targets: Sequence[KLTerm], weight: float, scale: Tensor | None) -> None:
    """The log stds' part, where all of them are few numbers: with p parts, s^2 is the product over them."""
    parts = [part for target in targets for part in target.parts]
    logs = joined(parts)
    squares = square_of(logs, logs.dtype)
    factors, counts, others = [], [], []
    for target in targets:
        size, sizes = target.mean.numel(), [part.numel() for part in target.parts]
        first = len(factors)
        factors += [size / math.prod(sizes) / _known(target)] * len(sizes)
        counts += [size / own for own in sizes]
        others += [first + 1 - index if len(sizes) > 1 else -1 for index in range(len(sizes))]
    sizes = tuple(part.numel() for part in parts)
    device, dtype = squares.device, squares.dtype
    weights, less = (spread(tuple(values), sizes, device, dtype) for values in (factors, [-count for count in counts]))
    if max(others) >= 0:
        others = [len(parts) if other < 0 else other for other in others]
        sums = torch.cat([sums_of(squares, sizes), spread((1.0,), (1,), device, dtype)])
        weights = weights * sums[spread(tuple(others), sizes, device, torch.int64)]
    terms = torch.addcmul(less, squares, weights)
    pairs = [(p.grad, term) for p, term in zip(parts, split_like(terms, parts), strict=True) if p.grad is not None]
    if pairs:
        gradients, of_parts = zip(*pairs, strict=True)
        _add_scaled(gradients, of_parts, scale, weight)


def _add_scaled(
    gradients: Sequence[Tensor], terms: Sequence[Tensor], scale: Tensor | None, factor: float = 1.0
) -> None:
    """Adds the terms times a factor, and times what a gradient scaler multiplied the loss by."""
    if scale is None:
        foreach("add_", gradients, terms, alpha=factor)
        return
    terms = terms if factor == 1.0 else foreach("mul", terms, factor)
    foreach("add_", gradients, foreach("mul", terms, scale))


def _goes_with_others(target: KLTerm) -> bool:
    """Whether all weights count around zero, and s^2 is a product over at most two parts that are ordinary tensors."""
    mean, parts = target.mean, target.parts
    if target.keep is not None or target.center is not None or _is_sharded(mean):
        return False
    dtypes = {tensor.dtype for part in (mean, *parts) for tensor in (part, part.grad) if tensor is not None}
    if len(dtypes) > 1 or torch.finfo(mean.dtype).bits < 32:
        return False
    return len(parts) == 1 or (len(parts) == 2 and _is_product(parts, mean.dim()))


def _is_product(parts: Sequence[Tensor], num_dims: int) -> bool:
    """Whether no two parts number the same."""
    return max(sum(part.shape[dim] > 1 for part in parts) for dim in range(num_dims)) <= 1


def _known(target: KLTerm) -> float:
    assert target.variance is not None, "only fixed Gaussians get here"
    return target.variance


def _groups(items: Sequence[tuple[Tensor, Tensor, float]]) -> Iterator[list[tuple[Tensor, Tensor, float]]]:
    """Neighbours, so many that their sizes stay below a bound, or one alone."""
    group: list[tuple[Tensor, Tensor, float]] = []
    size = 0
    for item in items:
        if group and size + item[0].numel() > _GROUPED:
            yield group
            group, size = [], 0
        group.append(item)
        size += item[0].numel()
    if group:
        yield group


def _add_elementwise(target: KLTerm, variance: float, weight: float, scale: Tensor | None) -> None:
    """The log stds' part of a std for every weight, a fixed Gaussian."""
    (log_std,) = target.parts
    if log_std.grad is None:
        return
    start = torch.tensor(math.log2(weight / variance), dtype=log_std.dtype)
    for logs, gradient, keep in _pieces(log_std, log_std.grad, target.keep):
        term = torch.add(start, logs, alpha=2 * LOG2_E).exp2_().sub_(weight)
        if keep is not None:
            term.mul_(keep)
        _add(gradient, term, 1.0, scale)


def _add_mean(target: KLTerm, factor: float, scale: Tensor | None) -> None:
    """The means' part of a fixed Gaussian."""
    mean, gradient = target.mean, target.mean.grad
    if gradient is None:
        return
    if scale is target.keep is target.center is None and gradient.dtype == mean.dtype:
        gradient.add_(mean, alpha=factor)
        return
    for values, of_values, keep, center in _pieces(mean, gradient, target.keep, target.center):
        distance = values if center is None else values - center
        _add(of_values, distance if keep is None else distance * keep, factor, scale)


def _add_shared(target: KLTerm, variance: float, weight: float, scale: Tensor | None) -> None:
    """Stds that several weights share, a fixed Gaussian, and not all weights count: sums over these weights."""
    mean, parts = target.mean, target.parts
    squares = [torch.exp(2 * part) for part in parts]
    for part, gradient in [(part, part.grad) for part in parts]:
        if gradient is None:
            continue
        if len(parts) == 1 and target.keep is not None:
            total = (squares[0] / variance - 1) * _count(target.keep, part)
        else:
            each = (reduce(torch.mul, squares) / variance - 1).expand(mean.shape)
            total = (each if target.keep is None else each * target.keep).sum_to_size(part.shape)
        _add(gradient, total, weight, scale)


def _add_any(target: KLTerm, weight: float, scale: Tensor | None) -> None:
    """Any prior: the gradients that it says, summed over the weights that share a std."""
    mean, parts = target.mean, target.parts
    log_std = sum(parts[1:], start=parts[0])
    of_mean, of_std = target.prior.kl_gradient(mean, log_std, target.keep)
    if mean.grad is not None:
        _add(mean.grad, of_mean, weight, scale)
    for part in parts:
        if part.grad is not None:
            _add(part.grad, place_like(of_std.sum_to_size(part.shape), part), weight, scale)


def _add(gradient: Tensor, term: Tensor, factor: float, scale: Tensor | None) -> None:
    if scale is not None:  # up to 2^16, which half precision does not hold
        term = term.to(torch.promote_types(term.dtype, torch.float32)) * scale
    if gradient.dtype != term.dtype:
        term = (term * factor).to(gradient.dtype)
        factor = 1.0
    gradient.add_(term, alpha=factor)


def _pieces(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Views of all of them, of this process's shards, cut alike along the first dimension."""
    shards = [tensor.to_local() if _is_sharded(tensor) else tensor for tensor in tensors]  # type: ignore[union-attr]
    first = shards[0]
    assert first is not None, "what is cut is there"
    largest = _CACHED if has_cheap_calls(first.device) else _GROUPED
    if first.numel() <= largest:
        yield tuple(shards)
        return
    rows = max(1, largest * first.shape[0] // first.numel())
    yield from zip(*(repeat(None) if shard is None else shard.split(rows) for shard in shards), strict=False)


def _count(keep: Tensor, part: Tensor) -> Tensor:
    """How many of the weights that share each std are there, in the std's shape."""
    shared = [dim for dim, size in enumerate(part.shape) if size < keep.shape[dim]]
    return keep.sum(shared, keepdim=True, dtype=part.dtype)


def _is_sharded(tensor: Tensor | None) -> bool:
    return hasattr(tensor, "to_local")
