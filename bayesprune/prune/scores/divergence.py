"""How far the predictions of a cut model are from those before: in nats, or as squared errors of a single output."""

import torch.nn.functional as F
from torch import Tensor


def as_predictions(logits: Tensor) -> Tensor:
    """What `total_divergence` compares, (predictions, classes): log probabilities; a single output stays as it is."""
    return logits if logits.shape[1] == 1 else logits.log_softmax(1)


def total_divergence(before: Tensor, now: Tensor) -> float:
    """The sum over predictions of KL(before || now) in nats, or of half the squared error of a single output."""
    if before.shape[1] == 1:
        return 0.5 * float((now - before).square().sum())
    return float(F.kl_div(now, before, log_target=True, reduction="sum"))
