"""Trains on with weights held to their grids: the network sees them rounded, the optimizer moves them as they are.

The straight-through estimator (Bengio et al., 2013, arXiv:1308.3432; Courbariaux et al., 2015, arXiv:1511.00363): the
gradient with respect to the rounded weight is taken for that with respect to the weight itself, and is zero where the
weight lies outside its grid. Between two steps a parameter holds the rounded values, so training and evaluation, every
layer and every estimator of its noise see the same; only during a step does it hold what the optimizer moves.
"""

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bayesprune.bits.others import named_embeddings, ordinary_names, ordinary_tensors, rest_of, significant
from bayesprune.bits.report import Quantization
from bayesprune.bits.rounding import round_alone
from bayesprune.bits.steps import Grid, finer_grid, grid_of
from bayesprune.convert import to_variational
from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.model import bare_model, requires_grad
from bayesprune.foundation.text import first_names
from bayesprune.layers import VariationalLayer, named_posteriors
from bayesprune.train.checks import check_hooks, check_types
from bayesprune.train.optimizers import StepCount, grad_scaler_tensors, held_by, unwrapped, with_gradients

_MOST_EXTRA = 8
_ROUNDING = 1e-9  # 0.3 / 0.1 is a little below 3


@dataclass(frozen=True)
class WidthSchedule:
    """Widths that fall during the training: grids with so many bits more at the start, one bit fewer each time.

    A pure function of the share of the training that is done, so a run that was resumed goes on as if it had never
    stopped.

    Attributes:
        extra: Bits beyond those of the grids at the start, 1 to 8; each halves the steps.
        begin: Share of the training before the first fall.
        end: Share of the training from which on the grids are those asked for.
    """

    extra: int = 4
    begin: float = 0.0
    end: float = 0.6

    def __post_init__(self) -> None:
        if type(self.extra) is not int or not 1 <= self.extra <= _MOST_EXTRA:
            raise ValueError(f"extra is {self.extra!r}; expected a whole number of bits from 1 to {_MOST_EXTRA}.")
        if not 0 <= self.begin <= self.end <= 1:
            raise ValueError(f"begin={self.begin!r}, end={self.end!r}; expected 0 <= begin <= end <= 1.")

    def extra_at(self, progress: float) -> int:
        """Bits beyond those of the grids once the share `progress` of the training is done.

        Examples:
            >>> [WidthSchedule(extra=2, end=0.5).extra_at(done / 10) for done in range(7)]
            [2, 2, 2, 1, 1, 0, 0]
        """
        if progress >= self.end - _ROUNDING:
            return 0
        if progress <= self.begin:
            return self.extra
        return math.ceil(self.extra * (self.end - progress) / (self.end - self.begin) - _ROUNDING)


