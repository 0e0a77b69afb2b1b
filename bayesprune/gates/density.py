"""Gates that are held to a target: so many weights are open, or so many of each block.

The constraint has a multiplier, a number that is subtracted from all logits, or from those of a block. It is not raised
until the density is about right, but takes after each step the value with which the target holds exactly: the logits of
as many gates as are to be open are above 0. A share of all weights falls geometrically, so that every step closes the
same fraction of what is open.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesprune.foundation.device import has_cheap_calls, kth_smallest
from bayesprune.gates.gate import WeightGate

REACHED = 0.6
"""Share of the training after which a share of the weights is reached."""
DECIDED = 0.75
"""Share of the training after which the gates stay as they are, and the weights that are left train on: for a gate that
changed in the last steps the learning rate would have fallen too far to make up."""
PATTERN_FROM = 0.1
"""Share of the training from which on a pattern holds; until then its gates learn with all weights there."""
LARGEST_LOGIT = 8.0
"""Bound of the logits: beyond it a gate would need longer to come back than a training has."""


@torch.no_grad()
def move(gates: Sequence[WeightGate], mean_square: Tensor, weight: float, found_inf: Tensor | None = None) -> None:
    """Moves logits against their gradients, in units of the root mean square of the gradients of all gates.

    An optimizer with a scale for each of them, as Adam, moves all logits alike, however little is at stake. With one
    scale for all, a logit is the sum of what opening its weight would have gained, and logits can be compared.

    Args:
        gates: Held gates of one model; those without a gradient do not move.
        mean_square: The running mean of the squares of their gradients, a scalar, updated in place; 0 before the first.
        weight: Weight of this step in it.
        found_inf: Not 0 where a gradient scaler found an overflow: then nothing changes.
    """
    gradients = {gate: gate.logits.grad for gate in gates if gate.logits.grad is not None}
    if not gradients:
        return
    norms = torch.stack([torch.linalg.vector_norm(gradient).to(mean_square) for gradient in gradients.values()])
    now = norms.square().sum() / sum(gradient.numel() for gradient in gradients.values())
    now = torch.where(mean_square == 0, now, mean_square.lerp(now, weight))
    overflows = None if found_inf is None else found_inf.to(mean_square.device) > 0
    mean_square.copy_(now if overflows is None else torch.where(overflows, mean_square, now))
    unit = mean_square.sqrt().clamp_min(torch.finfo(mean_square.dtype).tiny)
    for gate, gradient in gradients.items():
        step = gradient * (gate.lr / unit).to(gradient.device)
        gate.logits.sub_(step if overflows is None else step.masked_fill(overflows.to(step.device), 0.0))


@torch.no_grad()
def hold(gates: Sequence[WeightGate], progress: float) -> None:
    """Makes the gates meet their target as far as it is due.

    Args:
        gates: Those of one model that have a target, which is one for all of them.
        progress: Share of the training that is done, 0 to 1.
    """
    target = gates[0].target
    assert target is not None, "they have one"
    if target.pattern is None:
        _hold_share(gates, target.value ** min(1.0, progress / REACHED))
    elif progress >= PATTERN_FROM:
        for gate in gates:
            _hold_pattern(gate, *target.pattern)
    for gate in gates:
        gate.logits.clamp_(-LARGEST_LOGIT, LARGEST_LOGIT)


def _hold_share(gates: Sequence[WeightGate], share: float) -> None:
    logits = torch.cat([gate.logits.flatten().to(gates[0].logits.device) for gate in gates])
    held = _held(logits[None], max(1, round(share * len(logits))))[0]
    for gate, values in zip(gates, held.split([gate.logits.numel() for gate in gates]), strict=True):
        gate.logits.copy_(values.view(gate.logits.shape))


def _hold_pattern(gate: WeightGate, n: int, m: int) -> None:
    moved = gate.logits.movedim(gate.input_dim, -1)
    held = _held(moved.reshape(-1, m), n)
    gate.logits.copy_(held.view(moved.shape).movedim(-1, gate.input_dim))


def _held(logits: Tensor, num_open: int) -> Tensor:
    """Logits (B, M) less the largest of those that are to be closed: `num_open` of each row are above 0.

    Of equal logits at the edge the first ones are open.
    """
    num_closed = logits.shape[1] - num_open
    if not num_closed:
        return logits
    held = logits - kth_smallest(logits, num_closed)
    num_missing = num_open - (held > 0).sum(1, keepdim=True)
    if has_cheap_calls(held.device) and not num_missing.any():
        return held
    tied = held == 0
    return held.masked_fill(tied & (tied.cumsum(1, dtype=torch.int32) <= num_missing), torch.finfo(held.dtype).tiny)
