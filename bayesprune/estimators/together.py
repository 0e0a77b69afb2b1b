"""Draws of many tensors in a few passes over all of them, and the gradients of their log stds.

The tensors are contiguous, in float32 and on one device, with a std for each weight, or for each row, an entry of the
first dimension. Where passes are kernels to be launched, all noise is put into one tensor, rows of one length side by
side, so that one kernel serves all of them.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from bayesprune.foundation import noise
from bayesprune.foundation.device import has_cheap_calls
from bayesprune.foundation.foreach import foreach


class Kind(Protocol):
    """What is known of a tensor to draw."""

    @property
    def seed(self) -> Any:
        """Of its noise."""

    @property
    def is_rowwise(self) -> Any:
        """Whether rows have a std each."""


Item = tuple[Tensor, tuple[Tensor, ...], Tensor | None, Tensor]
"""Mean, the one part of the log std, the draw where it was kept, and the draw's gradient."""


def draws(kinds: Sequence[Kind], posteriors: Sequence[Any]) -> list[Tensor]:
    """mean + exp(log std) eps of each."""
    means, log_stds = [p.mean for p in posteriors], [p.log_stds[0] for p in posteriors]
    if has_cheap_calls(means[0].device):
        eps = [_view(kind, mean) for kind, mean in zip(kinds, means, strict=True)]
        return list(foreach("addcmul", means, eps, foreach("exp", log_stds)))
    order, num_single = _order(kinds, means)
    ordered, logs = [means[i] for i in order], [log_stds[i] for i in order]
    flat, views = _flat_noise([kinds[i] for i in order], ordered)
    if num_single:
        foreach("mul_", views[:num_single], foreach("exp", logs[:num_single]))
    if num_single < len(order):
        stds = _joined(logs[num_single:]).exp_()
        for rows, of_rows in _runs(flat, ordered, num_single):
            rows.mul_(stds[of_rows].unsqueeze(1))
    foreach("add_", views, ordered)
    found = dict(zip(order, views, strict=True))
    return [found[i] for i in range(len(order))]


def gradients(kinds: Sequence[Kind], items: Sequence[Item]) -> list[list[Tensor]]:
    """The gradients of the log stds, as lists of one."""
    single = [i for i, kind in enumerate(kinds) if not kind.is_rowwise]
    rowwise = sorted((i for i, kind in enumerate(kinds) if kind.is_rowwise), key=lambda i: _row_size(items[i][0]))
    found: dict[int, Tensor] = {}
    if single:
        kept = [draw for i in single if (draw := items[i][2]) is not None]
        deviations = foreach("sub", kept, [items[i][0] for i in single])
        foreach("mul_", deviations, [items[i][3] for i in single])
        found.update(zip(single, deviations, strict=True))
    if rowwise:
        chosen = [items[i] for i in rowwise]
        found.update(zip(rowwise, _row_gradients([kinds[i] for i in rowwise], chosen), strict=True))
    return [[found[i]] for i in range(len(kinds))]


def _row_gradients(kinds: Sequence[Kind], items: Sequence[Item]) -> Sequence[Tensor]:
    means, log_stds = [item[0] for item in items], [item[1][0] for item in items]
    given = [item[3] for item in items]
    if has_cheap_calls(means[0].device):
        eps = [_view(kind, mean) for kind, mean in zip(kinds, means, strict=True)]
        products = foreach("mul", eps, given)
        sums = [product.flatten(1).sum(1).view_as(log) for product, log in zip(products, log_stds, strict=True)]
        foreach("mul_", sums, foreach("exp", log_stds))
        return sums
    flat, views = _flat_noise(kinds, means)
    foreach("mul_", views, given)
    sums = _joined([rows.sum(1) for rows, _ in _runs(flat, means, 0)])
    sums.mul_(_joined(log_stds).exp_())
    split = sums.split([log_std.numel() for log_std in log_stds])
    return [part.view_as(log_std) for part, log_std in zip(split, log_stds, strict=True)]


def _view(kind: Kind, mean: Tensor) -> Tensor:
    (block,) = noise.table_blocks(kind.seed, mean.shape, mean.device)
    return block.view(mean.shape)


def _order(kinds: Sequence[Kind], means: Sequence[Tensor]) -> tuple[list[int], int]:
    """Those with a std for each weight first, then by the length of rows; and how many come first."""
    lengths = [_row_size(mean) if kind.is_rowwise else 0 for kind, mean in zip(kinds, means, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return order, lengths.count(0)


def _flat_noise(kinds: Sequence[Kind], means: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """All noise in one tensor, and views of it in the shapes of these."""
    blocks = [b for kind, m in zip(kinds, means, strict=True) for b in noise.table_blocks(kind.seed, m.shape, m.device)]
    flat = torch.cat(blocks)
    split = flat.split([mean.numel() for mean in means])
    return flat, [part.view(mean.shape) for part, mean in zip(split, means, strict=True)]


def _runs(flat: Tensor, means: Sequence[Tensor], first: int) -> Iterator[tuple[Tensor, slice]]:
    """From the mean of this number on: rows of one length (R, I) each, views of `flat`, and which rows they are."""
    start, row = sum(mean.numel() for mean in means[:first]), 0
    for length, alike in groupby(means[first:], key=_row_size):
        num_rows = sum(len(mean) for mean in alike)
        yield flat[start : start + num_rows * length].view(num_rows, length), slice(row, row + num_rows)
        start, row = start + num_rows * length, row + num_rows


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.view(-1) for tensor in tensors])


def _row_size(mean: Tensor) -> int:
    return mean.shape[1:].numel()
