"""Choosing the estimator for a while, and predictions averaged over the posterior."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayesprune import estimators
from bayesprune.foundation.batches import logits_of
from bayesprune.foundation.model import eval_mode, without_fast_path
from bayesprune.layers import variational_layers
from bayesprune.moments import parts


class Prediction(NamedTuple):
    """Moments of a model's output over the posterior; S samples of an output of shape (N, ...).

    Attributes:
        mean: (N, ...).
        variance: (N, ...); unbiased where it was sampled.
        samples: (S, N, ...); None where the moments were propagated.
    """

    mean: Tensor
    variance: Tensor
    samples: Tensor | None = None

    def classify(self, *, num_draws: int = 256, temperature: float = 1.0) -> "Classification":
        """Classifies by the logits (N, ..., C): over the samples, or over draws from independent Gaussians.

        Args:
            num_draws: Number of draws where there are no samples; they are the same at every call.
            temperature: What each draw is divided by; above 1 the classes come closer to each other.

        Raises:
            ValueError: there is a single logit where classes are expected.
        """
        return classify(draw / temperature for draw in self._draws(num_draws))

    def _draws(self, num_draws: int) -> Iterator[Tensor]:
        if self.samples is not None:
            yield from self.samples
            return
        generator = torch.Generator(self.mean.device).manual_seed(0)
        std = self.variance.sqrt()
        for _ in range(num_draws // 2):
            eps = torch.randn(std.shape, dtype=std.dtype, device=std.device, generator=generator)
            yield from (self.mean + std * eps, self.mean - std * eps)


class Classification(NamedTuple):
    """Class probabilities and uncertainties of a posterior over logits.

    Attributes:
        probabilities: Mean class probabilities (N, ..., C).
        predictive_entropy: Entropy of these in nats (N, ...): all uncertainty.
        mutual_information: Its part that comes from the weights, in nats (N, ...); 0 where all draws agree.
    """

    probabilities: Tensor
    predictive_entropy: Tensor
    mutual_information: Tensor


def classify(logits: Iterable[Tensor]) -> Classification:
    """Mean probabilities and uncertainties over draws of logits, each (N, ..., C).

    The mutual information is H(mean p) - mean H(p) (Houlsby et al., 2011).

    Raises:
        ValueError: there is no draw, or a single logit where classes are expected.
    """
    count, total, entropies = 0, torch.zeros(()), torch.zeros(())
    for draw in logits:
        if draw.shape[-1:] == (1,):
            raise ValueError(
                f"classify got draws of the shape {tuple(draw.shape)}, a single logit each; expected (N, ..., C) with "
                "two classes or more. For yes or no average the sigmoid over the draws, or append a zero to each."
            )
        log_p = draw.to(torch.promote_types(draw.dtype, torch.float32)).log_softmax(-1)
        count, total, entropies = count + 1, log_p.exp() + total, _entropy(log_p.exp()) + entropies
    if not count:
        raise ValueError("classify got no draws of logits; expected at least one.")
    predictive = _entropy(total / count)
    return Classification(total / count, predictive, (predictive - entropies / count).clamp_min(0))


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(-1)


@contextmanager
def sampling(model: nn.Module, estimator: str = "weight_sampling") -> Iterator[nn.Module]:
    """Inside, every variational layer of the model uses this estimator, in training and in evaluation.

    "moments" makes the model return tensors with mean and variance, `bayesprune.moments.Moments`; of the others, layers
    that are not linear in their weight use weight sampling in its place. Under "moments" what `torch.compile` made runs
    uncompiled; `bayesprune.prediction.compile_moments` compiles.

    Raises:
        ValueError: the estimator is unknown or the model has no variational layer.
    """
    estimators.check(estimator)
    layers = [layer for _, layer in variational_layers(model)]
    if not layers:
        raise ValueError("sampling got a model without variational layers; call to_variational first.")
    before = [layer.estimator_override for layer in layers]
    # The fast path of torch's attention reads raw weights past every forward.
    slow_path = nullcontext() if estimator == "mean" else without_fast_path()
    # torch.compile does not see through Moments; `compile_moments` does.
    stance = torch.compiler.set_stance("force_eager") if estimator == "moments" else nullcontext()
    try:
        for layer in layers:
            layer.estimator_override = estimator
        with stance, slow_path:
            yield model
    finally:
        for layer, override in zip(layers, before, strict=True):
            layer.estimator_override = override


def predict(model: nn.Module, *inputs: Any, method: str = "sample", num_samples: int = 30, **kwargs: Any) -> Prediction:
    """Mean and variance of the model's output over the posterior of its weights, in evaluation mode.

    Args:
        model: A variational model; its mode is restored.
        *inputs: What the model's forward takes.
        method: "sample": `num_samples` forwards, each at one draw of the weights. "moments": one forward that
            propagates mean and variance (`bayesprune.moments`).
        num_samples: Number of draws S, at least 2; "moments" takes none.
        **kwargs: Keyword arguments of the model's forward.

    Raises:
        ValueError: the method is unknown, fewer than two samples were asked for, or the model has no variational layer.
        TypeError: the output is neither a tensor nor has `.logits`.
        UnsupportedFunctionError: the model calls a function that has no rule for moments.
    """
    if method == "moments":
        with torch.no_grad(), eval_mode(model), sampling(model, "moments"):
            mean, variance, _ = parts(logits_of(model(*inputs, **kwargs)))
        return Prediction(mean, torch.zeros_like(mean) if variance is None else variance)
    if method != "sample":
        raise ValueError(f'predict method is {method!r}; expected "sample" or "moments".')
    if num_samples < 2:
        raise ValueError(f"num_samples is {num_samples}; a variance needs at least 2.")
    with torch.no_grad(), eval_mode(model), sampling(model, "weight_sampling"):
        samples = torch.stack([logits_of(model(*inputs, **kwargs)) for _ in range(num_samples)])
    return Prediction(samples.mean(0), samples.var(0), samples)
