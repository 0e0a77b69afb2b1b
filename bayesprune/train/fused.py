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
from bayesprune.foundation.sharding import full_tensor, place_like
from bayesprune.priors import BoundNormal, BoundPrior

_CACHED = 1 << 17  # elements of a piece on a processor: with what is made of it, less than a core's second cache
_GROUPED = 1 << 24  # elements of a group elsewhere
_SMALL = 1 << 12  # elements up to which a tensor goes with a group on a processor, too
_WITH_KL = "_bayesprune_with_kl"
MIN_LOG_STD = -20.0
"""exp(-20) = 2e-9: below the resolution of float32 beside any weight."""


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
    together: dict[tuple, list[KLTerm]] = defaultdict(list)
    for target in targets:
        mean, variance = target.mean, target.variance
        if variance is None or (_is_sharded(mean) and not target.is_elementwise):
            _add_any(target, weight, scale)
        elif not target.is_elementwise:
            _add_mean(target, weight / variance, scale)
            _add_shared(target, variance, weight, scale)
        elif _goes_with_others(target) and scale is None:
            together[mean.device, mean.dtype, target.parts[0].dtype].append(target)
        else:
            _add_elementwise(target, variance, weight, scale)
    for alike in together.values():
        for group in _groups(alike):
            add_together(group, weight)


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


@torch.no_grad()
def bound_log_std(parts: Sequence[Tensor], largest: float) -> None:
    """Keeps the log std that these add up to between a floor and `largest`; of several parts the first gives way."""
    if len(parts) == 1:
        parts[0].clamp_(MIN_LOG_STD, largest)
        return
    for part in parts:
        part.clamp_(min=MIN_LOG_STD)
    if largest < math.inf:
        of_others = [full_tensor(part).amax() for part in parts[1:]]  # a process may hold nothing of a part
        first = parts[0].to_local() if _is_sharded(parts[0]) else parts[0]  # type: ignore[attr-defined]
        first.copy_(torch.minimum(first, largest - reduce(torch.add, of_others)))


def add_together(targets: Sequence[KLTerm], weight: float) -> None:
    """The gradients of fixed Gaussians around zero, of posteriors with a std for every weight, all kept."""
    moving = [(t.mean, t.mean.grad, weight / _known(t)) for t in targets if t.mean.grad is not None]
    if moving:
        means, gradients, factors = zip(*moving, strict=True)
        _foreach("add_", gradients, _foreach("mul", means, factors))
    stds = [(t.parts[0], t.parts[0].grad, weight / _known(t)) for t in targets if t.parts[0].grad is not None]
    if stds:
        log_stds, gradients, factors = zip(*stds, strict=True)
        terms = _foreach("mul", log_stds, 2.0)
        _foreach("add_", terms, [math.log(factor) for factor in factors])
        _foreach("exp_", terms)
        _foreach("sub_", terms, weight)
        _foreach("add_", gradients, terms)


def _foreach(name: str, *operands: Any) -> Any:
    """torch's function of this name for many tensors at once, one kernel for all on a GPU."""
    return getattr(torch, f"_foreach_{name}")(*operands)


def _goes_with_others(target: KLTerm) -> bool:
    is_grouped = target.mean.device.type != "cpu" or target.mean.numel() <= _SMALL
    return is_grouped and target.keep is target.center is None and not _is_sharded(target.mean)


def _known(target: KLTerm) -> float:
    assert target.variance is not None, "only fixed Gaussians get here"
    return target.variance


def _groups(targets: Sequence[KLTerm]) -> Iterator[list[KLTerm]]:
    """Neighbours, so many that their sizes stay below a bound, or one alone."""
    group: list[KLTerm] = []
    size = 0
    for target in targets:
        if group and size + target.mean.numel() > _GROUPED:
            yield group
            group, size = [], 0
        group.append(target)
        size += target.mean.numel()
    yield group


def _add_elementwise(target: KLTerm, variance: float, weight: float, scale: Tensor | None) -> None:
    """A std for every weight, a fixed Gaussian."""
    _add_mean(target, weight / variance, scale)
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
    """Stds that several weights share, a fixed Gaussian: sums over these weights."""
    mean, parts = target.mean, target.parts
    squares = [torch.exp(2 * part) for part in parts]
    is_product = max(sum(part.shape[dim] > 1 for part in parts) for dim in range(mean.dim())) <= 1
    for part, gradient in [(part, part.grad) for part in parts]:
        if gradient is None:
            continue
        if target.keep is None and is_product:
            factor, count = mean.numel() / math.prod(part.numel() for part in parts), mean.numel() / part.numel()
            sums = [square if other is part else square.sum() for other, square in zip(parts, squares, strict=True)]
            total = reduce(torch.mul, sums) * (factor / variance) - count
        elif len(parts) == 1 and target.keep is not None:
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
    largest = _CACHED if first.device.type == "cpu" else _GROUPED
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
