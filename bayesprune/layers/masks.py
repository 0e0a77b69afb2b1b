"""Keeps removed weights at zero: after every step of any torch optimizer they are set to zero again.

The training forward gives removed weights no gradient; what is left that could move them in a step is momentum from
before the removal. The hook is global (`register_optimizer_step_post_hook`), because no one tells a layer which
optimizer it has. What moves weights outside a step (schedule-free optimizers in `eval()`, slow weights, averages that
are swapped in) is met where weights are read: a layer applies its masks in every evaluation, at a change of mode, and
before its state is written.
"""

import weakref
from typing import Protocol

from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle


class Masked(Protocol):
    """Anything that can set its removed weights to zero."""

    def apply_masks(self) -> None:
        """Sets removed weights to zero again, in place."""


_masked: "weakref.WeakSet[Masked]" = weakref.WeakSet()
_hook: RemovableHandle | None = None


def enforce_from_now_on(layer: Masked) -> None:
    """Applies the masks now and after every optimizer step while the layer lives."""
    global _hook
    layer.apply_masks()
    _masked.add(layer)
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_apply_all)


def release(layer: Masked) -> None:
    """Leaves the layer's weights to themselves from now on."""
    _masked.discard(layer)


def _apply_all(*_: object) -> None:
    for layer in _masked:
        layer.apply_masks()