class StraightThrough:
    """Holds rounded weights to their grids while an optimizer trains them; the loop stays as it is.

    From now on until `finish`, the weights are rounded after each of the optimizer's steps. What is zero now stays
    zero. Stds, norms and everything else that has no grid trains as usual, and noise is drawn about the rounded means.
    Weights that the optimizer does not hold stay as they are; where several optimizers share a model, each has one.

    Attributes:
        extra: Bits that the grids have now beyond those asked for.
        comes_last: What is attached to the optimizer, before or later, meets the weights as they are.

    Examples:
        >>> import torch, bayesprune as bp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> x, y = torch.randn(64, 8), torch.randint(3, (64,))
        >>> report = bp.quantize(model, [(x, y)], bits=3)
        >>> optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        >>> rounding = bp.bits.StraightThrough(optimizer, model, report)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
        >>> rounding.finish()
        >>> len(model[0].weight.unique()) <= 7
        True
    """

    comes_last: ClassVar[bool] = True

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        report: Quantization | Mapping[str, Any] | None = None,
        *,
        schedule: WidthSchedule | None = None,
        num_steps: int | None = None,
    ) -> None:
        """Rounds the weights, and hooks the optimizer's steps.

        Args:
            optimizer: Any torch optimizer that computes a step from one gradient; attach to it, before or later, where
                the model is variational and its posterior is to be trained on.
            model: Rounded by `quantize`: then it trains on from there, with the zeros of rounding. Or as it was before
                and the report of a rounded copy: then its weights are rounded to the nearest places of those grids, and
                those that are zero for rounding may become others.
            report: What `quantize` returned, or the `state_dict()` of a run to go on with, whose model and optimizer
                have been loaded. None finds the grids of a rounded model, loaded from a file say, in its weights; no
                weight then leaves the places that its width in bits has.
            schedule: Finer grids at first. None has those asked for from the start.
            num_steps: Optimizer steps of the whole training, those before a resume included; the schedule needs it.

        Raises:
            TypeError: the first two are no optimizer and model.
            ValueError: no weight has a grid, the optimizer holds none that has one or has them held to grids already,
                the report is of another model, or `num_steps` is missing.
            UnsupportedModelError: weights are cut over processes (FSDP, DeepSpeed), or the optimizer takes no step
                through `step`, or moves weights outside it, too.
        """
        check_types(optimizer, model, "StraightThrough")
        if hasattr(optimizer, "sync_lookahead"):
            raise UnsupportedModelError(
                f"StraightThrough got {type(optimizer).__name__}, which moves weights after the steps of the optimizer "
                "inside it, off their grids; expected an optimizer that moves them in its step()."
            )
        optimizer = unwrapped(optimizer)
        check_hooks(optimizer, "StraightThrough")
        if schedule is not None and (num_steps is None or not num_steps > 0):
            raise ValueError(
                f"num_steps is {num_steps!r}; expected the optimizer steps of the whole training, 1 or more, because "
                "the schedule goes by shares of it."
            )
        self._model = bare_model(model)
        self._schedule, self._num_steps, self._steps = schedule, num_steps, StepCount()
        source = _with_posteriors(self._model)
        posteriors = {posterior.name: posterior for posterior in named_posteriors(source)}
        masks = dict.fromkeys(named_embeddings(source)) | {name: each.mask for name, each in posteriors.items()}
        if isinstance(report, Quantization):
            grids = report.grids
        elif report is None:
            biases = [posterior.name for posterior in posteriors.values() if not posterior.is_weight]
            grids = _found(self._model, masks, biases)
        else:
            grids = {name: Grid(step, report["limits"][name]) for name, step in report["steps"].items()}
        self._without_rest = posteriors.keys() | grids.keys()
        self._rounded = {tensor.name: tensor for tensor in _held(optimizer, self._model, masks, grids)}
        _check_alone(optimizer, self._rounded.values())
        if isinstance(report, Mapping):
            self._continue(report)
        self.extra = 0
        self._round()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def step(self) -> int:
        """Optimizer steps taken so far, those that a gradient scaler skipped not counted."""
        return self._steps.value

    def finish(self) -> None:
        """Ends it: the weights stay where they are, on the grids asked for, and the optimizer is as it was before.

        What has no grid, such as norms, is rounded to 11 significant bits, as by `quantize`.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._round(extra=0)
        tensors = ordinary_tensors(self._model, ordinary_names(self._model))
        own = [self._model.get_parameter(name) for name in self._without_rest]
        for tensor in rest_of(tensors, own):
            tensor.copy_(significant(tensor))

    def state_dict(self) -> dict[str, Any]:
        """Step, grids, and the weights that the optimizer moves; tensors, names and numbers."""
        return {
            "step": self.step,
            "values": {name: tensor.values.clone() for name, tensor in self._rounded.items()},
            "kept": {name: tensor.kept.clone() for name, tensor in self._rounded.items()},
            "steps": {name: tensor.grid.step.clone() for name, tensor in self._rounded.items()},
            "limits": {name: tensor.grid.limit for name, tensor in self._rounded.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict()`, once the states of model and optimizer have been loaded.

        Raises:
            ValueError: the optimizer does not hold the tensors that it held there.
        """
        self._continue(state)
        self._round()

    def _continue(self, state: Mapping[str, Any]) -> None:
        """Takes step, grids and values from the state of another run."""
        shapes = {name: values.shape for name, values in state["values"].items()}
        own = {name: tensor.values.shape for name, tensor in self._rounded.items()}
        if others := {name for name, _ in shapes.items() ^ own.items()}:
            raise ValueError(
                f"the state and this optimizer differ in {first_names(sorted(others))}, which one of them does not "
                "hold, or in another shape; expected the optimizer of the run that was saved."
            )
        self._steps.value = state["step"]
        for name, tensor in self._rounded.items():
            tensor.values.copy_(state["values"][name])
            tensor.kept.copy_(state["kept"][name])
            tensor.grid = Grid(state["steps"][name].to(tensor.values.device), state["limits"][name])

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        return with_gradients(optimizer, args, kwargs, self._hand_over)

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Gives the optimizer the weights as they are, and gradients that are zero outside the grid."""
        for tensor in self._rounded.values():
            limit = tensor.grid.step * tensor.grid.limit
            if (gradient := tensor.parameter.grad) is not None:
                is_inside = tensor.kept & (tensor.values.abs() <= limit)
                if gradient.is_sparse:
                    gradient.mul_(is_inside)
                else:
                    gradient.masked_fill_(~is_inside, 0)
            tensor.parameter.copy_(tensor.values)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for tensor in self._rounded.values():
            tensor.values.copy_(tensor.parameter)
        self._steps.add(grad_scaler_tensors(optimizer)[1])
        self._round()

    @torch.no_grad()
    def _round(self, extra: int | None = None) -> None:
        """Rounds all weights, to grids with so many more bits; None asks the schedule."""
        if extra is None:
            schedule, length = self._schedule, self._num_steps
            extra = 0 if schedule is None or length is None else schedule.extra_at(self.step / length)
        self.extra = extra
        for tensor in self._rounded.values():
            grid = finer_grid(tensor.grid, extra)
            tensor.parameter.copy_(round_alone(tensor.values, tensor.kept, grid))


@dataclass
class _Rounded:
    """One tensor: the parameter, the weights that it holds during a step, and their grid."""

    name: str
    parameter: nn.Parameter
    values: Tensor
    kept: Tensor
    grid: Grid


def _with_posteriors(model: nn.Module) -> nn.Module:
    """The model itself where it is variational, else a copy that is, in frozen layers too."""
    if any(isinstance(module, VariationalLayer) for module in model.modules()):
        return model
    found = copy.deepcopy(model)
    with requires_grad(found, True):
        return to_variational(found)


def _found(model: nn.Module, names: Iterable[str], biases: Collection[str]) -> dict[str, Grid]:
    """The grids on which the tensors of these names stand, some of which are biases.

    Raises:
        ValueError: they stand on none.
    """
    found = {name: grid_of(model.get_parameter(name).detach().cpu()) for name in names}
    if not any(grid is not None and name not in biases for name, grid in found.items()):
        raise ValueError(
            f"no weight of this {type(model).__name__} stands on a grid, and no report says on which it is to stand. "
            "Call bp.quantize(model, ...) first, or pass the report of a rounded copy."
        )
    return {name: grid for name, grid in found.items() if grid is not None}


def _held(
    optimizer: Optimizer, model: nn.Module, masks: Mapping[str, Tensor | None], grids: Mapping[str, Grid]
) -> Iterator[_Rounded]:
    """The tensors with a grid that the optimizer holds.

    Raises:
        ValueError: there are none, or the grids are of other tensors.
        UnsupportedModelError: one is cut over processes.
    """
    if unknown := [name for name in grids if name not in masks]:
        raise ValueError(
            f"the steps given are of {first_names(unknown)}, which this {type(model).__name__} does not have; "
            "expected the report or state of this very model, or of a copy."
        )
    held, number = held_by(optimizer), 0
    for name, grid in grids.items():
        parameter = model.get_parameter(name)
        if id(parameter) not in held:
            continue
        if hasattr(parameter, "full_tensor"):
            raise UnsupportedModelError(
                f"{name} is cut over processes, and its grid is not; expected a model that every process has whole."
            )
        values = parameter.detach().clone()
        if not _broadcasts(grid.step.shape, values.shape):
            raise ValueError(
                f"the steps given are of shape {tuple(grid.step.shape)} for {name} of shape {tuple(values.shape)}; "
                "expected the report or state of this very model, or of a copy."
            )
        mask = masks[name]
        kept = (values != 0) if mask is None else (values != 0) & mask
        number += 1
        yield _Rounded(name, parameter, values, kept, Grid(grid.step.to(values.device), grid.limit))
    if not number:
        raise ValueError(
            f"{type(optimizer).__name__} holds none of the {len(grids)} tensors that have a grid; expected the "
            "optimizer of this very model."
        )


def _check_alone(optimizer: Optimizer, tensors: Iterable[_Rounded]) -> None:
    """Refuses tensors that are held to grids already: each would take the other's rounding for the weights themselves.

    Raises:
        ValueError: there is one.
    """
    owners = [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values()]
    others = [each for owner in owners if isinstance(owner, StraightThrough) for each in owner._rounded.values()]
    taken = {id(other.parameter) for other in others}
    if doubled := [tensor.name for tensor in tensors if id(tensor.parameter) in taken]:
        raise ValueError(
            f"{type(optimizer).__name__} has {first_names(doubled)} held to a grid already; call finish() of that "
            "StraightThrough first."
        )


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of one shape broadcasts to the other, and does not enlarge it."""
    sizes = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(own in (1, size) for own, size in sizes)
