"""Matrices fitted one after the other, in the order of the forward, while forwards over all batches wait behind each.

`fit_in_sequence` runs the model that is being changed and the dense one side by side (`laplace.flow`), gives the
moments of what each matrix is given and should give to a function that fits it, and lets the forwards go on with the
new weights. The matrices of experts are fitted while the forwards wait behind their layer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.foundation.batches import Batch, split
from bayesprune.foundation.kinds import kind_of
from bayesprune.foundation.model import eval_mode, requires_grad
from bayesprune.foundation.progress import progress_bar
from bayesprune.laplace.calibration import check_sums, counted_positions
from bayesprune.laplace.calls import LayerCall
from bayesprune.laplace.flow import Walk, layer_calls, watched
from bayesprune.laplace.kronecker import variational_layer
from bayesprune.laplace.matrices import (
    drawn_positions,
    expert_rows,
    input_rows,
    output_rows,
    to_matrix,
)
from bayesprune.laplace.regression import Moments
from bayesprune.laplace.sites import Site, matrices_of, num_positions
from bayesprune.layers import VariationalLayer

_MAX_HELD = 4 * 2**30  # bytes that forwards over all batches hold while they wait for a layer
_LIVE = 3  # times the input and output of a layer are alive in a forward, at most as a rule
_MAX_PASSES = 64  # over the data from the start; layers share one where there are more
_PLENTY = 16  # positions for each that is drawn, from where a quarter of the examples is enough
_SMALLEST_GAIN = 1e-2  # relative to a layer's largest: outputs that are multiplied by less correct no stream
_MAX_MOMENTS = 2**30  # bytes of moments that one pass over the data collects


@dataclass
class _Step:
    """Matrices that are fitted together.

    Attributes:
        sites: Them, by their names.
        num_batches: How many batches fit them.
        is_held: Whether the forwards of both models wait for them, and go on.
    """

    sites: dict[str, Site]
    num_batches: int
    is_held: bool

    def by_layer(self) -> Iterator[tuple[str, list[Site]]]:
        """Layers with their matrices."""
        for name in dict.fromkeys(site.name for site in self.sites.values()):
            yield name, [site for site in self.sites.values() if site.name == name]


Fit = Callable[[Site, tuple[Moments, Moments]], Tensor | None]
"""Moves a matrix; returns by what the mean of the batch norm behind it became smaller, (R,), or None."""


def fit_in_sequence(
    model: nn.Module,
    dense: nn.Module,
    batches: list[Any],
    sites: Sequence[Site],
    fit: Fit,
    *,
    progress: bool | None = False,
    title: str = "Compensate",
) -> None:
    """Fits each matrix to what the dense model computes, from what those before it give now.

    A layer that does not meet what it meets in the dense model, as behind a router, is left out.

    Args:
        model: What is changed, layer by layer.
        dense: The model as it was, of the same structure.
        batches: On the models' device.
        sites: The matrices, see `sites_of`.
        fit: Called with a matrix and its moments, of three quarters of the examples and of the last quarter.
        progress: Show a progress bar; None shows it on a terminal.
        title: What the bar says.
    """
    forwards = _Forwards(model, dense, batches, sites)
    of_dense = {site.name: variational_layer(dense, site.name) for site in sites}
    of_model = {site.name: variational_layer(model, site.name) for site in sites}
    with eval_mode(model), eval_mode(dense), watched(of_dense), watched(of_model), closing(forwards):
        for step in progress_bar(_steps(sites, len(batches)), title, "layer", progress=progress):
            for name, moments in forwards.moments(step).items():
                forwards.change(fit(step.sites[name], moments))


@torch.no_grad()
def dense_moments(
    dense: nn.Module, batches: Sequence[Any], sites: Sequence[Site]
) -> Iterator[tuple[Site, tuple[Moments, Moments]]]:
    """Each matrix with the moments of what it is given in the dense model, and of what it gives there.

    One pass over the data serves as many as 1 GiB of moments holds.
    """
    for some in _chunks(dense, sites):
        layers = {site.name: variational_layer(dense, site.name) for site in some}
        found: dict[str, tuple[Moments, Moments]] = {}
        seen = 0
        for batch in batches:
            inputs = split(dense, batch)
            is_check = torch.arange(seen, seen := seen + inputs.num_examples) % 4 == 3
            for call in layer_calls(dense, batch, layers):
                for site in some:
                    if site.name == call.name:
                        _add(found, site, call, call, inputs, is_check, len(batches))
        for site in some:
            if site.weight in found:
                _finish(site.name, found[site.weight])
                yield site, found[site.weight]


def _chunks(dense: nn.Module, sites: Sequence[Site]) -> Iterator[list[Site]]:
    some: list[Site] = []
    total = 0
    for site in sites:
        layer = variational_layer(dense, site.name)
        groups, rows, columns = to_matrix(layer, layer.get_parameter(site.parameter)).shape
        size = 2 * 8 * groups * columns * (rows + columns) + site.num_bytes
        if some and total + size > _MAX_MOMENTS:
            yield some
            some, total = [], 0
        some.append(site)
        total += size
    if some:
        yield some


def _add(
    found: dict[str, tuple[Moments, Moments]],
    site: Site,
    call: LayerCall,
    stock: LayerCall,
    inputs: Batch,
    is_check: Tensor,
    num_batches: int,
) -> None:
    """Adds a run of a layer to the moments of a matrix."""
    if site.weight not in found:
        weight = stock.layer.get_parameter(site.parameter)
        groups, rows, _ = to_matrix(stock.layer, weight).shape
        sizes = (groups, rows, len(site.columns))
        found[site.weight] = Moments(*sizes, weight.device), Moments(*sizes, weight.device)
    if kind_of(call.layer).num_stacked:
        _add_experts(found[site.weight], site, (call, stock), inputs, is_check, num_batches)
        return
    x, y, counted = _regression_rows(call, stock, site, inputs, num_batches)
    for moments, part in zip(found[site.weight], (~is_check, is_check), strict=True):
        rows = part.to(x.device)[:, None] & counted
        moments.add(x[rows], y[rows])


def _add_experts(
    found: tuple[Moments, Moments],
    site: Site,
    calls: tuple[LayerCall, LayerCall],
    batch: Batch,
    is_check: Tensor,
    num_batches: int,
) -> None:
    """Adds a run of experts, each at the positions that the dense model's router sends to it.

    Where there are more positions than rows are asked for, each row of hidden units is a sum of some with random signs.
    """
    call, stock = calls
    width = num_positions(call, batch.num_examples)
    counted = counted_positions(batch, width)
    counted = torch.ones(batch.num_examples, width, dtype=torch.bool) if counted is None else counted.cpu()
    matrices = to_matrix(stock.layer, stock.layer.get_parameter(site.parameter).detach())
    is_first = _is_first(site, stock.layer)
    size = stock.output.shape[-1]  # rows that one gradient gives
    num_rows = site.num_rows * (len(matrices) if is_first else 1)
    with torch.enable_grad(), requires_grad(call.layer, True), requires_grad(stock.layer, True):
        before = stock.again()
        now = before if is_first else stock.again(call.layer, call.inputs)
    for moments, part in zip(found, (~is_check, is_check), strict=True):
        positions = (part[:, None] & counted).flatten().nonzero()[:, 0]
        if not len(positions):
            continue
        wanted = min(len(positions), math.ceil(num_rows * float(part.float().mean()) / num_batches))
        order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(len(positions)))
        positions = positions[order[:wanted] if is_first else order]
        moments.number += len(positions)
        for some in positions.chunk(math.ceil(wanted / size)):
            hidden = _wide(expert_rows(stock.layer, before, some))
            if is_first:
                x, y = (_wide(each.inputs.flatten(0, -2)[some.to(hidden.device), None]) for each in calls)
                x, y = (rows.expand(-1, len(matrices), -1) for rows in (x, y))
            else:
                x, y = _wide(expert_rows(call.layer, now, some)), hidden
            for expert, matrix in enumerate(matrices):
                met = hidden[:, expert].any(1)
                moments.add_group(expert, x[met, expert][:, site.columns], y[met, expert] @ matrix.mT.to(y))


def _finish(name: str, moments: tuple[Moments, Moments]) -> None:
    """Adds what waits; refuses moments of no position, or that are not finite."""
    for part in moments:
        part.finish()
    sums = (total for part in moments for total in (part.xx, part.yx, part.x, part.y))
    check_sums(name, sum(part.number for part in moments), sums)


def _steps(sites: Sequence[Site], num_batches: int) -> list[_Step]:
    """Each layer by itself where forwards can wait for it, else those with the same input, and neighbours of many."""
    steps: list[_Step] = []
    held = [site.num_calls == 1 and 2 * _LIVE * site.num_bytes * num_batches <= _MAX_HELD for site in sites]
    most = max(1, math.ceil(held.count(False) / _MAX_PASSES))
    for site, is_held in zip(sites, held, strict=True):
        is_plenty = not is_held and site.num_positions >= _PLENTY * site.num_drawn
        number = math.ceil(num_batches / 4) if is_plenty else num_batches
        last = steps[-1] if steps and not steps[-1].is_held and not is_held else None
        if last and (len(last.sites) < most or next(iter(last.sites.values())).source == site.source):
            last.sites[site.weight] = site
            last.num_batches = max(last.num_batches, number)
        else:
            steps.append(_Step({site.weight: site}, number, is_held))
    return steps


class _Forwards:
    """Forwards of the model and of the dense one over all batches, side by side."""

    def __init__(self, model: nn.Module, dense: nn.Module, batches: list[Any], sites: Sequence[Site]) -> None:
        self._model, self._dense, self._batches = model, dense, batches
        self._at_sum = [site.name for site in sites if site.is_at_sum]
        self._pairs: dict[int, tuple[Walk, Walk]] = {}

    def moments(self, step: _Step) -> dict[str, tuple[Moments, Moments]]:
        """Of each matrix of a step, the moments of three quarters of the examples, and of the last quarter.

        A matrix is missing where it does not meet what it meets in the dense model, as behind a router.
        """
        found: dict[str, tuple[Moments, Moments]] = {}
        misfits: set[str] = set()
        seen = 0
        for number, batch in enumerate(self._batches[: step.num_batches]):
            inputs = split(self._model, batch)
            num_examples = inputs.num_examples
            is_check = torch.arange(seen, seen := seen + num_examples) % 4 == 3
            for name, sites in step.by_layer():
                for _ in range(sites[0].num_calls):
                    call, stock = (walk.advance(name, stay=step.is_held) for walk in self._pair(number))
                    for site in sites:
                        if not call or not stock or not _is_alike(call, stock, site, num_examples):
                            misfits.add(site.weight)
                        else:
                            _add(found, site, call, stock, inputs, is_check, step.num_batches)
            if not step.is_held:
                self._close(number)
        if not step.is_held:
            self.close()
        fitting = {name: moments for name, moments in found.items() if name not in misfits}
        for name, moments in fitting.items():
            _finish(step.sites[name].name, moments)
        return fitting

    def change(self, shift: Tensor | None) -> None:
        """Makes forwards that wait go on with the layer as it is now; see `Walk.change`."""
        for walk, _ in self._pairs.values():
            walk.change(shift)

    def close(self) -> None:
        """Ends all forwards."""
        for number in list(self._pairs):
            self._close(number)

    def _pair(self, number: int) -> tuple[Walk, Walk]:
        if number in self._pairs and any(walk.is_over for walk in self._pairs[number]):
            self._close(number)
        if number not in self._pairs:
            batch = self._batches[number]
            self._pairs[number] = Walk(self._model, batch, self._at_sum), Walk(self._dense, batch, self._at_sum)
        return self._pairs[number]

    def _close(self, number: int) -> None:
        for walk in self._pairs.pop(number, ()):
            walk.close()


def _is_alike(call: LayerCall, stock: LayerCall, site: Site, num_examples: int) -> bool:
    """Whether the layer meets as many positions of each example as in the dense model, one at least.

    The first matrices of experts are given their inputs row by row, one for each position.
    """
    shape = call.output.shape
    if _is_first(site, call.layer) and call.inputs.shape[:-1].numel() != shape[:-1].numel():
        return False
    return shape == stock.output.shape and shape.numel() > 0 and shape[0] % num_examples == 0


def _is_first(site: Site, layer: VariationalLayer) -> bool:
    """Whether this is a matrix that puts out the hidden units of experts."""
    return site.parameter != matrices_of(layer)[-1]


def _regression_rows(
    call: LayerCall, stock: LayerCall, site: Site, batch: Batch, num_batches: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs that stay (N, T, G, C), y + (s - s~) / g, (N, T, G, R), and which count (N, T), at drawn positions."""
    num_examples = batch.num_examples
    width = num_positions(call, num_examples)
    counted = counted_positions(batch, width)
    chosen = drawn_positions(width, max(1, math.ceil(site.num_rows / (num_batches * num_examples))), counted)
    x = input_rows(call.layer, _wide(call.inputs), num_examples, chosen)
    y = output_rows(call.layer, _wide(stock.output), num_examples, chosen)
    for stream, sign in ((_stream(stock), 1), (_stream(call), -1)):
        if stream is not None:
            y = y + sign * output_rows(call.layer, _wide(stream), num_examples, chosen)
    if counted is None:
        counted = torch.ones(num_examples, width, dtype=torch.bool)
    counted = counted if chosen is None else counted[:, chosen.to(counted.device)]
    return x[..., site.columns.to(x.device)], y, counted.to(x.device)


def _wide(values: Tensor) -> Tensor:
    """The values in float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _stream(call: LayerCall) -> Tensor | None:
    """s / g, of the output's shape; None where the output meets no sum."""
    if call.addend is None or call.gain is None:
        return call.addend
    is_large = call.gain.abs() > _SMALLEST_GAIN * call.gain.abs().max()
    return torch.where(is_large, call.addend / call.gain, 0.0)
