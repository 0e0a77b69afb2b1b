"""Draws of weights as nodes of the graph, each of one tensor or of many, which keep nothing that can be had again.

With w = mean + exp(log_std) eps the gradient of the log std is that of w times w - mean, so that a std for every weight
needs neither the noise nor the std for it. Where a row of weights shares a std, its gradient is that times the sum of
the row's noise, which is read again from the table, times the gradient of w: the draw is not kept.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesprune.estimators import together
from bayesprune.estimators.seeded import LOG2_E
from bayesprune.estimators.types import LogGaussian, Posterior, as_gaussian, is_plain
from bayesprune.foundation import noise
from bayesprune.foundation.device import has_cheap_calls


def sample(posterior: Posterior, seed: int | None = None) -> Tensor:
    """One draw of a tensor, in the mean's dtype; differentiable in mean and stds.

    Args:
        posterior: The posterior.
        seed: Where `has_seeds` is true of it, what the draw depends on; None draws a seed.
    """
    if isinstance(posterior, LogGaussian) and _is_fused(posterior):
        return sample_together([posterior], [seed])[0]
    gaussian = as_gaussian(posterior)
    return gaussian.mean + deviation(gaussian)


def sample_together(posteriors: Sequence[LogGaussian], seeds: Sequence[int | None]) -> Sequence[Tensor]:
    """The draws that `sample` gives of several tensors on one device with these seeds, in few passes and one node."""
    kinds = [_kind_of(posterior, seed) for posterior, seed in zip(posteriors, seeds, strict=True)]
    tensors = [tensor for mean, parts, mask in posteriors for tensor in (mean, mask, *parts)]
    draws: Sequence[Tensor] = _Draws.apply(kinds, *tensors)  # type: ignore[assignment]
    return draws


def has_seeds(posterior: Posterior) -> bool:
    """Whether one number says what is drawn, and several of such may be drawn together."""
    if not (isinstance(posterior, LogGaussian) and _is_fused(posterior)):
        return False
    mean, parts, _ = posterior
    return mean.dtype == torch.float32 and mean.is_contiguous() and all(part.dtype == mean.dtype for part in parts)


def deviation(posterior: Posterior) -> Tensor:
    """A draw's distance from the mean, in the mean's dtype."""
    mean, std = as_gaussian(posterior)
    eps = noise.normal_like(mean, dtype=std.dtype)
    return (std * eps).to(mean.dtype)


class _Kind(NamedTuple):
    """How a tensor is drawn.

    Attributes:
        num_parts: Of its log std.
        seed: Of numbers of the table; None for others, which are drawn once.
        is_rowwise: Whether the entries of the first dimension have a std each, which is not kept with the draw.
        is_flat: Whether means and stds lie in memory one by one or row by row.
    """

    num_parts: int
    seed: int | None
    is_rowwise: bool
    is_flat: bool

    @property
    def keeps_draw(self) -> bool:
        """Whether the backward pass reads the draw."""
        return not self.is_rowwise


class _Draws(torch.autograd.Function):
    """mean + exp(sum of log stds) eps of each tensor, zero outside the mask; may be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, kinds: Sequence[_Kind], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        posteriors = _posteriors(kinds, tensors)
        draws = _for_each(kinds, posteriors, _draw, together.draws)
        for (_, _, mask), draw in zip(posteriors, draws, strict=True):
            if mask is not None:
                draw.mul_(mask)
        kept = [draw for kind, draw in zip(kinds, draws, strict=True) if kind.keeps_draw]
        ctx.kinds = kinds
        ctx.save_for_backward(*tensors, *kept)
        return tuple(draws)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        kinds, saved = ctx.kinds, ctx.saved_tensors
        num_tensors = len(ctx.needs_input_grad) - 1
        posteriors, kept = _posteriors(kinds, saved[:num_tensors]), iter(saved[num_tensors:])
        draws = [next(kept) if kind.keeps_draw else None for kind in kinds]
        masked = [
            gradient if gradient is None or posterior.mask is None else gradient * posterior.mask
            for gradient, posterior in zip(gradients, posteriors, strict=True)
        ]
        needed, wanted, position = [], [], 1
        for index, kind in enumerate(kinds):
            needed.append(ctx.needs_input_grad[position : position + 2 + kind.num_parts])
            position += 2 + kind.num_parts
            if masked[index] is not None and any(needed[-1][2:]):
                wanted.append(index)
        of_parts = dict(zip(wanted, _part_gradients(*_at(wanted, kinds, posteriors, draws, masked)), strict=True))
        found: list[Tensor | None] = [None]
        for index, kind in enumerate(kinds):
            found += [masked[index] if needed[index][0] else None, None]
            parts = of_parts[index] if index in of_parts else [None] * kind.num_parts
            found += [part if need else None for part, need in zip(parts, needed[index][2:], strict=True)]
        return tuple(found)


def _part_gradients(
    kinds: Sequence[_Kind],
    posteriors: Sequence[LogGaussian],
    draws: Sequence[Tensor | None],
    gradients: Sequence[Tensor],
) -> list[Sequence[Tensor]]:
    """Gradients of the parts of each log std."""
    if torch.is_grad_enabled():  # a graph of their own
        return [_differentiable(*each) for each in zip(kinds, posteriors, draws, gradients, strict=True)]
    whole = [(p.mean, p.log_stds, d, g) for p, d, g in zip(posteriors, draws, gradients, strict=True)]
    return _for_each(kinds, whole, _gradients, together.gradients)


