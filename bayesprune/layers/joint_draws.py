"""Draws the weights of many layers together, and squares their stds, at the start of a training forward of their model.

What a layer draws is said by a seed that it takes from torch's stream when it asks, whether it was drawn ahead or not:
at the start of a forward the coming seeds are read, the stream left as it is, and what asked in the last forward is
drawn with them, in few passes. A layer whose seed turns out to be another one draws by itself. So with an attachment or
without, with checkpointing or not, all draws are the same; and where something else in the forward, dropout on a
processor say, takes numbers from the stream, only what asks before it is drawn ahead the next time.

Squares of stds, of which local noise is made, are not random: what the last forward asked for is made ahead.

Layers draw on their own in a part of the model that is called alone, where tensors are not ordinary ones in float32
(sharded, half precision), and where a part of the forward runs once more later (checkpointing).
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bayesprune import estimators
from bayesprune.estimators import LogGaussian
from bayesprune.estimators.squares import end_ahead, make_ahead
from bayesprune.estimators.types import runs_once
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
        """Its posterior, where a seed says what is drawn from it."""
        if self.layer.posterior_hook is not None:
            return None
        if not self._is_known():
            found = self.layer.posterior(self.name)
            self._posterior = found if estimators.has_seeds(found) else None
            self._part_names = self.layer._part_names(self.name)
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


class _Draw(NamedTuple):
    """A draw that was made ahead, with the seed and the means that it was made of, and what version these had."""

    parameter: _Parameter
    seed: int
    mean: Tensor
    version: int
    value: Tensor

    def is_of(self, parameter: _Parameter, seed: int) -> bool:
        """Whether it is what the layer draws now."""
        is_same = self.parameter is parameter and self.seed == seed and self.version == self.mean._version
        return is_same and parameter.layer._parameters.get(parameter.name) is self.mean


class _Running(threading.local):
    """Whose forward runs now."""

    draws: "JointDraws | None" = None


_RUNNING = _Running()


class JointDraws:
    """The hooks around the forward of a model, and the parameters that its layers draw."""

    def __init__(self, model: nn.Module, layers: Iterable[tuple[str, Layer, list[str]]]) -> None:
        """Name and layer of the model, with the names of the parameters that it may draw; works until `remove`."""
        triples = [(prefix, layer, name) for prefix, layer, names in layers for name in names]
        self._layers = list({id(layer): layer for _, layer, _ in triples}.values())
        self._parameters = {(layer, name): _Parameter(layer, name) for _, layer, name in triples}
        self._names = {f"{prefix}.{name}": (layer, name) for prefix, layer, name in triples}
        self._plan: list[_Parameter | None] = []
        self._squared: list[Tensor] = []
        self._asked: list[_Parameter | None] = []
        self._seeds: list[int] = []
        self._first = 0
        self._ahead: dict[int, _Draw] = {}
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def remove(self) -> None:
        """Leaves the layers to themselves."""
        for handle in self._handles:
            handle.remove()

    def state(self) -> dict[str, list[str]]:
        """What the next forward makes ahead, by name: draws in the order of their seeds, and squares of log stds.

        A seed of a draw that is not made ahead has "".
        """
        names = {self._parameters[key]: name for name, key in self._names.items()}
        drawn = ["" if parameter is None else names[parameter] for parameter in self._plan]
        by_id = {id(part): name for name, part in self._log_stds().items()}
        return {"draws": drawn, "squares": [by_id[id(part)] for part in self._squared if id(part) in by_id]}

    def load(self, state: Mapping[str, Sequence[str]]) -> None:
        """Goes on with the plan that was saved, so that sums of gradients are the same to the last bit."""
        drawn, parts = state.get("draws", ()), self._log_stds()
        self._plan = [self._parameters[self._names[name]] if name in self._names else None for name in drawn]
        self._squared = [parts[name] for name in state.get("squares", ()) if name in parts]

    def _log_stds(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for full, (layer, name) in self._names.items():
            prefix = full.removesuffix(name)
            held = {key: layer._parameters.get(key) for key in layer._part_names(name)}
            found.update((f"{prefix}{key}", part) for key, part in held.items() if part is not None)
        return found

    def take(self, layer: Layer, name: str) -> Tensor | None:
        """The layer's draw; None where no seed says what it is."""
        parameter = self._parameters.get((layer, name))
        if parameter is None or layer.posterior_hook is not None or torch._C._are_functorch_transforms_active():
            return None
        draw = self._ahead.pop(noise.num_seeds() - self._first, None)
        posterior = parameter.posterior() if draw is None or draw.parameter is not parameter else None
        if draw is None and posterior is None:
            return None
        number, seed, may_be_ahead = noise.num_seeds() - self._first, noise.draw_seed(), runs_once()
        if number < len(self._seeds) and self._seeds[number] == seed:
            self._asked += [None] * (number - len(self._asked))
            self._asked.append(parameter if may_be_ahead else None)
        else:
            self._seeds = []
        if draw is not None and may_be_ahead and draw.is_of(parameter, seed):
            return draw.value
        posterior = parameter.posterior() if posterior is None else posterior
        return None if posterior is None else estimators.sample(posterior, seed)

    def _begin(self, model: nn.Module, args: tuple) -> None:
        """A forward pre-hook: draws what the last forward asked for."""
        if torch.compiler.is_compiling() or _RUNNING.draws is not None or not model.training or not runs_once():
            return
        if not all(hasattr(layer, "posterior_hook") for layer in self._layers):
            self.remove()  # made deterministic
            return
        device = next((p.device for layer in self._layers for p in layer._parameters.values() if p is not None), None)
        if device is None or not noise.can_repeat(device):
            return
        plan = [p for p in self._plan if p is None or p.is_sampled()]
        posteriors = {p: p.posterior() for p in dict.fromkeys(plan) if p is not None}
        plan = [p for p in plan if p is None or posteriors[p] is not None]
        _RUNNING.draws, self._asked, self._first = self, [], noise.num_seeds()
        self._seeds = noise.coming_seeds(len(plan) + 2 * len(self._parameters))
        numbered = enumerate(zip(plan, self._seeds, strict=False))
        drawn = ((number, p, seed, posteriors[p]) for number, (p, seed) in numbered if p is not None)
        for group in _groups(drawn):
            draws = estimators.sample_together([found for *_, found in group], [seed for _, _, seed, _ in group])
            for (number, parameter, seed, (mean, *_)), draw in zip(group, draws, strict=True):
                self._ahead[number] = _Draw(parameter, seed, mean, mean._version, draw)
        make_ahead(self._squared)

    def _end(self, *_: Any) -> None:
        """A forward hook that is always called: forgets the draws, not what was asked for."""
        if _RUNNING.draws is self:
            _RUNNING.draws = None
            self._plan, self._asked, self._seeds, self._ahead = self._asked, [], [], {}
            self._squared = end_ahead()


def take(layer: Layer, name: str) -> Tensor | None:
    """The layer's draw in the forward that runs now; None where there is none, or no seed says what it is."""
    if torch.compiler.is_compiling() or _RUNNING.draws is None:
        return None
    return _RUNNING.draws.take(layer, name)


_Drawn = tuple[int, _Parameter, int, Any]
"""The number of a seed, the parameter that is drawn with it, the seed, and the posterior."""


def _groups(parameters: Iterable[_Drawn]) -> Iterator[list[_Drawn]]:
    """Neighbours on one device, so many that their sizes stay below a bound, or one alone."""
    group: list[_Drawn] = []
    size = kept = 0
    for drawn in parameters:
        mean, parts, _ = drawn[3]
        own_kept = mean.numel() if has_cheap_calls(mean.device) and parts[0].numel() == mean.numel() else 0
        is_full = size + mean.numel() > _AT_ONCE or (kept + own_kept > _KEPT_AT_ONCE and own_kept > 0)
        if group and (is_full or group[0][3].mean.device != mean.device):
            yield group
            group, size, kept = [], 0, 0
        group.append(drawn)
        size, kept = size + mean.numel(), kept + own_kept
    if group:
        yield group
