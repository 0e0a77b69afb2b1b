"""Draws the weights of many layers together, at the start of a training forward of their model.

Those that asked for a draw in the last forward are drawn at the start of the next one, in few passes, with seeds from
torch's stream in the order in which they asked; others draw when they ask. So what a layer draws does not depend on
whether it is drawn ahead, as long as nothing else in the forward, dropout say, takes numbers from that stream. Layers
draw on their own, as without this, in a part of the model that is called alone, where tensors are not ordinary ones in
float32 (sharded, half precision), and all of them where a part of the forward may run once more later (checkpointing).
"""

import threading
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bayesprune import estimators
from bayesprune.estimators import LogGaussian
from bayesprune.foundation import noise
from bayesprune.foundation.device import has_cheap_calls

_AT_ONCE = 1 << 24  # weights of a node, whose gradients are complete together
_KEPT_AT_ONCE = 1 << 18  # on a processor, of those that keep their draws until then


class Layer(Protocol):
    """What is drawn from: a variational layer."""

    training: bool
    estimator: str
    estimator_override: str | None
    posterior_hook: Any
    _parameters: dict[str, nn.Parameter | None]
    _buffers: dict[str, Tensor | None]

    def posterior(self, name: str) -> Any:
        """The posterior of one parameter."""

    def _part_names(self, name: str) -> list[str]: ...


class _Parameter:
    """A parameter that may be drawn: what is known of its posterior, and its draw for the forward that runs.

    Attributes:
        draw: What was drawn ahead; None for nothing.
        seeds: Of the draws that its layer is expected to ask for after that.
    """

    def __init__(self, layer: Layer, name: str) -> None:
        self.layer, self.name = layer, name
        self.draw: Tensor | None = None
        self.seeds: list[int] = []
        self._posterior: LogGaussian | None = None
        self._part_names: list[str] = []
        self._version = 0

    def posterior(self) -> LogGaussian | None:
        """Its posterior, where a seed says what is drawn from it."""
        layer = self.layer
        if layer.posterior_hook is not None:
            return None
        if not self._is_known():
            found = layer.posterior(self.name)
            self._posterior = found if estimators.has_seeds(found) else None
            self._part_names = layer._part_names(self.name)
        return self._posterior

    def has_drawn(self, draw: Tensor) -> None:
        """Takes up a draw of what it is now."""
        assert self._posterior is not None, "it was drawn from"
        self.draw, self._version = draw, self._posterior.mean._version

    def pop(self) -> Tensor | None:
        """What was drawn ahead, if the means are still what they were."""
        draw, self.draw = self.draw, None
        is_valid = draw is not None and self._is_known() and self._posterior.mean._version == self._version  # type: ignore[union-attr]
        return draw if is_valid else None

    def _is_known(self) -> bool:
        """Whether the layer holds the same tensors as last time."""
        if self._posterior is None:
            return False
        (mean, parts, mask), held = self._posterior, self.layer._parameters
        is_same = held.get(self.name) is mean and mean.dtype == torch.float32
        is_same = is_same and self.layer._buffers.get(f"{self.name}_mask") is mask
        return is_same and all(held.get(key) is part for key, part in zip(self._part_names, parts, strict=True))


class _Running(threading.local):
    """Whose forward runs now."""

    draws: "JointDraws | None" = None


_RUNNING = _Running()


class JointDraws:
    """The hooks around the forward of a model, and the parameters that its layers draw."""

    def __init__(self, model: nn.Module, layers: Iterable[tuple[Layer, list[str]]]) -> None:
        """`layers` of the model, with the names of the parameters that each may draw; works until `remove`."""
        pairs = [(layer, name) for layer, names in layers for name in names]
        self._parameters = {(layer, name): _Parameter(layer, name) for layer, name in pairs}
        self._asked: list[_Parameter] = []
        self._expected: list[_Parameter] = []
        self._runs_again = False
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def remove(self) -> None:
        """Leaves the layers to themselves."""
        for handle in self._handles:
            handle.remove()

    def take(self, layer: Layer, name: str) -> Tensor | None:
        """The layer's draw for this forward; None where it is to draw on its own."""
        parameter = self._parameters.get((layer, name))
        if parameter is None:
            return None
        if not _runs_once():
            self._runs_again = True
            return None
        self._asked.append(parameter)
        draw = parameter.pop()
        if draw is not None or not parameter.seeds:
            return draw
        posterior, seed = parameter.posterior(), parameter.seeds.pop(0)
        return None if posterior is None else estimators.sample(posterior, seed)

    def _begin(self, model: nn.Module, args: tuple) -> None:
        """A forward pre-hook: draws what the last forward asked for."""
        if torch.compiler.is_compiling() or _RUNNING.draws is not None or not model.training or not _runs_once():
            return
        if not all(hasattr(parameter.layer, "posterior_hook") for parameter in self._parameters.values()):
            self.remove()  # made deterministic
            return
        _RUNNING.draws, self._asked, self._runs_again = self, [], False
        posteriors = {p: p.posterior() if _is_sampling(p.layer) else None for p in dict.fromkeys(self._expected)}
        ready: dict[_Parameter, tuple[LogGaussian, int]] = {}
        for parameter in self._expected:
            if (posterior := posteriors[parameter]) is None:
                continue
            seed = noise.draw_seed()
            if parameter in ready:
                parameter.seeds.append(seed)
            else:
                ready[parameter] = posterior, seed
        for group in _groups([(parameter, posterior) for parameter, (posterior, _) in ready.items()]):
            draws = estimators.sample_together(
                [posterior for _, posterior in group], [ready[one][1] for one, _ in group]
            )
            for (one, _), draw in zip(group, draws, strict=True):
                one.has_drawn(draw)

    def _end(self, *_: Any) -> None:
        """A forward hook that is always called: forgets the draws, not what was asked for."""
        if _RUNNING.draws is self:
            _RUNNING.draws = None
            self._expected = [] if self._runs_again else self._asked
            for parameter in self._parameters.values():
                parameter.draw, parameter.seeds = None, []


def take(layer: Layer, name: str) -> Tensor | None:
    """The layer's draw for the forward that runs now; None where there is none, or it is to draw on its own."""
    if torch.compiler.is_compiling() or _RUNNING.draws is None:
        return None
    return _RUNNING.draws.take(layer, name)


def _runs_once() -> bool:
    """Whether what is computed now is for a backward pass, none of it to be thrown away and computed again there."""
    if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None  # type: ignore[attr-defined]


def _is_sampling(layer: Layer) -> bool:
    """Whether it may draw as it did in the last forward."""
    chosen = layer.estimator_override or (layer.estimator if layer.training else "mean")
    return chosen in ("auto", "weight_sampling") or not getattr(layer, "is_linear_in_weight", True)


_Ready = list[tuple[_Parameter, LogGaussian]]


def _groups(parameters: _Ready) -> Iterator[_Ready]:
    """Neighbours on one device, so many that their sizes stay below a bound, or one alone."""
    group: _Ready = []
    size = kept = 0
    for parameter, (mean, parts, mask) in parameters:
        own_kept = mean.numel() if has_cheap_calls(mean.device) and parts[0].numel() == mean.numel() else 0
        is_full = size + mean.numel() > _AT_ONCE or (kept + own_kept > _KEPT_AT_ONCE and own_kept > 0)
        if group and (is_full or group[0][1].mean.device != mean.device):
            yield group
            group, size, kept = [], 0, 0
        group.append((parameter, LogGaussian(mean, parts, mask)))
        size, kept = size + mean.numel(), kept + own_kept
    if group:
        yield group