def _for_each(kinds: Sequence[_Kind], items: Sequence[Any], one: Callable, many: Callable) -> list[Any]:
    """What `one` makes of an item, or `many` of those that are small, or all where calls are dear."""
    found: dict[int, Any] = {}
    chosen = [index for index, (kind, item) in enumerate(zip(kinds, items, strict=True)) if _goes_together(kind, item)]
    if chosen:
        of_kinds, of_items = _at(chosen, kinds, items)
        found = dict(zip(chosen, many(of_kinds, of_items), strict=True))
    return [found[i] if i in found else one(kinds[i], item) for i, item in enumerate(items)]


def _goes_together(kind: _Kind, item: Sequence[Any]) -> bool:
    mean = item[0]
    if kind.seed is None or not kind.is_flat:
        return False
    return not has_cheap_calls(mean.device) or mean.numel() <= (_SMALL if kind.keeps_draw else noise.MAX_AT_ONCE)


def _at(indices: Sequence[int], *lists: Sequence[Any]) -> list[list[Any]]:
    return [[items[index] for index in indices] for items in lists]


_SMALL = 1 << 12


def _posteriors(kinds: Sequence[_Kind], tensors: Sequence[Tensor]) -> list[LogGaussian]:
    found, position = [], 0
    for kind in kinds:
        mean, mask, *parts = tensors[position : position + 2 + kind.num_parts]
        found.append(LogGaussian(mean, tuple(parts), mask))
        position += 2 + kind.num_parts
    return found


def _kind_of(posterior: LogGaussian, seed: int | None) -> _Kind:
    mean, parts, _ = posterior
    same = mean.is_contiguous() and all(part.dtype == mean.dtype for part in parts)
    if seed is None and same and mean.is_contiguous() and mean.dtype == torch.float32:
        seed = noise.draw_seed()
    is_one = seed is not None and same and len(parts) == 1 and parts[0].is_contiguous()
    is_rowwise = is_one and mean.dim() > 1 and parts[0].shape == (len(mean), *[1] * (mean.dim() - 1))
    is_flat = is_rowwise or (is_one and parts[0].shape == mean.shape)
    return _Kind(len(parts), seed, is_rowwise, is_flat)


def _is_fused(posterior: LogGaussian) -> bool:
    """In half precision w - mean is too coarse for the gradient of the std."""
    mean, log_stds, _ = posterior
    return torch.finfo(mean.dtype).bits >= 32 and is_plain(mean, *log_stds) and noise.can_repeat(mean.device)


def _draw(kind: _Kind, posterior: LogGaussian) -> Tensor:
    mean, parts, _ = posterior
    if not kind.is_flat:
        eps = _noise(kind, mean, parts[0].dtype)
        for part in parts:
            eps = eps * part.exp()
        return eps.add_(mean) if eps.dtype == mean.dtype else mean + eps.to(mean.dtype)
    assert kind.seed is not None, "what is flat has one"
    (log_std,), draw = parts, torch.empty_like(mean)
    if kind.is_rowwise and _row_size(mean) <= noise.MAX_AT_ONCE:
        row_of, stds = _row_size(mean), log_std.exp().view(-1, 1)
        position = 0
        for eps, means, draws in noise.normal_blocks(kind.seed, mean, draw):
            rows = means.numel() // row_of
            shape = rows, row_of
            of_rows = stds[position : position + rows]
            torch.addcmul(means.reshape(shape), eps.reshape(shape), of_rows, out=draws.view(shape))
            position += rows
        return draw
    if kind.is_rowwise:
        return torch.addcmul(mean, _noise(kind, mean, mean.dtype), log_std.exp())
    for eps, log_stds, means, draws in noise.normal_blocks(kind.seed, log_std, mean, draw):
        torch.addcmul(means, torch.mul(log_stds, LOG2_E, out=draws).exp2_(), eps, out=draws)
    return draw


def _gradients(kind: _Kind, item: tuple[Tensor, tuple[Tensor, ...], Tensor | None, Tensor]) -> list[Tensor]:
    mean, parts, draw, gradient = item
    if draw is not None:
        product = (draw - mean).mul_(gradient)
        return [product.sum_to_size(part.shape).to(part.dtype) for part in parts]
    assert kind.seed is not None, "what keeps no draw has one"
    (log_std,), row_of, position = parts, _row_size(mean), 0
    if row_of > noise.MAX_AT_ONCE:
        return [(gradient * _noise(kind, mean, mean.dtype)).sum_to_size(log_std.shape).mul_(log_std.exp())]
    sums = torch.empty_like(log_std).view(-1)
    for eps, gradients in noise.normal_blocks(kind.seed, gradient.contiguous()):
        rows = gradients.numel() // row_of
        product = (eps * gradients).view(rows, row_of)
        torch.sum(product, 1, out=sums[position : position + rows])
        position += rows
    return [sums.view_as(log_std).mul_(log_std.exp())]


def _differentiable(kind: _Kind, posterior: LogGaussian, draw: Tensor | None, gradient: Tensor) -> list[Tensor]:
    mean, parts, _ = posterior
    deviation = draw - mean if draw is not None else _noise(kind, mean, mean.dtype) * parts[0].exp()
    product = deviation * gradient
    return [product.sum_to_size(part.shape).to(part.dtype) for part in parts]


def _row_size(mean: Tensor) -> int:
    return mean.shape[1:].numel()


def _noise(kind: _Kind, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers of a tensor's shape."""
    if kind.seed is None:
        return noise.normal_like(mean, dtype=dtype)
    return torch.cat(noise.table_blocks(kind.seed, mean.shape, mean.device)).view(mean.shape)
