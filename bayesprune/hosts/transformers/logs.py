"""What a callback adds to the Trainer's logs: posteriors in a few numbers, before the loggers see them."""

import logging
import sys
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn
from transformers import DefaultFlowCallback, TrainerCallback
from transformers.trainer_callback import CallbackHandler

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


_LOGGER = logging.getLogger(__name__)
_T = TypeVar("_T")


def stand_before_loggers(callback: TrainerCallback) -> None:
    """Moves the callback, whose event is running, from behind the Trainer's loggers to before them.

    The Trainer puts a user's callbacks last, and hands its list of them to no event: it is found with the caller. Right
    behind `DefaultFlowCallback` is early enough for the logs, and late enough to know whether a step is logged.
    """
    handler = nearest_caller(CallbackHandler)
    callbacks = handler.callbacks if handler is not None else []
    flows = [index for index, other in enumerate(callbacks) if isinstance(other, DefaultFlowCallback)]
    if not flows or callback not in callbacks:
        _LOGGER.warning(
            "the Trainer's callbacks were not found, so its loggers miss what %s adds; put "
            "`trainer.callback_handler.callbacks.insert(1, trainer.pop_callback(callback))` before trainer.train()",
            type(callback).__name__,
        )
    elif callbacks.index(callback) > flows[0] + 1:
        callbacks.remove(callback)
        callbacks.insert(flows[0] + 1, callback)


def nearest_caller(kind: type[_T]) -> _T | None:
    """The innermost of `callers`; None outside all of them."""
    return next(callers(kind), None)


def callers(kind: type[_T]) -> Iterator[_T]:
    """The objects of this kind whose methods are running, from the innermost on.

    The Trainer hands neither itself nor its list of callbacks to a callback.
    """
    frame = sys._getframe()
    while frame is not None:
        if isinstance(caller := frame.f_locals.get("self"), kind):
            yield caller
        frame = frame.f_back
