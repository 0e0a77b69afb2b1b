"""How far probabilities can be trusted, and how much can go before a score falls."""

from collections.abc import Sequence

import torch
from torch import Tensor


def calibration_error(probabilities: Tensor, labels: Tensor, *, num_bins: int = 15) -> float:
    """Expected calibration error (Guo et al., 2017): mean distance of confidence and accuracy over bins of confidence.

    Args:
        probabilities: (N, C).
        labels: (N).
        num_bins: Bins of equal width.
    """
    confidence, predicted = probabilities.double().max(1)
    bins = (confidence * num_bins).long().clamp(max=num_bins - 1)
    gaps = torch.zeros(num_bins, dtype=torch.float64).index_add(
        0, bins.cpu(), ((predicted == labels).double() - confidence).cpu()
    )
    return float(gaps.abs().sum() / len(labels))


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    """Mean of -log p of the labels in nats; probabilities (N, C) count as 1e-12 at least."""
    own = probabilities.double().gather(1, labels[:, None]).clamp_min(1e-12)
    return float(-own.log().mean())


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Chance that an uncertainty of what is foreign (M) is above one of what is known (N), ties counted half."""
    values, where = torch.cat([inside, outside]).double().sort()
    _, group, counts = values.unique_consecutive(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts - 1) / 2)[group]
    foreign = ranks[where >= len(inside)].sum()
    return float((foreign - len(outside) * (len(outside) + 1) / 2) / (len(inside) * len(outside)))


def prune_potential(
    removed: Sequence[float], errors: Sequence[float], reference: float, *, delta: float = 0.005
) -> float:
    """The largest share removed whose error is at most delta above the unpruned model's (Liebenwein et al., 2021).

    Args:
        removed: Share of weights or MACs that is gone, of each model.
        errors: Of each model, fractions, on the same examples as the reference.
        reference: Error of the unpruned model.
        delta: Largest rise that is accepted.

    Examples:
        >>> prune_potential([0.5, 0.7, 0.9], [0.10, 0.104, 0.2], 0.1)
        0.7
    """
    pairs = zip(removed, errors, strict=True)
    return max((share for share, error in pairs if error <= reference + delta + 1e-9), default=0.0)


def excess_error(pruned: tuple[float, float], unpruned: tuple[float, float]) -> float:
    """By how much more a pruned model's error rises from its own examples to changed ones than the unpruned model's.

    Args:
        pruned: Errors on the examples as they are, and as they were changed.
        unpruned: The same of the unpruned model.
    """
    return (pruned[1] - pruned[0]) - (unpruned[1] - unpruned[0])
