"""How one forward pass of a layer sees the posterior of its weights: pure functions.

An estimator takes the layer's operation `operation(x, weight, bias)`, linear in weight and bias unless said
otherwise, the input and the two posteriors, and returns an output whose distribution over the noise is the
(exact or approximate) distribution of the layer's output under the posterior.

Shapes: N examples, I / O input / output features, K kernel taps; `x` is (N, ..., I) for a linear layer and
(N, I, *spatial) for a convolution; `feature_dim` is the (negative) dimension of the features in `x`.
"""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor

from bayesprune.estimators.draws import deviation, sample
from bayesprune.estimators.local import add_noise, with_local_noise
from bayesprune.estimators.types import Bilinear, Gaussian, LogGaussian, Operation, Posterior, as_gaussian, is_plain
from bayesprune.foundation import noise
from bayesprune.moments import Moments


def mean(operation: Operation, x: Tensor, weight: Posterior, bias: Posterior | None, feature_dim: int) -> Tensor:
    """The output at the posterior means."""
    return operation(x, center(weight), None if bias is None else center(bias))


def center(posterior: Posterior) -> Tensor:
    """The mean, zero where the weight was removed."""
    mask = posterior.mask if isinstance(posterior, LogGaussian) else None
    return posterior.mean if mask is None else posterior.mean * mask


def weight_sampling(
    operation: Operation, x: Tensor, weight: Posterior, bias: Posterior | None, feature_dim: int
) -> Tensor:
    """The output at one draw of the weights, shared by all examples and positions (Blundell et al., 2015).

    The only estimator for an operation that is not linear in its weight.
    """
    return operation(x, sample(weight), None if bias is None else sample(bias))


def flipout(operation: Operation, x: Tensor, weight: Posterior, bias: Posterior | None, feature_dim: int) -> Tensor:
    """One draw of the weights whose signs are flipped per example (Eq. 4 of Wen et al., 2018).

    y = f(x, mean) + f(x * r, std * eps) * s with random signs r (N, I) and s (N, O): the noise of two examples is
    uncorrelated, the noise of two positions of one example is shared as the weight is shared.
    """
    output = mean(operation, x, weight, bias, feature_dim)
    flipped = x * _example_signs(x, feature_dim)
    noise_ = operation(flipped, deviation(weight), None if bias is None else deviation(bias))
    return output + noise_ * _example_signs(noise_, feature_dim)


def local_reparameterization(
    operation: Operation, x: Tensor, weight: Posterior, bias: Posterior | None, feature_dim: int
) -> Tensor:
    """Independent Gaussian outputs with the right mean and variance (Eq. 6 of Kingma et al., 2015).

    y = f(x, mean) + sqrt(f(x^2, std^2)) * eps. Exact where a weight meets one position of each example; elsewhere the
    noise is independent between positions, although the weight is shared, and averages away downstream.
    """
    output = mean(operation, x, weight, bias, feature_dim)
    if isinstance(operation, Bilinear) and _is_whole(weight) and _is_whole(bias) and is_plain(x, output):
        return with_local_noise(output, operation, x, weight, bias, feature_dim)
    return add_noise(
        output,
        _output_variance(operation, x, as_gaussian(weight), None if bias is None else as_gaussian(bias)),
        feature_dim,
    )


def moments(operation: Operation, x: Tensor, weight: Posterior, bias: Posterior | None, feature_dim: int) -> Tensor:
    """Mean and variance of the output, without noise (Dera et al., 2019): the operation's own rule for `Moments`."""
    return operation(x, uncertain(weight), None if bias is None else uncertain(bias))


def uncertain(posterior: Posterior) -> Moments:
    """The posterior as a tensor with mean and variance."""
    gaussian = as_gaussian(posterior)
    return Moments(gaussian.mean, gaussian.std.square())


_FUNCTIONS: dict[str, Callable[[Operation, Tensor, Posterior, Posterior | None, int], Tensor]] = {
    "mean": mean,
    "weight_sampling": weight_sampling,
    "flipout": flipout,
    "local_reparameterization": local_reparameterization,
    "moments": moments,
}
ESTIMATORS = ("auto", *_FUNCTIONS)


def check(name: str) -> str:
    """The name itself if it is an estimator's.

    Raises:
        ValueError: the name is not one of `ESTIMATORS`.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"estimator is {name!r}; expected one of {', '.join(ESTIMATORS)}.")
    return name


def run(
    name: str, operation: Operation, x: Tensor, weight: Posterior, bias: Posterior | None, feature_dim: int
) -> Tensor:
    """The output of the estimator of that name (any but "auto", which a layer resolves from its input)."""
    return _FUNCTIONS[name](operation, x, weight, bias, feature_dim)


def _output_variance(operation: Operation, x: Tensor, weight: Gaussian, bias: Gaussian | None) -> Tensor:
    """f(x^2, std^2), in float32 or better: squares of small stds underflow in half precision."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        weight_variance = weight.std.to(dtype).square().expand(weight.mean.shape)
        bias_variance = None if bias is None else bias.std.to(dtype).square().expand(bias.mean.shape)
        return operation(x.to(dtype).square(), weight_variance, bias_variance)


def _is_whole(posterior: Posterior | None) -> TypeGuard[LogGaussian]:
    """Whether what there is has a log std in parts, and no weight of it was removed."""
    if posterior is None:
        return True
    return isinstance(posterior, LogGaussian) and posterior.mask is None and is_plain(*posterior.log_stds)


def _example_signs(x: Tensor, feature_dim: int) -> Tensor:
    kept = {0, x.dim() + feature_dim}
    shape = tuple(size if dim in kept else 1 for dim, size in enumerate(x.shape))
    return noise.signs(shape, device=x.device, dtype=x.dtype)
