"""The posteriors of a model in a few numbers, for the Trainer's logs and evaluation metrics."""

import torch
from torch import nn

from bayesprune.foundation.sharding import full_tensor
from bayesprune.layers import named_posteriors
from bayesprune.prune.scores.weights import snr

_MAX_SAMPLE = 1_000_000  # weights whose SNRs the median is taken of, evenly spaced


@torch.no_grad()
def summarize(model: nn.Module) -> dict[str, float]:
    """Sparsity of all weights, and median SNR and the share of SNRs below 1 of those that are kept.

    All three are pure numbers; biases are left out. Nothing for a model without posteriors over weights.
    """
    total, samples = 0, []
    below = kept = 0
    posteriors = [posterior for posterior in named_posteriors(model) if posterior.is_weight]
    if not posteriors:
        return {}
    stride = max(1, sum(posterior.mean.numel() for posterior in posteriors) // _MAX_SAMPLE)
    for posterior in posteriors:
        scores = full_tensor(snr(posterior))
        total += scores.numel()
        mask = posterior.layer.mask(posterior.parameter, whole=True)
        scores = scores.flatten() if mask is None else scores[mask]
        kept += scores.numel()
        below += int((scores < 1).sum())
        samples.append(scores[::stride].cpu())
    return {
        "sparsity": 1 - kept / total,
        "snr_median": float(torch.cat(samples).median()) if kept else 0.0,
        "snr_below_1": below / max(kept, 1),
    }
