"""Draws of many tensors, and the gradients of their log stds, where each pass is a kernel to be launched.

The tensors are contiguous, in float32 and on one device, with noise of the table, so that few kernels serve all of
them. Rows of weights that share a std are put into one tensor, in units that divide the rows of a run of tensors: what
one kernel does to all units of a run needs to know of each the row that it belongs to, and no more.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bayesprune.foundation import noise
from bayesprune.foundation.foreach import foreach

_NUM_REMEMBERED = 64
_FEW = 1 << 12  # weights with a std each that go with rows, where there are some
_MANY_UNITS = 1 << 16
_SMALL_UNIT = 32


class Kind(Protocol):
    """What is known of a tensor to draw."""

    @property
    def seed(self) -> Any:
        """Of its noise."""

    @property
    def stds(self) -> str:
        """Who has a std: "weights", "rows", or "any" where the log std has several parts."""
        ...


class Item(NamedTuple):
    """A tensor that was drawn: mean, parts of the log std, mask, the draw where it was kept, and its gradient."""

    mean: Tensor
    parts: tuple[Tensor, ...]
    mask: Tensor | None
    draw: Tensor | None
    gradient: Any


def draws(kinds: Sequence[Kind], posteriors: Sequence[Any]) -> tuple[list[Tensor], Tensor | None]:
    """mean + exp(log std) eps of each; and the stds that rows share, in an order of their own, if there are any."""
    means, parts = [p[0] for p in posteriors], [p[1] for p in posteriors]
    found: dict[int, Tensor] = {}
    stds = None
    by_row, by_weight, others = _sorted(kinds, means)
    if by_row:
        runs = _runs(_shapes(kinds, means, by_row))
        order = [by_row[i] for run in runs for i in run.tensors]
        flat, views = _flat_noise(kinds, means, order)
        stds = _joined([parts[i][0] for i in order]).exp_()
        of_units = stds[_row_of_unit(runs, flat.device)] if _is_split(runs) else stds
        for units, numbers in _units(runs, flat):
            units.mul_(of_units[numbers].unsqueeze(1))
        found.update(zip(order, views, strict=True))
    if by_weight:
        drawn = foreach("exp", [parts[i][0] for i in by_weight])
        foreach("mul_", *_pieces(kinds, by_weight, drawn))
        found.update(zip(by_weight, drawn, strict=True))
    if others:
        of_parts = iter(foreach("exp", [part for i in others for part in parts[i]]))
        for index in others:
            drawn = noise.read(kinds[index].seed, means[index].shape, means[index].device)
            for _ in parts[index]:
                drawn = drawn * next(of_parts)
            found[index] = drawn
    foreach("add_", list(found.values()), [means[i] for i in found])
    return [found[i] for i in range(len(kinds))], stds


def gradients(kinds: Sequence[Kind], items: Sequence[Item], stds: Tensor | None) -> list[list[Tensor]]:
    """The gradients of the parts of each log std.

    Args:
        kinds: What is known of the tensors.
        items: The tensors.
        stds: What `draws` gave where these are all of its tensors, else None.
    """
    means = [item.mean for item in items]
    by_row, by_weight, others = _sorted(kinds, means)
    found: dict[int, list[Tensor]] = {}
    if by_row:
        found.update(_of_rows(kinds, items, by_row, stds))
    if kept := [*by_weight, *others]:
        drawn = [draw for i in kept if (draw := items[i].draw) is not None]
        products = foreach("sub", drawn, [means[i] for i in kept])
        foreach("mul_", products, [items[i].gradient for i in kept])
        for index, product in zip(kept, products, strict=True):
            found[index] = [product.sum_to_size(part.shape) for part in items[index].parts]
    return [found[i] for i in range(len(items))]


def _of_rows(
    kinds: Sequence[Kind], items: Sequence[Item], by_row: Sequence[int], stds: Tensor | None
) -> dict[int, list[Tensor]]:
    means = [item.mean for item in items]
    runs = _runs(_shapes(kinds, means, by_row))
    order = [by_row[i] for run in runs for i in run.tensors]
    flat, views = _flat_noise(kinds, means, order)
    foreach("mul_", views, [items[i].gradient for i in order])
    sums = [units.sum(1) if units.shape[1] > 1 else units.view(-1) for units, _ in _units(runs, flat)]
    logs = [items[i].parts[0] for i in order]
    of_stds = sums[0] if len(sums) == 1 else torch.cat(sums)
    if _is_split(runs):
        of_stds = torch.segment_reduce(of_stds, "sum", offsets=_first_units(runs, flat.device), unsafe=True)
    of_stds = of_stds * (_joined(logs).exp_() if stds is None else stds)
    split = of_stds.split([log.numel() for log in logs])
    return {i: [part.view_as(log)] for i, part, log in zip(order, split, logs, strict=True)}


class _Run(NamedTuple):
    """Tensors whose rows have a common divisor.

    Attributes:
        tensors: Which.
        shapes: Rows of each, and weights of a row.
        unit: The divisor.
    """

    tensors: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    unit: int

    @property
    def size(self) -> int:
        return _size(self.shapes)


@lru_cache(_NUM_REMEMBERED)
def _runs(shapes: tuple[tuple[int, int], ...]) -> tuple[_Run, ...]:
    """Tensors of these numbers of rows, and of weights in a row, in as few runs as units stay few."""
    order = sorted(range(len(shapes)), key=lambda i: (-(shapes[i][1] & -shapes[i][1]), shapes[i][1]))
    runs: list[_Run] = []
    for index in order:
        own, length = shapes[index], shapes[index][1]
        if runs:
            tensors, others, unit = runs[-1]
            together, divisor = (*others, own), math.gcd(unit, length)
            if _size(together) // divisor <= max(_MANY_UNITS, _size(together) // _SMALL_UNIT):
                runs[-1] = _Run((*tensors, index), together, divisor)
                continue
        runs.append(_Run((index,), (own,), length))
    return tuple(runs)


def _is_split(runs: Sequence[_Run]) -> bool:
    """Whether a row has several units."""
    return any(length != run.unit for run in runs for _, length in run.shapes)


@lru_cache(_NUM_REMEMBERED)
def _row_of_unit(runs: tuple[_Run, ...], device: torch.device) -> Tensor:
    """Which row each unit belongs to."""
    counts = _units_of_row(runs)
    rows = torch.arange(len(counts), device="cpu")
    return rows.repeat_interleave(torch.tensor(counts, device="cpu"), output_size=sum(counts)).to(device)


@lru_cache(_NUM_REMEMBERED)
def _first_units(runs: tuple[_Run, ...], device: torch.device) -> Tensor:
    """The first unit of each row, and the number of units."""
    return torch.tensor([0, *_units_of_row(runs)], device="cpu").cumsum(0).to(device)


def _units_of_row(runs: Sequence[_Run]) -> list[int]:
    return [length // run.unit for run in runs for rows, length in run.shapes for _ in range(rows)]


def _sorted(kinds: Sequence[Kind], means: Sequence[Tensor]) -> tuple[list[int], list[int], list[int]]:
    """Which tensors are drawn by rows, which by weights, and which one by one."""
    has_rows = any(kind.stds == "rows" for kind in kinds)
    found: tuple[list[int], list[int], list[int]] = ([], [], [])
    for index, (kind, mean) in enumerate(zip(kinds, means, strict=True)):
        is_few = has_rows and kind.stds == "weights" and mean.numel() <= _FEW
        place = 2 if kind.stds == "any" else 0 if is_few or kind.stds == "rows" else 1
        found[place].append(index)
    return found


def _shapes(kinds: Sequence[Kind], means: Sequence[Tensor], chosen: Sequence[int]) -> tuple[tuple[int, int], ...]:
    shapes = [(kinds[i].stds == "rows", means[i].shape) for i in chosen]
    return tuple((shape[0], shape[1:].numel()) if is_row else (shape.numel(), 1) for is_row, shape in shapes)


def _flat_noise(kinds: Sequence[Kind], means: Sequence[Tensor], order: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """The noise of these in one tensor, and views of it in their shapes."""
    flat = torch.cat([b for i in order for b in noise.table_blocks(kinds[i].seed, means[i].shape, means[i].device)])
    split = flat.split([means[i].numel() for i in order])
    return flat, [part.view(means[i].shape) for part, i in zip(split, order, strict=True)]


def _units(runs: Sequence[_Run], flat: Tensor) -> list[tuple[Tensor, slice]]:
    """The units of each run (U, .), views of `flat`, and their numbers among those of all."""
    found, start, number = [], 0, 0
    for run in runs:
        units = flat[start : start + run.size].view(-1, run.unit)
        found.append((units, slice(number, number + len(units))))
        start, number = start + run.size, number + len(units)
    return found


def _pieces(
    kinds: Sequence[Kind], chosen: Sequence[int], tensors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Contiguous tensors in the blocks in which the table has their noise, and the noise."""
    pieces, eps = [], []
    for index, tensor in zip(chosen, tensors, strict=True):
        blocks = noise.table_blocks(kinds[index].seed, tensor.shape, tensor.device)
        eps += [blocks[0].view_as(tensor)] if len(blocks) == 1 else blocks
        pieces += [tensor] if len(blocks) == 1 else tensor.view(-1).split(len(blocks[0]))
    return pieces, eps


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.view(-1) for tensor in tensors])


def _size(shapes: Sequence[tuple[int, int]]) -> int:
    return sum(rows * length for rows, length in shapes)
