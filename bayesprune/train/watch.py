"""Notices that posteriors train while the hook of their attachment does not run.

An attachment is a hook on one optimizer's `step`. Where another optimizer takes the steps, or a loop moves weights by
functions of its own, the KL is lost and the stds stand still, and nothing fails. What can be seen from outside is that
gradients come and are thrown away, again and again, without a run of the hook in between.
"""

import functools
import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator

from torch import Tensor

from bayesprune.layers import Posterior

_MOST_LOST = 16  # gradients in a row; overflows in half precision and a second pass for sharpness lose fewer
_NUM_WATCHED = 8  # posteriors; a loop that loses the gradients of one loses those of all
_PROBE_SIZE = 64  # weights
_SEEN = "_bayesprune_seen"

_watches: "weakref.WeakSet[Watch]" = weakref.WeakSet()


class Watch:
    """Counts gradients that are lost between two runs of an attachment's hook, and warns once.

    It hangs on stds and refers to no optimizer, so that it outlives one that was replaced.
    """

    def __init__(self, posteriors: Iterable[Posterior], optimizer: str) -> None:
        """Watches some of these, whose stds a training forward has drawn from, until `end`."""
        moving = [p for p in posteriors if p.mean.requires_grad and p.log_std_parts[0].requires_grad]
        watched = moving[:: max(1, len(moving) // _NUM_WATCHED)]
        self._gradients = [_Gradient(posterior) for posterior in watched]
        self._optimizer = optimizer
        self._handles = [
            posterior.log_std_parts[0].register_post_accumulate_grad_hook(functools.partial(self._look, gradient))
            for posterior, gradient in zip(watched, self._gradients, strict=True)
        ]
        _watches.add(self)

    def saw_a_step(self) -> None:
        """Counts anew: the hook has run."""
        for gradient in self._gradients:
            gradient.num_lost = 0

    def end(self) -> None:
        """Looks no more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._gradients = [], []

    def watches(self, means: Collection[int]) -> bool:
        """Whether it watches one of the parameters with these ids."""
        return any(id(gradient.mean) in means for gradient in self._gradients)

    def _look(self, gradient: "_Gradient", part: Tensor) -> None:
        if not gradient.is_new():
            return
        gradient.num_lost += 1
        if gradient.num_lost > _MOST_LOST:
            name, optimizer = gradient.name, self._optimizer
            self.end()
            warnings.warn(
                f"{name}: {_MOST_LOST} gradients came and went, and the {optimizer} that attach was given took no step "
                "with them, so that the KL is lost and the stds stand still. Attach to the optimizer whose step() "
                "moves the weights, or call the attachment's detach() where posteriors are no longer trained.",
                stacklevel=2,
            )


class _Gradient:
    """The gradient of one mean: whether it was thrown away since the last look; the model is not kept alive."""

    def __init__(self, posterior: Posterior) -> None:
        self.name, self.num_lost = posterior.name, 0
        self._layer, self._parameter = weakref.ref(posterior.layer), posterior.parameter
        self._is_awaited = False

    @property
    def mean(self) -> Tensor | None:
        """The mean, while its layer lives."""
        layer = self._layer()
        return getattr(layer, self._parameter, None)

    def is_new(self) -> bool:
        """Whether this backward pass began without a gradient; called while that of the mean may be yet to come."""
        gradient = None if self.mean is None else self.mean.grad
        if gradient is None:
            self._is_awaited = True
            return True
        if hasattr(gradient, _SEEN):
            return False
        setattr(gradient, _SEEN, True)
        was_awaited, self._is_awaited = self._is_awaited, False
        return not was_awaited


def end_watches(means: Collection[int]) -> None:
    """Ends those over parameters with these ids, whose attachments are gone or give the parameters up."""
    for watch in list(_watches):
        if watch.watches(means):
            watch.end()


class Probes:
    """A few weights of each mean as they were, to see later whether something has moved them."""

    def __init__(self, posteriors: Iterable[Posterior]) -> None:
        self._before = {posterior: _probe(posterior.mean).clone() for posterior in posteriors}

    def moved(self, held: Collection[int]) -> Iterator[str]:
        """Names of those that moved, other than to zero, but for parameters with these ids; each is told of once.

        A frozen one was not moved by a training: it was loaded.
        """
        for posterior, before in list(self._before.items()):
            if posterior.is_frozen or id(posterior.mean) in held:
                continue
            now = _probe(posterior.mean)
            if bool(((now != before) & (now != 0)).any()):
                del self._before[posterior]
                yield posterior.name


def _probe(mean: Tensor) -> Tensor:
    local = mean.to_local() if hasattr(mean, "to_local") else mean  # type: ignore[attr-defined]
    return local.detach().reshape(-1)[:_PROBE_SIZE]
