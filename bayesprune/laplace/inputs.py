"""Moments of what goes into a layer of a model that is being cut, beside what went into it before: forwards only.

Where layers are cut one after the other, in the order of the forward, the inputs x~ of a layer come from layers that
are cut already. What it should give is what it gave before, W x. Over all weights V, E|W x - V x~|^2 is smallest at
V = W E[x x~^T] E[x~ x~^T]^-1, and every other V costs (V' - V) E[x~ x~^T] (V' - V)^T more: the two moments are all that
is needed (as in the tuning of Kwon et al., 2022, arXiv:2204.09656, section 4.3, there for one factor a unit).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.batches import device_of, on_device, split
from bayesprune.foundation.model import eval_mode
from bayesprune.laplace.calibration import check_examples, counted_positions
from bayesprune.laplace.matrices import damped, drawn_positions, input_rows
from bayesprune.layers import VariationalLayer

_ROWS_PER_COLUMN = 128  # positions in all at which the maps of a convolution are looked at, for each column


class InputMoments(NamedTuple):
    """Means over all positions of the products of a layer's inputs x~, and x before, (G, C, C) float64, on the CPU.

    Attributes:
        second: E[x~ x~^T].
        cross: E[x x~^T].
    """

    second: Tensor
    cross: Tensor

    def regressed(self, mean: Tensor, damping: float) -> tuple[Tensor, Tensor]:
        """The weights that give from x~ what `mean` (G, R, C) gave from x, and their precision, (G, C, C).

        Args:
            mean: The weights, float64.
            damping: Added to the diagonal of E[x~ x~^T], as a fraction of its mean: holds them at `mean`.
        """
        precision = damped(self.second, damping)
        return mean + torch.linalg.solve(precision, mean @ (self.cross - self.second), left=False), precision


def moves_bias(layer: VariationalLayer) -> bool:
    """Whether the layer has a bias that trains."""
    return "bias" in layer.active_names() and layer.get_parameter("bias").requires_grad


class Stage(NamedTuple):
    """Layers that read one tensor, by name, and how often a forward runs the first of them."""

    names: tuple[str, ...]
    num_runs: int


@torch.no_grad()
def stages(model: nn.Module, layers: Mapping[str, VariationalLayer], batch: Any) -> list[Stage]:
    """The layers in the order in which a forward runs them first, without those that it does not run.

    Linear layers that read one tensor are one stage.
    """
    first: dict[str, Any] = {}
    runs: Counter[str] = Counter()

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            first.setdefault(name, _input(args, kwargs))
            runs[name] += 1

        return note

    with _hooked(layers, hook), eval_mode(model):
        split(model, on_device(batch, device_of(model))).run(model)
    together: dict[Any, list[str]] = defaultdict(list)
    for name, inputs in first.items():
        layer = layers[name]
        is_linear = layer.get_parameter("weight").dim() == 2 and runs[name] == 1
        together[(id(inputs), moves_bias(layer)) if is_linear else name].append(name)
    return [Stage(tuple(names), runs[names[0]]) for names in together.values()]


@torch.no_grad()
def input_moments(
    model: nn.Module, reference: nn.Module | None, stage: Stage, batches: Sequence[Any], *, with_bias: bool
) -> InputMoments:
    """Moments of the inputs of a stage, x~ in the model and x in the reference; both run as far as there.

    Positions that a batch's `attention_mask` excludes do not count. Of the maps that a convolution reads, whose
    neighbouring positions say nearly the same, positions are drawn.

    Args:
        model: The model that is being cut.
        reference: What it was before; None if it is not cut yet.
        stage: The layers, of which the first is looked at.
        batches: Calibration batches.
        with_bias: Whether a 1 stands after the inputs.

    Raises:
        UnsupportedModelError: the two differ in how many positions the layer meets, or its inputs do not divide into
            the batch's examples.
    """
    sums: list[Tensor] = []
    total, number = 0, _positions_per_example(model, stage, batches)
    for batch in batches:
        after = _rows(model, stage, batch, number, with_bias=with_bias)
        before = after if reference is None else _rows(reference, stage, batch, number, with_bias=with_bias)
        if after.shape != before.shape:
            raise UnsupportedModelError(
                f"{stage.names[0]} met {after.shape[1]} positions of a batch where it had met {before.shape[1]} before "
                "the model was cut: what it reads depends on the weights. Leave the layer out with filter_fn."
            )
        products = [torch.bmm(rows.transpose(1, 2), after).double().cpu() for rows in (after, before)]
        sums = [old + new for old, new in zip(sums, products, strict=True)] if sums else products
        total += after.shape[1]
    return InputMoments(*(one / max(total, 1) for one in sums))


def _positions_per_example(model: nn.Module, stage: Stage, batches: Sequence[Any]) -> int | None:
    """At how many positions a convolution's maps are looked at in each example; None is all."""
    weight = model.get_parameter(f"{stage.names[0]}.weight")
    if weight.dim() == 2:
        return None
    num_examples = sum(split(model, batch).num_examples for batch in batches)
    return max(1, math.ceil(_ROWS_PER_COLUMN * weight[0].numel() / max(1, num_examples)))


class _Done(Exception):
    """Ends a forward early."""


def _rows(model: nn.Module, stage: Stage, batch: Any, number: int | None, *, with_bias: bool) -> Tensor:
    """The rows that the stage's weights meet, (G, P, C), at so many positions of each example, float32 at least."""
    name = stage.names[0]
    layer: Any = model.get_submodule(name)
    parts = split(model, on_device(batch, device_of(model)))
    inputs: list[Tensor] = []

    def hook(_: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            inputs.append(_input(args, kwargs))
            if len(inputs) == stage.num_runs:
                raise _Done

        return keep

    with suppress(_Done), _hooked({name: layer}, hook), eval_mode(model):
        parts.run(model)
    found = []
    for its in inputs:
        check_examples(name, its, parts.num_examples)
        wide = its.to(torch.promote_types(its.dtype, torch.float32))
        num_positions = input_rows(layer, wide.to("meta"), parts.num_examples).shape[1]
        chosen = None if number is None else drawn_positions(num_positions, number)
        rows = input_rows(layer, wide, parts.num_examples, chosen)
        if (counted := counted_positions(parts, num_positions)) is not None:
            rows = rows[counted if chosen is None else counted[:, chosen]][None]
        found.append(rows.flatten(0, 1))
    rows = torch.cat(found).transpose(0, 1)
    return torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2) if with_bias else rows


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], hook: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    """Inside, `hook(name)` runs before each layer, with its arguments."""
    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))
