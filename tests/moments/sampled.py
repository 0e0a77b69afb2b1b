"""The slow oracle of every rule: the function itself, at many draws of its inputs.

    result = exact(F.relu, x)                          # mean and variance within five standard errors
    result = near(F.gelu, x, mean=0.01, variance=0.02)  # mean within 1 % of the output's std, variance within 2 %

The function must work on a plain tensor of the input's shape; it runs under `torch.vmap` over the draws, so it may draw
random numbers itself (dropout), and must not write in place into what is not its own. Keep inputs below 200 entries.
Entries of next to no variance, beside the output's largest, are held to what draws can see of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayesprune.moments import Moments, parts

NUM_SAMPLES = 100_000
STANDARD_ERRORS = 5


class Sampled(NamedTuple):
    """What S draws say of an output.

    Attributes:
        values: (S, *shape), float64.
        mean: (*shape).
        variance: (*shape).
        mean_error: Standard error of the mean.
        variance_error: Standard error of the variance.
    """

    values: Tensor
    mean: Tensor
    variance: Tensor
    mean_error: Tensor
    variance_error: Tensor


def draws(x: Moments, num_samples: int = NUM_SAMPLES) -> Tensor:
    """Gaussian draws (S, *shape) in float64 with this mean, this variance and this covariance between positions."""
    mean, variance, shared = (None if part is None else part.detach().double() for part in parts(x))
    assert mean is not None
    if variance is None:
        return mean.expand(num_samples, *mean.shape)
    alone = variance if shared is None else variance - shared
    assert (alone >= 0).all(), "the shared part is larger than the variance"
    values = torch.randn(num_samples, *mean.shape, dtype=torch.float64).mul_(alone.sqrt()).add_(mean)
    if shared is not None:
        aligned = shared.reshape((1,) * (mean.dim() - shared.dim()) + tuple(shared.shape))
        values += torch.randn(num_samples, *aligned.shape, dtype=torch.float64).mul_(aligned.sqrt())
    return values


def sampled(function: Callable[..., Any], *inputs: Any, num_samples: int = NUM_SAMPLES, seed: int = 0) -> Sampled:
    """The output of the function at draws of its inputs; plain inputs are taken as they are."""
    torch.manual_seed(seed)
    values = [draws(x, num_samples) if isinstance(x, Moments) else x for x in inputs]
    dims = tuple(0 if isinstance(x, Moments) else None for x in inputs)
    outputs = torch.vmap(function, in_dims=dims, randomness="different")(*values).double()
    mean = outputs.mean(0)
    squares = (outputs - mean).square_()
    variance = squares.sum(0) / (num_samples - 1)
    fourth = squares.square_().mean(0)
    return Sampled(
        outputs,
        mean,
        variance,
        (variance / num_samples).sqrt(),
        ((fourth - variance.square()).clamp_min(0) / num_samples).sqrt(),
    )


def sampled_shared(found: Sampled, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The mean covariance, in draws, between two entries along the dimensions that have size 1 in `shape`."""
    deviations = found.values - found.mean
    shape = (1,) * (found.mean.dim() - len(shape)) + tuple(shape)
    dims = [dim for dim, size in enumerate(shape) if size == 1 and found.mean.shape[dim] > 1]
    assert dims, f"no dimension of {tuple(found.mean.shape)} is shared in {shape}"
    count = torch.Size(found.mean.shape[dim] for dim in dims).numel()
    total = deviations.sum([dim + 1 for dim in dims], keepdim=True).square().mean(0)
    return (total - found.variance.sum(dims, keepdim=True)) / (count * (count - 1))


def z_scores(result: Moments, found: Sampled) -> tuple[Tensor, Tensor]:
    """How many standard errors the moments are off the draws: of the mean and of the variance."""
    mean, variance, _ = parts(result)
    variance = torch.zeros_like(mean) if variance is None else variance
    assert mean.shape == found.mean.shape, f"shape {tuple(mean.shape)}, of the draws {tuple(found.mean.shape)}"
    rounding = 1e-9 * (1 + found.mean.abs())
    rare = 1e-4 * found.variance.max()  # what happens in a few of the draws, or in none
    z_mean = (mean.double() - found.mean) / (found.mean_error + rounding + 1e-4 * rare.sqrt())
    z_variance = (variance.double() - found.variance) / (found.variance_error + rounding.square() + rare)
    return z_mean.detach(), z_variance.detach()


def exact(function: Callable[..., Any], *inputs: Any, num_samples: int = NUM_SAMPLES) -> Moments:
    """The function of the inputs, after a check that mean and variance agree with draws to five standard errors."""
    result, found = function(*inputs), sampled(function, *inputs, num_samples=num_samples)
    z_mean, z_variance = (z.abs().max().item() for z in z_scores(result, found))
    print(f"largest |z|: mean {z_mean:.2f}, variance {z_variance:.2f}")
    assert z_mean < STANDARD_ERRORS, f"mean: |z| = {z_mean:.2f}"
    assert z_variance < STANDARD_ERRORS, f"variance: |z| = {z_variance:.2f}"
    return result


def near(function: Callable[..., Any], *inputs: Any, mean: float, variance: float, **options: Any) -> Moments:
    """The function of the inputs, after a check that it is near the draws, within what five standard errors allow.

    Args:
        function: Of tensors.
        *inputs: Its inputs, `Moments` or plain.
        mean: Error of the mean allowed, in stds of the output.
        variance: Error of the variance allowed, as a fraction of it; or of a hundredth of the output's largest.
        **options: Of `sampled`.
    """
    result, found = function(*inputs), sampled(function, *inputs, **options)
    got, got_variance, _ = parts(result)
    scale = found.variance.clamp_min(0.01 * found.variance.max())
    off_mean = ((got - found.mean).abs() - STANDARD_ERRORS * found.mean_error).clamp_min(0) / scale.sqrt()
    off = (got_variance - found.variance).abs() - STANDARD_ERRORS * found.variance_error
    off_variance = off.clamp_min(0) / scale
    print(f"largest error: mean {off_mean.max():.4f} stds, variance {off_variance.max():.4f} of itself")
    assert off_mean.max() <= mean, f"mean is off by {off_mean.max():.4f} stds; {mean} allowed"
    assert off_variance.max() <= variance, f"variance is off by {off_variance.max():.4f} of itself; {variance} allowed"
    return result


def near_shared(result: Moments, found: Sampled, *, tolerance: float) -> None:
    """Checks the covariance between positions: its error as a fraction of the variance of the same unit."""
    shared = parts(result).shared
    assert shared is not None, "nothing is shared"
    expected = sampled_shared(found, tuple(shared.shape))
    scale = found.variance.mean([d for d in range(found.mean.dim()) if expected.shape[d] == 1], keepdim=True)
    error = ((shared.double() - expected).abs() / scale).max().item()
    print(f"shared: largest error {error:.4f} of the variance")
    assert error <= tolerance, f"shared is off by {error:.4f} of the variance; {tolerance} allowed"
