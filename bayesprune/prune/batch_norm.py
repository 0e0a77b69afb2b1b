"""Batch-norm statistics of a model whose channels have changed: measured anew, or kept while it is fine-tuned."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.batches import check_batches, on_device, split
from bayesprune.foundation.model import eval_mode, undone_on_error
from bayesprune.foundation.text import first_names

MAX_BATCHES = 50
"""How many batches are used, unless something else says so."""


def recalibrate_batch_norm(model: nn.Module, data: Iterable[Any], *, max_batches: int = MAX_BATCHES) -> nn.Module:
    """The model with running means and variances of its batch norms measured anew, in place; nothing else changes.

    All other modules are in evaluation mode meanwhile: torch's `update_bn` puts the whole model in training mode, where
    dropout and sampled weights would distort the statistics. Norms that the forward does not call keep what they had,
    and so do all after an error. Norms under `freeze_batch_norm` are measured, too, and are frozen again afterwards. A
    batch that gives a norm a single value a channel, as one example can, is normalised there and not measured.

    Args:
        model: Without any batch norm it is left as it is, and no batch is drawn.
        data: Batches, with labels or without: a tensor, a tuple of inputs and a target, a mapping of keyword
            arguments, or lists of images and targets.
        max_batches: No more batches than these are used.

    Raises:
        ValueError: there was no batch, a norm got single values alone, or the statistics are not finite.
        UnsupportedModelError: the model has no parameter to tell the device from.
    """
    norms = measured_norms(model)
    if not norms:
        return model
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise UnsupportedModelError("the model has no parameter, so nothing says on which device its batches belong.")
    check_batches(data)
    batches = islice(data, max_batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("data has no batch; expected an iterable of input batches.")
    with (
        torch.no_grad(),
        eval_mode(model),
        undone_on_error(_remembered(norms)),
        _measuring(norms) as (measured, unmeasured),
    ):
        for batch in chain([first], batches):
            split(model, on_device(batch, parameter.device)).run(model)
        if without := [name for name, module in model.named_modules() if module in unmeasured]:
            raise ValueError(
                f"every batch gave {first_names(without)} a single value a channel, which has no variance; expected "
                "batches of more than one example. Nothing was changed."
            )
        if broken := [name for name, module in model.named_modules() if module in measured and not _is_finite(module)]:
            raise ValueError(
                f"the statistics of {first_names(broken)} are not finite on these data; expected finite numbers. Look "
                "for NaN and infinity in the data and in the weights. Nothing was changed."
            )
    return model


@contextmanager
def _measuring(norms: Sequence[_BatchNorm]) -> Iterator[tuple[set[nn.Module], set[nn.Module]]]:
    """Inside, norms average over the batches that they meet; yields those that did, and those that could not."""
    momenta = [norm.momentum for norm in norms]
    measured, unmeasured = set[nn.Module](), set[nn.Module]()

    def measure(norm: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())))
        norm.training = x.numel() > x.shape[1]  # torch refuses single values
        if norm.training and norm not in measured:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            measured.add(norm)
            unmeasured.discard(norm)
        elif norm not in measured:
            unmeasured.add(norm)

    # Those of `freeze_batch_norm` run before, so that the mode set here is the one that counts.
    handles = [norm.register_forward_pre_hook(measure, with_kwargs=True) for norm in norms]
    try:
        for norm in norms:
            norm.training = True  # compiled models look at it, and not for new hooks
        yield measured, unmeasured
    finally:
        for norm, momentum, handle in zip(norms, momenta, handles, strict=True):
            norm.momentum = momentum
            handle.remove()


def _is_finite(norm: nn.Module) -> bool:
    return all(bool(buffer.isfinite().all()) for buffer in norm.buffers(recurse=False))


def _remembered(norms: Sequence[_BatchNorm]) -> Callable[[], None]:
    """Remembers the statistics of norms; what it returns puts them back."""
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]

    def put_back() -> None:
        for buffer, value in buffers:
            buffer.copy_(value)

    return put_back


def recalibrate_if_better(
    model: nn.Module, batches: Sequence[Any], distance: Callable[[nn.Module], float] | None
) -> bool:
    """Measures batch norm anew unless the distance is smaller without; whether it did.

    Args:
        model: Without any batch norm it is left as it is.
        batches: As for `recalibrate_batch_norm`.
        distance: Of a model's outputs from those wanted; with None it is measured anew in any case.
    """
    norms = measured_norms(model)
    if not norms:
        return False
    if distance is None:
        recalibrate_batch_norm(model, batches)
        return True
    before, put_back = distance(model), _remembered(norms)
    with undone_on_error(put_back):
        recalibrate_batch_norm(model, batches)
        if is_worse := distance(model) > before:
            put_back()
    return not is_worse


class FrozenStatistics(AbstractContextManager["FrozenStatistics"]):
    """Keeps batch norms at their running statistics; made by `freeze_batch_norm`."""

    def __init__(self, norms: Iterable[_BatchNorm]) -> None:
        self._handles = [norm.register_forward_pre_hook(_evaluate) for norm in norms]

    def remove(self) -> None:
        """Lets the norms measure batches again, from the next call of `train()` on."""
        for handle in self._handles:
            handle.remove()

    def __exit__(self, *error: object) -> None:
        """Removes itself."""
        self.remove()


def freeze_batch_norm(model: nn.Module) -> FrozenStatistics:
    """Keeps every batch norm at its running statistics in training mode, too; scales and shifts go on learning.

    For a short fine-tuning on few images after `prune_channels(..., data=...)`, whose weights were fitted to these
    statistics: batches of few images, or of few of the classes, have others. On a pretrained mobile network and 3,000
    photographs it is worth three points (docs/benchmarks/mobile.md). Nothing normalises the batch then, so learning
    rates have to be those of a fine-tuning.

    Returns:
        What ends it by `remove()`, or as a context manager.

    Examples:
        >>> import torch, bayesprune as bp
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).train()
        >>> with bp.prune.freeze_batch_norm(model):
        ...     output = model(torch.randn(8, 3))
        >>> model[1].running_mean
        tensor([0., 0., 0., 0.])
    """
    return FrozenStatistics(measured_norms(model))


def _evaluate(norm: nn.Module, _: Any) -> None:
    norm.training = False


def repeatable(data: Iterable[Any] | None) -> Iterable[Any] | None:
    """Data for several cuts: what an iterator gives, which is used up by one, is kept as far as it is used."""
    return list(islice(data, MAX_BATCHES)) if isinstance(data, Iterator) else data


def measured_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
