"""Batch-norm statistics of the means, gathered while training draws weights.

Batch norm takes its running statistics from training forwards, whose activations have the noise of the weights in them;
evaluation, which runs at the means, has none, so that its variances are too large, layer upon layer. While posteriors
are trained, what a noisy forward did to the statistics is undone right behind it, so that a checkpoint never holds it,
and what a backward did that runs forwards anew, at the optimizer's step. One batch in some steps runs once more at the
means, without gradients, for the statistics alone.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from bayesprune.foundation.device import present_autocast
from bayesprune.foundation.foreach import foreach
from bayesprune.foundation.model import eval_mode
from bayesprune.layers import VariationalLayer, variational_layers
from bayesprune.prediction.predict import sampling
from bayesprune.train.optimizers import StepCount

EVERY = 4
"""Steps of which one has a forward at the means, which takes about a third of a step's time."""


class MeanStatistics:
    """Keeps the running statistics of a model's batch norms at those of its means.

    Of a model whose forward it does not see (compiled, sharded by FSDP 2, called in parts), and of norms in evaluation
    mode or without momentum, it changes nothing.
    """

    def __init__(self, model: nn.Module, steps: StepCount) -> None:
        """Looks at the forwards of this model from now on, while `steps` lives: those that were taken."""
        layers = [layer for _, layer in variational_layers(model) if layer.estimator not in ("mean", "moments")]
        is_sharded = any(hasattr(parameter, "to_local") for parameter in model.parameters())
        self._model, self._layers = model, [] if is_sharded else layers
        norms = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm.running_mean is not None]
        self._norms = [norm for norm in norms if norm.momentum]
        self._before: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}
        self._batch: _Batch | None = None
        self._steps: weakref.ref[StepCount] | None = weakref.ref(steps)
        self._handles: list[RemovableHandle] = []
        if self._layers and self._norms:
            self._handles = [
                model.register_forward_pre_hook(self._look, with_kwargs=True),
                model.register_forward_hook(self._look_back, always_call=True),
            ]

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy of the model, whose steps nobody tells: it changes nothing there."""
        nothing = {"_layers": [], "_norms": [], "_handles": [], "_before": {}, "_batch": None, "_steps": None}
        return vars(self) | nothing

    def update(self) -> None:
        """Undoes what noise of this step did, and gathers from the last batch where it is time."""
        self._undo()
        batch, norms, self._before, self._batch = self._batch, list(self._before), {}, None
        if batch is None or not norms:
            return
        number = self._num_steps // EVERY + 1
        try:
            with eval_mode(self._model), sampling(self._model, "mean"), _gathering(norms, number), batch.autocast():
                self._model(*batch.args, **batch.kwargs)
        except Exception as error:  # noqa: BLE001 (whatever a forward in evaluation mode does not do)
            self.end()
            warnings.warn(
                "batch-norm statistics stay those of noisy weights, for a forward in evaluation mode failed on a "
                f"training batch ({type(error).__name__}: {error}); call "
                "bayesprune.prune.recalibrate_batch_norm(model, batches) before evaluating.",
                stacklevel=2,
            )

    def end(self) -> None:
        """Looks no more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._batch, self._before = [], None, {}

    def _undo(self) -> None:
        """Puts the statistics back; past autograd, which looks at their versions in the backward to come."""
        if self._before and not torch.compiler.is_compiling():
            now = [buffer.data for buffer in _running(self._before)]
            foreach("copy_", now, [before for pair in self._before.values() for before in pair])

    @staticmethod
    def _copied(norms: list[_BatchNorm]) -> dict[_BatchNorm, tuple[Tensor, Tensor]]:
        now = _running(norms)
        copies = [torch.empty_like(buffer) for buffer in now]
        if now:
            foreach("copy_", copies, now)
        return {norm: (copies[2 * i], copies[2 * i + 1]) for i, norm in enumerate(norms)}

    def _concerns(self, model: nn.Module) -> bool:
        """Whether a forward trains with noise: what others measure, or train at the means, is theirs."""
        if not self._norms or torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
            return False
        # A layer that was made deterministic has no override.
        return not all(getattr(layer, "estimator_override", None) in ("mean", "moments") for layer in self._layers)

    @property
    def _num_steps(self) -> int:
        """Steps taken; below zero where the attachment that counted them is gone."""
        steps = None if self._steps is None else self._steps()
        return -1 if steps is None else steps.at_most

    def _look_back(self, model: nn.Module, *_: Any) -> None:
        if self._concerns(model) and self._num_steps >= 0:
            self._undo()

    def _look(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._concerns(model):
            return
        if self._num_steps < 0 or not isinstance(self._layers[0], VariationalLayer):
            self.end()  # nobody tells the steps any more, or the model was made deterministic
            return
        if not self._before:  # the first forward of a step; what was loaded or measured before it stays
            self._before = self._copied([norm for norm in self._norms if norm.training])
        if self._num_steps % EVERY == 0:
            self._batch = _Batch(args, kwargs, present_autocast(next(model.parameters()).device))


def _running(norms: Iterable[_BatchNorm]) -> list[Tensor]:
    """The running mean and variance of each."""
    return [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]  # type: ignore[misc]


class _Batch(NamedTuple):
    """What a training forward was called with, and under which precision."""

    args: tuple
    kwargs: Mapping[str, Any]
    autocast: Callable[[], torch.autocast]


@contextmanager
def _gathering(norms: list[_BatchNorm], number: int) -> Iterator[None]:
    """Inside, these take up the statistics of a batch: a plain average at first, then with the norm's own momentum."""
    momenta = [norm.momentum for norm in norms]
    try:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.training = True
            norm.momentum = max(momentum or 0.0, 1 / (number + 1))
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
