"""What the noise of the weights costs the loss, read off gradients that training has anyway.

To second order a posterior's noise adds half of sum h s^2 to the loss, h the curvature along a weight and s its std.
The gradient of the mean loss by log s is h s^2 in expectation over the draws, of whatever estimator, so that half of
the sum of these gradients, before the KL's is added, is the cost: no forward pass, no second look at the data.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesprune.foundation.sharding import full_tensor
from bayesprune.layers import Posterior
from bayesprune.train.joined import joined, sums_of

WINDOW = 10
"""Steps that a measurement is an average over: one draw and one batch say little."""
_NAMED = 3
_SMALL = 1 << 14  # numbers of a gradient that is summed with others


class NoiseCost:
    """Costs by posterior, in units of the loss (nats), averaged over windows of steps."""

    def __init__(self, parts: Mapping[Posterior, Sequence[Tensor]]) -> None:
        """Starts with an empty window; `parts` are the log stds, of which the first has the sum of all gradients."""
        self._names = [posterior.name for posterior in parts]
        self._firsts = [first for first, *_ in parts.values()]
        self._sums: list[float] = [0.0] * len(self._firsts)
        self._waiting: list[tuple[list[int], Tensor]] = []
        self._count = 0

    @torch.no_grad()
    def add(self, scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Takes up the gradients of a step's loss, which a gradient scaler may have multiplied or found infinite."""
        gradients: dict[torch.device, dict[int, Tensor]] = defaultdict(dict)
        for index, part in enumerate(self._firsts):
            if part.grad is not None:
                gradients[part.grad.device][index] = part.grad
        for found in gradients.values():
            indices, costs = _sums(found)
            if scale is not None:
                costs = costs / scale
            if found_inf is not None:
                costs = torch.where(found_inf > 0, 0.0, costs)
            for others, total in self._waiting:
                if others == indices and total.device == costs.device:
                    total.add_(costs)
                    break
            else:
                self._waiting.append((indices, costs))
        self._count += 1

    def take(self) -> dict[str, float] | None:
        """Costs by posterior where a window is full, which begins anew; waits for the device once in a window."""
        if self._count < WINDOW:
            return None
        self._read()
        means = [total / WINDOW for total in self._sums]
        self._sums = [0.0] * len(self._firsts)
        self._count = 0
        return dict(zip(self._names, means, strict=True))

    def state(self) -> dict[str, Any]:
        """The window so far: numbers by posterior."""
        self._read()
        return {"sums": dict(zip(self._names, self._sums, strict=True)), "count": self._count}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on with the window that was saved."""
        self._count, self._waiting = state["count"], []
        self._sums = [state["sums"][name] for name in self._names]

    def _read(self) -> None:
        """Brings what is on a device here."""
        for indices, costs in self._waiting:
            for index, cost in zip(indices, costs.tolist(), strict=True):
                self._sums[index] += cost / 2
        self._waiting = []


def _sums(gradients: Mapping[int, Tensor]) -> tuple[list[int], Tensor]:
    """The sum of each, small ones together, and which they are in the order of the sums."""
    small = {i: g for i, g in gradients.items() if g.numel() <= _SMALL and not hasattr(g, "to_local")}
    large = {i: g for i, g in gradients.items() if i not in small}
    found = []
    if small:
        sizes = tuple(gradient.numel() for gradient in small.values())
        found.append(sums_of(joined(list(small.values())).float(), sizes))
    if large:
        found.append(torch.stack([full_tensor(g.sum(dtype=torch.float32)) for g in large.values()]))
    return [*small, *large], found[0] if len(found) == 1 else torch.cat(found)


def dearest(costs: Mapping[str, float]) -> str:
    """The posteriors whose noise costs most, with numbers, for a message."""
    order = sorted(costs, key=costs.__getitem__, reverse=True)[:_NAMED]
    return ", ".join(f"{name} {costs[name]:.2g}" for name in order)


@torch.no_grad()
def scale_back(parts: Mapping[Posterior, Sequence[Tensor]], cost: float, limit: float) -> float:
    """Multiplies all stds that move by one factor, which it returns: the cost, as their squares, comes to the limit."""
    firsts = {id(first): first for first, *_ in parts.values() if first.requires_grad}
    shift = 0.5 * math.log(limit / cost)
    for first in firsts.values():
        first.add_(shift)
    return math.exp(shift)
