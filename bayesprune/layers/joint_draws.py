"""Draws the weights of many layers together, at the start of a training forward of their model.

What a layer draws is said by a seed that it takes from torch's stream when it asks, whether it was drawn ahead or not:
at the start of a forward the coming seeds are read, the stream left as it is, and what asked in the last forward is
drawn with them, in few passes. A layer whose seed turns out to be another one draws by itself. So with an attachment or
without, with checkpointing or not, all draws are the same; and where something else in the forward, dropout on a
processor say, takes numbers from the stream, only what asks before it is drawn ahead the next time.

Layers draw on their own in a part of the model that is called alone, where tensors are not ordinary ones in float32
(sharded, half precision), and where a part of the forward runs once more later (checkpointing).
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
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
    """A parameter that may be drawn, and what is known of its posterior."""

    def __init__(self, layer: Layer, name: str) -> None:
        self.layer, self.name = layer, name
        self._posterior: LogGaussian | None = None
        self._part_names: list[str] = []

    def posterior(self) -> LogGaussian | None:
        """Its posterior, where a seed says what is drawn from it now."""
        if self.layer.posterior_hook is not None:
            return None
        if not self._is_known():
            found = self.layer.posterior(self.name)
            self._posterior = found if estimators.has_seeds(found) else None
            self._part_names = self.layer._part_names(self.name)
        elif not noise.can_repeat(self._posterior.mean.device):  # type: ignore[union-attr]
            return None
        return self._posterior

    def is_sampled(self) -> bool:
        """Whether its layer may draw as it did in the last forward."""
        layer = self.layer
        chosen = layer.estimator_override or (layer.estimator if layer.training else "mean")
        return chosen in ("auto", "weight_sampling") or not getattr(layer, "is_linear_in_weight", True)

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

    def __init__(self, model: nn.Module, layers: Iterable[tuple[str, Layer, list[str]]]) -> None:
        """Name and layer of the model, with the names of the parameters that it may draw; works until `remove`."""
        triples = [(prefix, layer, name) for prefix, layer, names in layers for name in names]
        self._parameters = {(layer, name): _Parameter(layer, name) for _, layer, name in triples}
        self._names = {f"{prefix}.{name}": (layer, name) for prefix, layer, name in triples}
        self._plan: list[_Parameter | None] = []
        self._asked: list[_Parameter | None] = []
        self._seeds: list[int] = []
        self._first = 0
        self._ahead: dict[tuple[_Parameter, int], tuple[Tensor, int]] = {}
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def remove(self) -> None:
        """Leaves the layers to themselves."""
        for handle in self._handles:
            handle.remove()

    def state(self) -> list[str]:
        """What the next forward draws ahead: names in the order of their seeds, "" for one that is not drawn ahead."""
        names = {self._parameters[key]: name for name, key in self._names.items()}
        return ["" if parameter is None else names[parameter] for parameter in self._plan]

    def load(self, state: Sequence[str]) -> None:
        """Goes on with the plan that was saved, so that sums of gradients are the same to the last bit."""
        self._plan = [self._parameters[self._names[name]] if name in self._names else None for name in state]

    def take(self, layer: Layer, name: str) -> Tensor | None:
        """The layer's draw; None where no seed says what it is."""
        parameter = self._parameters.get((layer, name))
        posterior = None if parameter is None else parameter.posterior()
        if parameter is None or posterior is None:
            return None
        number, seed, may_be_ahead = noise.num_seeds() - self._first, noise.draw_seed(), _runs_once()
        if number < len(self._seeds) and self._seeds[number] == seed:
            self._asked += [None] * (number - len(self._asked))
            self._asked.append(parameter if may_be_ahead else None)
        else:
            self._seeds = []
        draw, version = self._ahead.pop((parameter, seed), (None, 0))
        if draw is not None and may_be_ahead and version == posterior.mean._version:
            return draw
        return estimators.sample(posterior, seed)

    def _begin(self, model: nn.Module, args: tuple) -> None:
        """A forward pre-hook: draws what the last forward asked for."""
        if torch.compiler.is_compiling() or _RUNNING.draws is not None or not model.training or not _runs_once():
            return
        if not all(hasattr(parameter.layer, "posterior_hook") for parameter in self._parameters.values()):
            self.remove()  # made deterministic
            return
        plan = [p for p in self._plan if p is None or p.is_sampled()]
        posteriors = {p: p.posterior() for p in dict.fromkeys(plan) if p is not None}
        plan = [p for p in plan if p is None or posteriors[p] is not None]
        _RUNNING.draws, self._asked, self._first = self, [], noise.num_seeds()
        self._seeds = noise.coming_seeds(len(plan) + 2 * len(self._parameters))
        pairs = ((p, seed, posteriors[p]) for p, seed in zip(plan, self._seeds, strict=False) if p is not None)
        for group in _groups(pairs):
            of_group, seeds, drawn_from = zip(*group, strict=True)
            draws = estimators.sample_together(drawn_from, seeds)
            for parameter, seed, posterior, draw in zip(of_group, seeds, drawn_from, draws, strict=True):
                self._ahead[parameter, seed] = draw, posterior.mean._version

    def _end(self, *_: Any) -> None:
        """A forward hook that is always called: forgets the draws, not what was asked for."""
        if _RUNNING.draws is self:
            _RUNNING.draws = None
            self._plan, self._asked, self._seeds, self._ahead = self._asked, [], [], {}


def take(layer: Layer, name: str) -> Tensor | None:
    """The layer's draw in the forward that runs now; None where there is none, or no seed says what it is."""
    if torch.compiler.is_compiling() or _RUNNING.draws is None:
        return None
    return _RUNNING.draws.take(layer, name)


def _runs_once() -> bool:
    """Whether what is computed now is for a backward pass, none of it to be thrown away and computed again there."""
    if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None  # type: ignore[attr-defined]


_Drawn = tuple[_Parameter, int, Any]
"""A parameter, the seed of a draw, and its posterior."""


def _groups(parameters: Iterable[_Drawn]) -> Iterator[list[_Drawn]]:
    """Neighbours on one device, so many that their sizes stay below a bound, or one alone."""
    group: list[_Drawn] = []
    size = kept = 0
    for drawn in parameters:
        mean, parts, _ = drawn[2]
        own_kept = mean.numel() if has_cheap_calls(mean.device) and parts[0].numel() == mean.numel() else 0
        is_full = size + mean.numel() > _AT_ONCE or (kept + own_kept > _KEPT_AT_ONCE and own_kept > 0)
        if group and (is_full or group[0][2].mean.device != mean.device):
            yield group
            group, size, kept = [], 0, 0
        group.append(drawn)
        size, kept = size + mean.numel(), kept + own_kept
    if group:
        yield group
