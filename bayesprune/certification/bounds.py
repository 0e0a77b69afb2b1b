"""Bounds of what a network gives for all inputs of a box: intervals, and lines from the output backwards.

Intervals (Gowal et al., 2018) follow centers and radii. Linear bounds (CROWN, Zhang et al., 2018) are one backward
pass: each ReLU lies between two lines over its interval, and the sign of the gradient that arrives says which of them
counts. All of it holds in exact arithmetic and is computed in float64.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from bayesprune.certification.network import Box, Network

_MOST_VALUES = 2**23  # of all activations of one backward pass; 64 MB in float64


class Lines(NamedTuple):
    """A line below and one above a function over an interval: slopes and offsets, entry by entry."""

    low_slope: Tensor
    low_offset: Tensor
    high_slope: Tensor
    high_offset: Tensor


def flat_lines(box: Box) -> Lines:
    """The ends of the interval after the ReLU, whatever comes in: a bound by these is interval arithmetic."""
    zero = torch.zeros_like(box.center)
    return Lines(zero, box.low.relu(), zero, box.high.relu())


def chord_lines(box: Box) -> Lines:
    """From above the chord of the ReLU; from below 0 or the input, whichever leaves the smaller triangle."""
    low, high = box.low, box.high
    chord = torch.where(low >= 0, 1.0, high.relu() / (high.relu() - low.clamp(max=0)).clamp_min(1e-300))
    below = torch.where(low >= 0, 1.0, torch.where(high > -low, 1.0, 0.0)).to(low)
    return Lines(below, torch.zeros_like(low), chord, -chord * low.clamp(max=0))


def interval_bounds(network: Network, box: Box) -> list[Box]:
    """The box before each ReLU, in order."""
    found: list[Box] = []

    def relu(_: int, before: Box) -> Box:
        found.append(before)
        return Box.between(before.low.relu(), before.high.relu())

    network.run(box, relu)
    return found


def tightened(network: Network, box: Box, boxes: list[Box]) -> list[Box]:
    """The same boxes, by linear bounds wherever a sign is open; never wider."""
    found: list[Box] = []
    for number, before in enumerate(boxes):
        low, high = before.low.clone(), before.high.clone()
        shape, open_ = low.shape[1:], ((low < 0) & (high > 0)).flatten(1).any(0).nonzero().flatten()
        lines = [chord_lines(other) for other in found]
        values = sum(other.center.numel() for other in (box, *boxes[: number + 1]))
        for units in open_.split(max(1, _MOST_VALUES // values)) if len(open_) else ():
            rows = torch.zeros(len(units), shape.numel(), dtype=low.dtype)
            rows[torch.arange(len(units)), units] = 1.0
            rows = rows.view(1, len(units), *shape).expand(len(low), -1, *shape)
            lower = linear_bound(network, box, lines, rows, until=number).value
            upper = -linear_bound(network, box, lines, -rows, until=number).value
            flat_low, flat_high = low.view(len(low), -1), high.view(len(high), -1)
            flat_low[:, units] = torch.maximum(flat_low[:, units], lower)
            flat_high[:, units] = torch.minimum(flat_high[:, units], upper)
        found.append(Box.between(low, torch.maximum(low, high)))
    return found


class LinearBound(NamedTuple):
    """A lower bound (N, T), and by ReLU the coefficients (N, T, ...) of its output that led there."""

    value: Tensor
    coefficients: list[Tensor]


def linear_bound(
    network: Network, box: Box, lines: list[Lines], objectives: Tensor, *, until: int | None = None
) -> LinearBound:
    """Lower bounds of T linear functions of the output, over N boxes.

    Args:
        lines: Around each ReLU, in order.
        objectives: (N, T, ...), coefficients of the output, or of what ReLU number `until` is given.
    """
    num_boxes, num_rows = objectives.shape[:2]
    below: list[Tensor] = []
    coefficients: dict[int, Tensor] = {}

    def relu(number: int, before: Tensor) -> Tensor:
        return _Relaxed.apply(before, lines[number], number, below, coefficients)  # type: ignore[return-value]

    with torch.enable_grad():
        zero = torch.zeros(num_boxes * num_rows, *box.center.shape[1:], dtype=box.center.dtype, requires_grad=True)
        output = network.run(zero, relu, until=until)
        (slope,) = torch.autograd.grad(output, zero, objectives.reshape(output.shape), allow_unused=True)
    value = (objectives * output.detach().view_as(objectives)).flatten(2).sum(2) + sum(below)
    if slope is not None:
        slope = slope.view(num_boxes, num_rows, -1)
        center, radius = (part.flatten(1).unsqueeze(2) for part in (box.center, box.radius))
        value = value + ((slope @ center) - (slope.abs() @ radius)).squeeze(2)
    return LinearBound(value, [coefficients[number] for number in sorted(coefficients)])


class _Relaxed(Function):
    """Zero, so that a run collects biases alone; backwards the line that bounds from below."""

    @staticmethod
    def forward(
        ctx: Any, before: Tensor, lines: Lines, number: int, below: list[Tensor], coefficients: dict[int, Tensor]
    ) -> Tensor:
        ctx.save_for_backward(before)
        ctx.rest = lines, number, below, coefficients
        return torch.zeros_like(before)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (before,), (lines, number, below, coefficients) = ctx.saved_tensors, ctx.rest
        grad = grads[0].view(len(lines.low_slope), -1, *lines.low_slope.shape[1:])
        positive = grad >= 0
        slope, offset = (
            grad * torch.where(positive, low.unsqueeze(1), high.unsqueeze(1))
            for low, high in ((lines.low_slope, lines.high_slope), (lines.low_offset, lines.high_offset))
        )
        coefficients[number] = grad
        below.append((offset + slope * before.view_as(slope)).flatten(2).sum(2))
        return slope.reshape(before.shape), None, None, None, None
