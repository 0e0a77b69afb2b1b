"""One draw of a tensor of weights as one node of the graph, which keeps nothing but the draw and the means.

With w = mean + exp(log_std) eps the gradient of the log std is that of w times w - mean, so neither the noise nor the
std has to be kept for it.
"""

from typing import Any

import torch
from torch import Tensor

from bayesprune.estimators.seeded import LOG2_E
from bayesprune.estimators.types import LogGaussian, Posterior, as_gaussian, is_plain
from bayesprune.foundation import noise


def sample(posterior: Posterior) -> Tensor:
    """One draw of a tensor, in the mean's dtype; differentiable in mean and stds."""
    if isinstance(posterior, LogGaussian) and _is_fused(posterior):
        return _Draw.apply(posterior.mean, posterior.mask, *posterior.log_stds)
    gaussian = as_gaussian(posterior)
    return gaussian.mean + deviation(gaussian)


def deviation(posterior: Posterior) -> Tensor:
    """A draw's distance from the mean, in the mean's dtype."""
    mean, std = as_gaussian(posterior)
    eps = noise.normal_like(mean, dtype=std.dtype)
    return (std * eps).to(mean.dtype)


class _Draw(torch.autograd.Function):
    """mean + exp(sum of log stds) eps, zero outside the mask; may be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, mask: Tensor | None, *log_stds: Tensor) -> Tensor:
        draw = _by_blocks(mean, log_stds[0]) if _fits_blocks(mean, log_stds) else _at_once(mean, log_stds)
        if mask is not None:
            draw.mul_(mask)
        ctx.save_for_backward(mean, draw, mask, *log_stds)
        return draw

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        mean, draw, mask, *log_stds = ctx.saved_tensors
        if mask is not None:
            gradient = gradient * mask
        of_mean = gradient if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[2:]):
            return of_mean, None, *[None for _ in log_stds]
        deviation = draw - mean
        product = deviation * gradient if torch.is_grad_enabled() else deviation.mul_(gradient)
        needed = zip(log_stds, ctx.needs_input_grad[2:], strict=True)
        of_parts = [product.sum_to_size(part.shape).to(part.dtype) if need else None for part, need in needed]
        return of_mean, None, *of_parts


def _is_fused(posterior: LogGaussian) -> bool:
    """In half precision w - mean is too coarse for the gradient of the std."""
    mean, log_stds, _ = posterior
    return torch.finfo(mean.dtype).bits >= 32 and is_plain(mean, *log_stds) and noise.can_repeat(mean.device)


def _fits_blocks(mean: Tensor, log_stds: tuple[Tensor, ...]) -> bool:
    part, *others = log_stds
    is_flat = mean.is_contiguous() and part.is_contiguous() and part.shape == mean.shape and not others
    same = part.dtype == mean.dtype
    return is_flat and same and noise.is_tabled(mean.shape, device=mean.device, dtype=mean.dtype)


def _by_blocks(mean: Tensor, log_std: Tensor) -> Tensor:
    """The draw without full-size noise and std: what a block needs stays in the cache."""
    draw = torch.empty_like(mean)
    for eps, log_stds, means, draws in noise.normal_blocks(noise.draw_seed(), log_std, mean, draw):
        torch.mul(log_stds, LOG2_E, out=draws).exp2_().mul_(eps).add_(means)
    return draw


def _at_once(mean: Tensor, log_stds: tuple[Tensor, ...]) -> Tensor:
    eps = noise.normal_like(mean, dtype=log_stds[0].dtype)
    for part in log_stds:
        eps = eps * part.exp()
    return eps.add_(mean) if eps.dtype == mean.dtype else mean + eps.to(mean.dtype)
