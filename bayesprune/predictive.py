"""Choosing the estimator for a while, and predictions averaged over the posterior."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayesprune import estimators
from bayesprune.layers import variational_layers
from bayesprune.macs import eval_mode


class Prediction(NamedTuple):
    """Moments of a model's output over the posterior; S samples of an output of shape (N, ...).

    Attributes:
        mean: (N, ...).
        variance: (N, ...), unbiased.
        samples: (S, N, ...).
    """

    mean: Tensor
    variance: Tensor
    samples: Tensor


@contextmanager
def sampling(model: nn.Module, estimator: str = "weight_sampling") -> Iterator[nn.Module]:
    """Inside, every variational layer of the model uses this estimator, in training and in evaluation.

    Layers that are not linear in their weight use weight sampling in its place.

    Raises:
        ValueError: the estimator is unknown or the model has no variational layer.
    """
    estimators.check(estimator)
    layers = [layer for _, layer in variational_layers(model)]
    if not layers:
        raise ValueError("sampling got a model without variational layers; call to_variational first.")
    before = [layer.estimator_override for layer in layers]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        if estimator != "mean":
            torch.backends.mha.set_fastpath_enabled(False)  # it reads raw weights past every forward
        for layer in layers:
            layer.estimator_override = estimator
        yield model
    finally:
        for layer, override in zip(layers, before, strict=True):
            layer.estimator_override = override
        torch.backends.mha.set_fastpath_enabled(fast_path)


def predict(model: nn.Module, *inputs: Any, method: str = "sample", num_samples: int = 30, **kwargs: Any) -> Prediction:
    """Mean and variance of the model's output over the posterior of its weights, in evaluation mode.

    Args:
        model: A variational model; its mode is restored.
        *inputs: What the model's forward takes.
        method: "sample": `num_samples` forwards, each at one draw of the weights.
        num_samples: Number of draws S, at least 2.
        **kwargs: Keyword arguments of the model's forward.

    Raises:
        ValueError: the method is unknown, or fewer than two samples were asked for.
        TypeError: the output is neither a tensor nor has `.logits`.
    """
    if method != "sample":
        raise ValueError(f'predict method is {method!r}; expected "sample".')
    if num_samples < 2:
        raise ValueError(f"num_samples is {num_samples}; a variance needs at least 2.")
    with torch.no_grad(), eval_mode(model), sampling(model, "weight_sampling"):
        samples = torch.stack([_logits(model(*inputs, **kwargs)) for _ in range(num_samples)])
    return Prediction(samples.mean(0), samples.var(0), samples)


def _logits(output: Any) -> Tensor:
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(f"the model returned {type(output).__name__}; expected a tensor or an output with `.logits`.")
    return output
