"""A distribution over the patterns of a block: exactly N of its M gates are open.

Conditional Bernoulli (Chen and Liu, 1997, Statistica Sinica 7): independent gates, given that N of them are open. A
pattern has a probability in proportion to exp(sum of the logits of its open gates). After MaskLLM (Fang et al., 2024,
arXiv:2409.17481), whose categorical has a logit for each of the six patterns of 2:4, drawn with Gumbel noise; here each
gate keeps its one logit, so that six patterns have four parameters, and nothing is drawn.
"""

import itertools
import math

import torch
from torch import Tensor

MOST_PATTERNS = 100
"""Of blocks with more patterns each gate decides by itself: 2:4 has 6, 4:8 has 70, 8:16 has 12,870."""


def patterns(n: int, m: int) -> Tensor | None:
    """All masks (P, M) of a block with N ones, float32; None where they are more than `MOST_PATTERNS`."""
    if math.comb(m, n) > MOST_PATTERNS:
        return None
    masks = torch.zeros(math.comb(m, n), m)
    for mask, is_open in zip(masks, itertools.combinations(range(m), n), strict=True):
        mask[list(is_open)] = 1
    return masks


def inclusion_in_blocks(logits: Tensor, masks: Tensor) -> Tensor:
    """Probabilities (..., M) that each gate of a block is open, given that the block has one of the patterns.

    Exact: the sum over the patterns in which it is. Those of a block add up to N, and a number added to all logits of
    a block changes none.

    Args:
        logits: (..., M), of the gates by themselves.
        masks: (P, M), the patterns.

    Examples:
        >>> inclusion_in_blocks(torch.zeros(4), patterns(2, 4))
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    return (logits @ masks.mT).softmax(-1) @ masks
