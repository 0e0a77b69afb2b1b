"""Keeps removed weights at zero: after an optimizer's step they are set to zero again.

The training forward gives removed weights no gradient; what is left that could move them in a step is momentum from
before the removal. Where an attachment trains a layer, a `Keeper` applies its masks after the steps of that optimizer.
For all other layers one hook on the steps of every optimizer does (`register_optimizer_step_post_hook`), because no one
tells a layer which optimizer it has. What moves weights outside a step (schedule-free optimizers in `eval()`, slow
weights, averages that are swapped in) is met where weights are read: a layer applies its masks in every evaluation, at
a change of mode, and before its state is written.
"""

import weakref
from collections.abc import Iterable
from typing import Protocol

from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle


class Masked(Protocol):
    """Anything that can set its removed weights to zero."""

    def apply_masks(self) -> None:
        """Sets removed weights to zero again, in place."""


_masked: "weakref.WeakSet[Masked]" = weakref.WeakSet()
_keepers: "weakref.WeakKeyDictionary[Masked, weakref.ref[Keeper]]" = weakref.WeakKeyDictionary()
_hook: RemovableHandle | None = None


def enforce_from_now_on(layer: Masked) -> None:
    """Applies the masks now and after every optimizer step while the layer lives."""
    global _hook
    layer.apply_masks()
    _masked.add(layer)
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_apply_others)


def release(layer: Masked) -> None:
    """Leaves the layer's weights to themselves from now on."""
    _masked.discard(layer)


class Keeper:
    """Applies the masks of some layers in place of the hook on all optimizers, while it lives or until `end`."""

    def __init__(self, layers: Iterable[Masked]) -> None:
        """Takes over these layers, whether they have masks yet or not."""
        self._layers = list(layers)
        _keepers.update((layer, weakref.ref(self)) for layer in self._layers)

    def apply(self) -> None:
        """Sets removed weights of the layers to zero again, in place."""
        for layer in self._layers:
            layer.apply_masks()

    def end(self) -> None:
        """Leaves the layers to the hook on all optimizers."""
        for layer in self._layers:
            if _keeper_of(layer) is self:
                del _keepers[layer]
        self._layers = []


def _keeper_of(layer: Masked) -> Keeper | None:
    found = _keepers.get(layer)
    return None if found is None else found()


def _apply_others(*_: object) -> None:
    for layer in _masked:
        if _keeper_of(layer) is None:
            layer.apply_masks()
