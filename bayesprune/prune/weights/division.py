"""Divides a sparsity between layers by what cutting each of them alone costs: smooth, from two measured levels a layer.

With the weights that stay fitted anew, the cost of a layer rises almost exponentially with its sparsity, for all layers
at much the same rate. So two levels around the mean tell the curve, and the division with the smallest sum of costs is
where one more weight costs the same in every layer.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesprune.foundation.batches import device_of, logits_of, on_device, split
from bayesprune.foundation.model import eval_mode
from bayesprune.laplace.calibration import unmasked

_STEP, _REACH = 0.1, 0.2  # from the mean: to the levels that are measured, and as far as a layer may go
_POSITIONS = 256  # of a batch, at which predictions are compared
_RATES = (2.0, 20.0)  # of the exponential: about 7 at half of the weights


def levels(sparsity: float) -> tuple[float, float]:
    """The two sparsities at which each layer is measured."""
    return max(sparsity - _STEP, sparsity / 2), min(sparsity + _STEP, (1 + sparsity) / 2)


def divide(
    sparsity: float, sizes: Sequence[int], costs: Sequence[tuple[float, float]], least: Sequence[float]
) -> list[float]:
    """The sparsity of each layer, the whole being `sparsity`, with the smallest sum of costs within 0.2 of it.

    Args:
        sparsity: Fraction of all weights, above 0 and below 1.
        sizes: Weights of each layer.
        costs: What each costs at the two `levels`; what is not positive counts as a thousandth of the mean.
        least: What each has lost already.

    Example:
        >>> [round(share, 2) for share in divide(0.5, [100, 100], [(0.01, 0.04), (0.02, 0.08)], [0, 0])]
        [0.55, 0.45]
    """
    low, high = levels(sparsity)
    floor = 1e-3 * max(sum(map(sum, costs)) / (2 * len(costs)), 1e-30)
    curves = []
    for size, (first, last) in zip(sizes, costs, strict=True):
        first, last = max(first, floor), max(last, floor)
        rate = min(max(math.log(last / first) / (high - low), _RATES[0]), _RATES[1])
        middle = math.sqrt(first * last)
        curves.append((rate, math.log(size / (rate * middle))))
    lowest = [max(sparsity - _REACH, 0.0, gone) for gone in least]
    highest = [max(min(sparsity + _REACH, (1 + sparsity) / 2), gone) for gone in lowest]

    def at(price: float) -> list[float]:
        """Where one more weight of each costs e^price."""
        return [
            min(max((low + high) / 2 + (price + offset) / rate, least), most)
            for (rate, offset), least, most in zip(curves, lowest, highest, strict=True)
        ]

    cheap, dear = -200.0, 200.0
    for _ in range(100):
        price = (cheap + dear) / 2
        total = sum(share * size for share, size in zip(at(price), sizes, strict=True))
        cheap, dear = (price, dear) if total < sparsity * sum(sizes) else (cheap, price)
    return at(dear)


@torch.no_grad()
def divergence(model: nn.Module, batches: Sequence[Any]) -> Callable[[nn.Module], float]:
    """A function of a model: the mean KL divergence of its predictions from those that `model` has now, in nats.

    Predictions are compared at 256 positions of each batch at most, evenly spaced among those that an `attention_mask`
    counts.
    """
    before = [_log_probabilities(model, batch) for batch in batches]

    @torch.no_grad()
    def measure(changed: nn.Module) -> float:
        total = sum(
            float(F.kl_div(_log_probabilities(changed, batch), wanted, log_target=True, reduction="sum"))
            for batch, wanted in zip(batches, before, strict=True)
        )
        return total / sum(map(len, before))

    return measure


def _log_probabilities(model: nn.Module, batch: Any) -> Tensor:
    parts = split(model, on_device(batch, device_of(model)))
    with eval_mode(model):
        logits = logits_of(parts.run(model))
    logits = logits.movedim(1, -1) if logits.dim() > 3 else logits
    logits = unmasked(logits, parts)
    return logits[:: -(-len(logits) // _POSITIONS)].float().log_softmax(1)
