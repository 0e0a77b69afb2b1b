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
from bayesprune.foundation.foreach import foreach

_SMALL = 1 << 12  # weights with a std each that are not worth to go by pieces


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
    return isinstance(posterior, LogGaussian) and _is_fused(posterior) and _is_tabled(posterior)


def deviation(posterior: Posterior) -> Tensor:
    """A draw's distance from the mean, in the mean's dtype."""
    mean, std = as_gaussian(posterior)
    eps = noise.normal_like(mean, dtype=std.dtype)
    return (std * eps).to(mean.dtype)


class Kind(NamedTuple):
    """How a tensor is drawn.

    Attributes:
        num_parts: Of its log std.
        seed: Of numbers of the table; None for others, which are drawn once.
        stds: "weights" of a std for each weight; "rows" of one for each entry of the first dimension, whose draw is not
            kept; "any" else.
        has_channels_last: Whether means and stds lie in memory with the second dimension last.
    """

    num_parts: int
    seed: int | None
    stds: str
    has_channels_last: bool

    @property
    def keeps_draw(self) -> bool:
        """Whether the backward pass reads the draw."""
        return self.stds != "rows"


class _Draws(torch.autograd.Function):
    """mean + exp(sum of log stds) eps of each tensor, zero outside the mask; may be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, kinds: Sequence[Kind], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        posteriors = _posteriors(kinds, tensors)
        as_stored = [_stored(kind, posterior) for kind, posterior in zip(kinds, posteriors, strict=True)]
        stds = None
        if _is_tabled_all(kinds) and not has_cheap_calls(tensors[0].device):
            draws, stds = together.draws(kinds, as_stored)
        else:
            draws = _on_processor(kinds, as_stored, _draw, _small_draws)
        draws = [_as_seen(kind, draw) for kind, draw in zip(kinds, draws, strict=True)]
        for (_, _, mask), draw in zip(posteriors, draws, strict=True):
            if mask is not None:
                draw.mul_(mask)
        kept = [draw for kind, draw in zip(kinds, draws, strict=True) if kind.keeps_draw]
        ctx.kinds = kinds
        ctx.save_for_backward(*tensors, *kept, stds)
        return tuple(draws)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        kinds, (*saved, stds) = ctx.kinds, ctx.saved_tensors
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
        chosen = [(posteriors[i], draws[i], masked[i]) for i in wanted]
        items = [together.Item(p.mean, p.log_stds, p.mask, draw, gradient) for p, draw, gradient in chosen]
        of_parts = dict(zip(wanted, _of_parts(kinds, wanted, items, stds), strict=True))
        found: list[Tensor | None] = [None]
        for index, kind in enumerate(kinds):
            found += [masked[index] if needed[index][0] else None, None]
            parts = of_parts[index] if index in of_parts else [None] * kind.num_parts
            found += [part if need else None for part, need in zip(parts, needed[index][2:], strict=True)]
        return tuple(found)


def _of_parts(
    kinds: Sequence[Kind], wanted: Sequence[int], items: Sequence[together.Item], stds: Tensor | None
) -> list[Sequence[Tensor]]:
    """Gradients of the parts of each log std; `stds` are those that `together.draws` gave, of all tensors."""
    if torch.is_grad_enabled():  # a graph of their own
        return [_differentiable(kinds[i], item) for i, item in zip(wanted, items, strict=True)]
    as_stored = [_stored(kinds[i], item) for i, item in zip(wanted, items, strict=True)]
    if items and _is_tabled_all(kinds) and not has_cheap_calls(items[0].mean.device):
        found = together.gradients([kinds[i] for i in wanted], as_stored, stds if len(wanted) == len(kinds) else None)
    else:
        found = _on_processor([kinds[i] for i in wanted], as_stored, _gradients, _small_gradients)
    return [[_as_seen(kinds[i], part) for part in parts] for i, parts in zip(wanted, found, strict=True)]


def _posteriors(kinds: Sequence[Kind], tensors: Sequence[Tensor]) -> list[LogGaussian]:
    found, position = [], 0
    for kind in kinds:
        mean, mask, *parts = tensors[position : position + 2 + kind.num_parts]
        found.append(LogGaussian(mean, tuple(parts), mask))
        position += 2 + kind.num_parts
    return found


def _kind_of(posterior: LogGaussian, seed: int | None) -> Kind:
    if not _is_tabled(posterior):
        return Kind(len(posterior.log_stds), None, "any", False)
    mean, (part, *others), _ = posterior
    seed, shape, stds = noise.draw_seed() if seed is None else seed, mean.shape, "any"
    if not others and part.shape == shape:
        stds = "weights" if part.stride() == mean.stride() else "any"
    elif not others and len(shape) > 1 and part.numel() == part.shape[0] == shape[0] and part.is_contiguous():
        stds = "rows"
    return Kind(1 + len(others), seed, stds, not mean.is_contiguous())


def _is_fused(posterior: LogGaussian) -> bool:
    """In half precision w - mean is too coarse for the gradient of the std."""
    mean, log_stds, _ = posterior
    return torch.finfo(mean.dtype).bits >= 32 and is_plain(mean, *log_stds) and noise.can_repeat(mean.device)


def _is_tabled(posterior: LogGaussian) -> bool:
    mean, parts, _ = posterior
    if mean.dtype != torch.float32 or not (mean.is_contiguous() or noise.has_channels_last(mean)):
        return False
    return mean.numel() > 0 and all(part.dtype == torch.float32 for part in parts)


def _is_tabled_all(kinds: Sequence[Kind]) -> bool:
    return all(kind.seed is not None for kind in kinds)


def _stored(kind: Kind, value: Any) -> Any:
    """Tensors, in tuples too, with their dimensions in the order in which memory has them."""
    if not kind.has_channels_last or value is None:
        return value
    if isinstance(value, tuple):
        entries = [_stored(kind, entry) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
    return value.movedim(1, -1)


def _as_seen(kind: Kind, tensor: Tensor) -> Tensor:
    return tensor.movedim(-1, 1) if kind.has_channels_last else tensor


def _on_processor(kinds: Sequence[Kind], items: Sequence[Any], one: Callable, many: Callable) -> list[Any]:
    """What `many` makes of items that are not worth to go by pieces, and `one` of each other."""
    small = [index for index, (kind, item) in enumerate(zip(kinds, items, strict=True)) if _is_small(kind, item[0])]
    found = dict(zip(small, many([kinds[i] for i in small], [items[i] for i in small]), strict=True)) if small else {}
    return [found[i] if i in found else one(kinds[i], item) for i, item in enumerate(items)]


def _is_small(kind: Kind, mean: Tensor) -> bool:
    if kind.seed is None or kind.stds == "any":
        return False
    return mean.numel() <= (_SMALL if kind.keeps_draw else noise.MAX_AT_ONCE)


def _small_draws(kinds: Sequence[Kind], posteriors: Sequence[LogGaussian]) -> Sequence[Tensor]:
    means = [mean for mean, _, _ in posteriors]
    eps = [noise.read(kind.seed, mean.shape, mean.device) for kind, mean in zip(kinds, means, strict=True)]  # type: ignore[arg-type]
    return foreach("addcmul", means, foreach("exp", [parts[0] for _, parts, _ in posteriors]), eps)


def _small_gradients(kinds: Sequence[Kind], items: Sequence[together.Item]) -> list[list[Tensor]]:
    eps_or_distances = [
        noise.read(kind.seed, item.mean.shape, item.mean.device) if item.draw is None else item.draw - item.mean  # type: ignore[arg-type]
        for kind, item in zip(kinds, items, strict=True)
    ]
    products = foreach("mul", eps_or_distances, [item.gradient for item in items])
    return [
        [product if item.draw is not None else _over_rows(product, item.parts[0])]
        for product, item in zip(products, items, strict=True)
    ]


def _over_rows(product: Tensor, log_std: Tensor) -> Tensor:
    return product.flatten(1).sum(1).view_as(log_std).mul_(log_std.exp())


def _draw(kind: Kind, posterior: LogGaussian) -> Tensor:
    mean, parts, _ = posterior
    if kind.seed is None or kind.stds == "any":
        eps = _noise(kind, mean, parts[0].dtype)
        for part in parts:
            eps = eps * part.exp()
        return eps.add_(mean) if eps.dtype == mean.dtype else mean + eps.to(mean.dtype)
    (log_std,), draw = parts, torch.empty_like(mean)
    if kind.stds == "weights":
        for eps, log_stds, means, draws in noise.normal_blocks(kind.seed, log_std, mean, draw):
            torch.addcmul(means, torch.mul(log_stds, LOG2_E, out=draws).exp2_(), eps, out=draws)
        return draw
    row_of, stds, position = _row_size(mean), log_std.exp().view(-1, 1), 0
    if row_of > noise.MAX_AT_ONCE:
        return torch.addcmul(mean, _noise(kind, mean, mean.dtype), log_std.exp())
    for eps, means, draws in noise.normal_blocks(kind.seed, mean, draw):
        rows = means.numel() // row_of
        shape, of_rows = (rows, row_of), stds[position : position + rows]
        torch.addcmul(means.view(shape), eps.view(shape), of_rows, out=draws.view(shape))
        position += rows
    return draw


def _gradients(kind: Kind, item: together.Item) -> list[Tensor]:
    mean, parts, _, draw, gradient = item
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


def _differentiable(kind: Kind, item: together.Item) -> list[Tensor]:
    mean, parts, _, draw, gradient = item
    deviation = draw - mean if draw is not None else _noise_like(kind, mean) * parts[0].exp()
    product = deviation * gradient
    return [product.sum_to_size(part.shape).to(part.dtype) for part in parts]


def _noise_like(kind: Kind, mean: Tensor) -> Tensor:
    return _as_seen(kind, _noise(kind, _stored(kind, mean), mean.dtype))


def _noise(kind: Kind, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers of the shape of a tensor as it is stored."""
    if kind.seed is None:
        return noise.normal_like(mean, dtype=dtype)
    return noise.read(kind.seed, mean.shape, mean.device)


def _row_size(mean: Tensor) -> int:
    return mean.shape[1:].numel()
