"""Trains one model at all its levels: each step runs at a level that is drawn, with the units that it keeps.

After Nunez et al. (2021, arXiv:2110.04252), LCS, with one set of weights for all levels (a point, not a line): half of
the draws are ends, the model itself or its smallest level, the others any level with the same chance. What a level
keeps is settled before; there the weights are ranked anew by magnitude in each step.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.elastic.positions import fill_kept
from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.device import numbers_of
from bayesprune.foundation.target import Target
from bayesprune.foundation.text import first_names
from bayesprune.layers import variational_layers
from bayesprune.prune import recalibrate_batch_norm
from bayesprune.prune.batch_norm import measured_norms
from bayesprune.storage.levels import KINDS, Level
from bayesprune.storage.save import outputs_differ

Factors = tuple[Tensor, ...]
"""Zeros and ones that broadcast to a parameter, whose product is one where a level keeps it."""


class LevelDraws:
    """Runs a model at its levels while it trains, and gives the levels of the trained model.

    Inside `drawn()` or `at(...)` the weights that the level lacks are zero and get no gradient, so that forward and
    backward are those of the smaller model; afterwards they are what they were. Running statistics of batch norm follow
    the whole model's steps alone. An optimizer moves weights without a gradient by momentum and weight decay as ever.

    Examples:
        >>> import torch, bayesprune as bp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3))
        >>> x, y = torch.randn(64, 8), torch.randint(3, (64,))
        >>> smaller = bp.elastic.levels(model, x[:1], ["macs=0.7", "macs=0.4"], data=[x], fit=False)
        >>> draws = bp.elastic.LevelDraws(model, smaller, x[:1])
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     with draws.drawn():
        ...         torch.nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
        >>> [level.target for level in draws.levels([x])]
        ['macs=0.7', 'macs=0.4']
    """

    def __init__(
        self, model: nn.Module, levels: Sequence[Level], example_inputs: Any = None, *, ends: float = 0.5
    ) -> None:
        """Finds what each level keeps; the model is not changed.

        Args:
            model: An ordinary model, which `levels` was given.
            levels: What that returned; with `fit=False`, because what a fit moved is not used: all levels have the
                model's own weights.
            example_inputs: As for `levels`; the model without a level's units is compared with the level on them. None
                where only single weights go.
            ends: How often the model itself or its smallest level is drawn, each as often as the other; 0 to 1. The
                other draws are any of them.

        Raises:
            ValueError: there are no levels, they are of another model, or it has posteriors.
            UnsupportedModelError: the model without the units computes something else than the level, as with a norm
                over the channels that are cut.
        """
        if not levels:
            raise ValueError("LevelDraws got no levels; expected those of bp.elastic.levels(model, ..., fit=False).")
        if any(variational_layers(model)):
            raise ValueError("LevelDraws got a model with posteriors; expected that of to_deterministic(model).")
        if not 0 <= ends <= 1:
            raise ValueError(f"ends is {ends!r}; expected a share of the draws, 0 to 1.")
        self._model, self._levels, self._ends = model, list(levels), ends
        self._factors = {str(_target(level)): _factors(model, level) for level in levels}
        sizes = {target: _num_kept(model, factors) for target, factors in self._factors.items()}
        self._smallest = min(sizes, key=sizes.__getitem__)
        if example_inputs is not None:
            self._check(next(level for level in levels if str(_target(level)) == self._smallest), example_inputs)

    @contextmanager
    def drawn(self) -> Iterator[str | None]:
        """Inside, the model is at a level drawn by torch's generator: its target, or None for the model itself.

        The backward pass belongs inside, too, the optimizer's step behind it.
        """
        every = [None, *self._factors]
        ends = [None, self._smallest]
        candidates = ends if float(torch.rand(())) < self._ends else every
        target = candidates[int(torch.randint(len(candidates), ()))]
        if target is None:
            yield None
            return
        with self.at(target):
            yield target

    @contextmanager
    def at(self, target: str) -> Iterator[None]:
        """Inside, the model is at the level of this target.

        Raises:
            ValueError: there is no such level.
            RuntimeError: at the end, weights of which the level lacks some were moved inside.
        """
        factors = self._factors.get(str(Target.parse(target, KINDS, "at")))
        if factors is None:
            raise ValueError(f"there is no level {target!r}; expected one of {', '.join(self._factors)}.")
        own = {name: self._model.get_parameter(name) for name in factors}
        buffers = [buffer for norm in measured_norms(self._model) for buffer in norm.buffers(recurse=False)]
        before = [(tensor, tensor.detach().clone()) for tensor in (*own.values(), *buffers)]
        handles = [
            parameter.register_hook(lambda gradient, its=factors[name]: _times(gradient.clone(), its))
            for name, parameter in own.items()
            if parameter.requires_grad
        ]
        try:
            with torch.no_grad():
                for name, parameter in own.items():
                    _times(parameter, factors[name])
            yield
            values = zip(own.items(), before, strict=False)
            numbers = numbers_of([_num_moved(its, value, factors[name]) for (name, its), (_, value) in values])
            if moved := [name for name, number in zip(own, numbers, strict=True) if number]:
                raise RuntimeError(
                    f"{first_names(moved)} moved while the model was at a level, and is put back to what it was; take "
                    "the optimizer's step behind the `with` block, where only forward and backward belong."
                )
        finally:
            for handle in handles:
                handle.remove()
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)

    def levels(self, data: Iterable[Any] | None = None) -> list[Level]:
        """The levels with the weights that the model has now, for `save(model, directory, levels=...)`.

        Args:
            data: Batches, with labels or without, on which each level's batch norm is measured; None where there is
                none.

        Raises:
            ValueError: the model has batch norms, and there are no data.
        """
        batches = None if data is None else list(data)
        if batches is None and measured_norms(self._model):
            raise ValueError("the model has batch norms, whose statistics differ by level; pass batches as data.")
        found = []
        for level in self._levels:
            smaller = self._filled(level).eval()
            if batches is not None:
                recalibrate_batch_norm(smaller, batches)
            found.append(Level(level.target, smaller, level.kept))
        return found

    @torch.no_grad()
    def _filled(self, level: Level) -> nn.Module:
        """The smaller model with the weights that the model has now."""
        smaller = copy.deepcopy(level.model)
        fill_kept(smaller, level.kept, self._model.state_dict())
        for name, factors in self._factors[str(_target(level))].items():
            if name not in level.kept:
                _times(smaller.get_parameter(name), factors)
        return smaller

    def _check(self, level: Level, example_inputs: Any) -> None:
        smaller = self._filled(level)
        with self.at(level.target):
            difference = outputs_differ(self._model, smaller, example_inputs)
        if difference is not None:
            raise UnsupportedModelError(
                f"the model without the units that {level.target!r} lacks computes something else than that level "
                f"({difference}), as with a norm over channels of which some go. Leave these layers whole by "
                "ignored_layers of bp.elastic.levels."
            )


def _target(level: Level) -> Target:
    return Target.parse(level.target, KINDS, "LevelDraws")


@torch.no_grad()
def _factors(model: nn.Module, level: Level) -> dict[str, Factors]:
    """By name of a parameter, what of it the level keeps, where that is not all.

    Raises:
        ValueError: it is a level of another model.
    """
    found: dict[str, Factors] = {}
    smaller = dict(level.model.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in smaller:
            raise ValueError(f"the level {level.target!r} has no {name}; expected levels of this very model.")
        if name in level.kept:
            found[name] = tuple(
                _ones_at(positions, parameter, dim)
                for dim, positions in enumerate(level.kept[name])
                if positions is not None
            )
        elif smaller[name].shape != parameter.shape:
            raise ValueError(
                f"the level {level.target!r} has {name} of shape {tuple(smaller[name].shape)}, the model "
                f"{tuple(parameter.shape)}; expected levels of this very model."
            )
        elif bool((is_gone := (smaller[name] == 0) & (parameter != 0)).any()):
            found[name] = ((~is_gone).to(parameter.dtype),)
    return found


def _ones_at(positions: Tensor, parameter: Tensor, dim: int) -> Tensor:
    size = parameter.shape[dim]
    ones = torch.zeros(size, dtype=parameter.dtype, device=parameter.device)
    ones[positions.to(parameter.device)] = 1
    return ones.view(-1, *(1,) * (parameter.dim() - dim - 1))


def _times(tensor: Tensor, factors: Factors) -> Tensor:
    """The tensor times all of them, in place."""
    for factor in factors:
        tensor.mul_(factor)
    return tensor


@torch.no_grad()
def _num_moved(parameter: Tensor, value: Tensor, factors: Factors) -> Tensor:
    """How many finite weights are other ones than these values times the factors; fused optimizers raise no version."""
    return ((parameter != _times(value.clone(), factors)) & parameter.isfinite()).sum()


def _num_kept(model: nn.Module, factors: dict[str, Factors]) -> int:
    kept = 0
    for name, parameter in model.named_parameters():
        ones = torch.ones((), device=parameter.device)
        for factor in factors.get(name, ()):
            ones = ones * factor
        kept += int(ones.expand(parameter.shape).sum())
    return kept
