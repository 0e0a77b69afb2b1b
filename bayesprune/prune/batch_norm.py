"""Batch-norm statistics for a model whose channels have changed: forward passes only."""

from collections.abc import Iterable
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.batches import on_device, split
from bayesprune.foundation.model import eval_mode


def recalibrate_batch_norm(model: nn.Module, data: Iterable[Any], *, max_batches: int = 50) -> nn.Module:
    """The model with running means and variances of its batch norms measured anew, in place; nothing else changes.

    All other modules are in evaluation mode meanwhile: torch's `update_bn` puts the whole model in training mode, where
    dropout and sampled weights would distort the statistics.

    Args:
        model: Without any batch norm it is left as it is, and no batch is drawn.
        data: Batches, with labels or without: a tensor, a tuple of inputs and a target, a mapping of keyword
            arguments, or lists of images and targets.
        max_batches: No more batches than these are used.

    Raises:
        ValueError: there was no batch.
        UnsupportedModelError: the model has no parameter to tell the device from.
    """
    norms = measured_norms(model)
    if not norms:
        return model
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise UnsupportedModelError("the model has no parameter, so nothing says on which device its batches belong.")
    before = [norm.momentum for norm in norms]
    batches = islice(data, max_batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("data has no batch; expected an iterable of input batches.")
    with torch.no_grad(), eval_mode(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over the batches
                norm.training = True
            for batch in chain([first], batches):
                split(model, on_device(batch, parameter.device)).run(model)
        finally:
            for norm, momentum in zip(norms, before, strict=True):
                norm.momentum = momentum
    return model


def measured_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
