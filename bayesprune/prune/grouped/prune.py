"""Makes convolutions of a trained model grouped ones: each output channel reads the inputs of its group alone.

Layers are changed in the order of the forward, as `laplace.compensate` fits them: a layer is fitted to what the dense
model computes, its channels are assigned to groups by what is lost, and what stays is fitted anew given the zeros. The
result is a real convolution with `groups=g`; where its channels stand in another order than those of the model, an
index comes before it or behind it. Between two such layers with nothing but batch norms and activations in between, the
channels take the order of the second, so that one index serves both.
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from bayesprune.errors import InfeasibleTargetError, UnsupportedModelError
from bayesprune.foundation.batches import with_examples
from bayesprune.foundation.latency import seconds_in_turn
from bayesprune.foundation.macs import macs_by_module
from bayesprune.foundation.model import restored_on_error, undone_on_error
from bayesprune.foundation.sharding import check_whole
from bayesprune.foundation.target import Target
from bayesprune.foundation.text import as_text
from bayesprune.laplace.compensation import ROWS_PER_COLUMN, refit
from bayesprune.laplace.matrices import definite
from bayesprune.laplace.regression import Moments, ridge
from bayesprune.laplace.sequence import dense_moments, fit_in_sequence
from bayesprune.laplace.sites import Site, fittable_layers, sites_of
from bayesprune.layers import VariationalLayer
from bayesprune.layers.shuffled import ShuffledConv2d
from bayesprune.prune.graph.find import find_groups
from bayesprune.prune.graph.prunable_layers import Layers, layer_names
from bayesprune.prune.grouped.assign import assign, block_costs

CHOICES = (2, 4, 8, 16)
"""Numbers of groups among which a target chooses."""
_DAMPING = 0.01  # of the trial that says what groups cost
_REPEATS = 10


@dataclass(frozen=True)
class GroupRow:
    """A convolution: into how many groups it fell, or why it stayed as it was.

    Attributes:
        name: Of the layer.
        groups: Their number; 1 where it stayed as it is.
        note: Why it did.
    """

    name: str
    groups: int
    note: str = ""


@dataclass(frozen=True)
class GroupReport:
    """What `prune_groups` did; prints as a table.

    Attributes:
        rows: The convolutions.
        macs: Multiply-accumulates before and after.
        seconds: Of a forward before and after, medians of forwards that took turns. Grouped convolutions are slower
            than their operations say, on many machines slower than dense ones.
    """

    rows: tuple[GroupRow, ...]
    macs: tuple[int, int]
    seconds: tuple[float, float]

    def __str__(self) -> str:
        """The table as plain text."""
        kept, time = (after / before for before, after in (self.macs, self.seconds))
        table = Table(
            "layer", "groups", "note", title=f"kept {kept:.1%} of {self.macs[0]:,} MACs, {time:.1%} of the time"
        )
        for row in self.rows:
            table.add_row(row.name, str(row.groups), row.note)
        return as_text(table)


@torch.no_grad()
def prune_groups(
    model: nn.Module,
    example_inputs: Any,
    target: int | str | Target = 4,
    *,
    data: Iterable[Any],
    ignored_layers: Layers = (),
    damping: float | None = None,
    progress: bool | None = False,
) -> GroupReport:
    """Turns convolutions into grouped ones, and moves what stays to make up for it; in place, without training.

    The layers that change become `ShuffledConv2d`, without a posterior. `save` and `load` know them. Remove channels
    before this call, not after it. Needs the extra `[groups]`.

    Args:
        model: A variational model; evaluated at its means.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments; MACs and time are
            those of a forward on it.
        target: The number of groups of every convolution whose channels it divides; or "macs=0.5", for which each gets
            1, 2, 4, 8 or 16, by what they cost it.
        data: Batches in any form that `bayesprune.foundation.batches` names; labels are not read. All are kept in
            memory.
        ignored_layers: Layers, or their names, with everything inside them, that stay as they are.
        damping: As for `laplace.compensate`.
        progress: Show a progress bar; None shows it on a terminal.

    Raises:
        ValueError: the target is out of range, there is no batch, or no convolution can have groups.
        InfeasibleTargetError: groups do not save so much. Nothing was changed.
        ImportError: scipy is missing.
        UnsupportedModelError: the model is sharded over processes.

    Examples:
        >>> import torch, bayesprune as bp
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
        >>> model = bp.to_variational(model)
        >>> x = torch.randn(16, 4, 8, 8)
        >>> report = bp.prune.prune_groups(model, x[:1], 2, data=[x])
        >>> [row.groups for row in report.rows], model[2].weight.shape
        ([2, 2], torch.Size([4, 4, 3, 3]))
    """
    if find_spec("scipy") is None:
        raise ImportError("prune_groups assigns channels by scipy, which is missing: pip install 'bayesprune[groups]'.")
    check_whole(model, "prune_groups")
    goal = _checked(target)
    batches = list(with_examples(model, data))
    if not batches:
        raise ValueError("data has no batch; expected an iterable of input batches.")
    dense = copy.deepcopy(model)
    macs = macs_by_module(dense, example_inputs)
    layers = fittable_layers(dense)
    notes = _notes(dense, layers, goal, ignored_layers)
    sites = sites_of(dense, batches, layers, rows_per_column=ROWS_PER_COLUMN)
    able = [site for site in sites if notes.get(site.name, "it is no convolution") == "" and site.num_calls == 1]
    if isinstance(goal, int):
        groups = {site.name: goal for site in able}
    else:
        groups = _divided(able, dense_moments(dense, batches, able), layers, macs, goal)
    if not any(number > 1 for number in groups.values()):
        why = "; ".join(dict.fromkeys(notes.values()))[:300] or "it has none"
        raise ValueError(f"no convolution of the model can have groups: {why}.")
    orders: dict[str, tuple[Tensor, Tensor]] = {}

    def fit(site: Site, moments: tuple[Moments, Moments]) -> Tensor | None:
        number = groups.get(site.name, 1)
        choose = None if number == 1 else partial(_choose, layers[site.name], number, orders, site.name)
        return refit(model, dense, site, moments, choose=choose, damping=damping)

    first = next(index for index, site in enumerate(sites) if groups.get(site.name, 1) > 1)
    with restored_on_error(model, dense):
        fit_in_sequence(model, dense, batches, sites[first:], fit, progress=progress, title="Group")
        made = {name: _grouped(model.get_submodule(name), groups[name], *order) for name, order in orders.items()}
        with _replaced(model, made):
            _fold(model, _between(dense, example_inputs, orders))
            after = sum(macs_by_module(model, example_inputs).values())
            seconds = seconds_in_turn([dense, model], example_inputs, num_repeats=_REPEATS)
    rows = [GroupRow(name, groups[name] if name in orders else 1, note) for name, note in notes.items()]
    return GroupReport(
        tuple(rows),
        (sum(macs.values()), after),
        tuple(float(torch.tensor(times).median()) for times in seconds),  # type: ignore[arg-type]
    )


def _checked(target: int | str | Target) -> int | Target:
    if isinstance(target, int):
        if target < 2:
            raise ValueError(f'prune_groups got {target!r} groups; expected 2 or more, or a target like "macs=0.5".')
        return target
    return Target.parse(target, ("macs",), "prune_groups")


def _notes(
    model: nn.Module, layers: Mapping[str, VariationalLayer], goal: int | Target, ignored_layers: Layers
) -> dict[str, str]:
    """Why each convolution stays as it is; empty for those that may change."""
    ignored = layer_names(model, ignored_layers)
    smallest = goal if isinstance(goal, int) else CHOICES[0]
    notes = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if not name:
            note = "it is the whole model, in which it cannot be replaced"
        elif name not in layers:
            note = "it has no posterior, is frozen, or shares its weight"
        elif layers[name].stock_type is not nn.Conv2d:
            note = f"it is a {layers[name].stock_type.__name__}, whose forward is its own"
        elif module.groups > 1:
            note = f"it has {module.groups} groups already"
        elif any(f"{name}.".startswith(f"{other}.") for other in ignored):
            note = "it is ignored"
        elif module.in_channels % smallest or module.out_channels % smallest:
            note = f"{module.in_channels} and {module.out_channels} channels are not multiples of {smallest}"
        else:
            note = ""
        notes[name] = note
    return notes


def _choices(layer: nn.Conv2d) -> list[int]:
    return [1, *(number for number in CHOICES if layer.in_channels % number == layer.out_channels % number == 0)]


def _divided(
    sites: Sequence[Site],
    found: Iterable[tuple[Site, tuple[Moments, Moments]]],
    layers: Mapping[str, Any],
    macs: Mapping[str, int],
    goal: Target,
) -> dict[str, int]:
    """Groups of each layer: where one more MAC saved costs the same share of the outputs' energy in all of them."""
    curves = {site.name: _curve(layers[site.name], moments) for site, moments in found}
    total, budget = sum(macs.values()), goal.value * sum(macs.values())

    def chosen(price: float) -> dict[str, int]:
        return {
            name: min(curve, key=lambda number, name=name: curve[number] + price * macs[name] / number)  # type: ignore[misc]
            for name, curve in curves.items()
        }

    def left(groups: Mapping[str, int]) -> float:
        return total - sum(macs[name] * (1 - 1 / number) for name, number in groups.items())

    low, high = 0.0, 1.0 / max(1, min(macs[name] for name in curves)) if curves else 1.0
    for _ in range(60):
        if left(chosen(high)) <= budget:
            break
        high *= 2
    else:
        least = left({name: max(curve) for name, curve in curves.items()}) / total
        raise InfeasibleTargetError(
            f"the target {goal} cannot be reached by groups: at least {least:.4f} of the MACs stay. Ask for more, or "
            "remove channels first. Nothing was changed."
        )
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if left(chosen(middle)) <= budget else (middle, high)
    return chosen(high)


def _curve(layer: nn.Conv2d, moments: tuple[Moments, Moments]) -> dict[int, float]:
    """The share of the energy of a layer's outputs that each number of groups costs it."""
    xx, yx = (moments[0] + moments[1]).centred(about_mean=True)
    start = layer.weight.detach().double().flatten(1)[None]
    mean = ridge(start, torch.ones_like(start, dtype=torch.bool), xx, yx, _DAMPING)
    precision = definite(xx, _DAMPING)
    costs = block_costs(mean[0], precision[0], layer.kernel_size[0] * layer.kernel_size[1])
    energy = float(((mean @ xx) * mean).sum())
    curve = {1: 0.0}
    for number in _choices(layer)[1:]:
        rows, columns = assign(costs, number)
        kept = (rows[:, None] == columns[None]).to(costs.device)
        curve[number] = float(costs[~kept].sum()) / max(energy, 1e-30)
    return curve


def _choose(
    layer: Any, number: int, orders: dict[str, tuple[Tensor, Tensor]], name: str, mean: Tensor, precision: Tensor
) -> Tensor:
    """Which weights (1, R, C) stay; notes the groups of rows and columns."""
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    rows, columns = orders[name] = assign(block_costs(mean[0], precision[0], taps), number)
    return (rows[:, None] == columns[None]).repeat_interleave(taps, dim=1)[None].to(mean.device)


def _between(dense: nn.Module, example_inputs: Any, names: Collection[str]) -> list[tuple[str, str, list[str]]]:
    """Pairs of these layers where the second alone reads the first, with the batch norms in between."""
    try:
        groups = find_groups(dense, example_inputs).groups
    except UnsupportedModelError:
        return []
    modules = dict(dense.named_modules())
    found = []
    for group in groups:
        axes = [member.axis for member in group.members]
        makers = [name for name, side in axes if side == "out" and name in names]
        readers = [name for name, side in axes if side == "in" and name in names]
        norms = [name for name, side in axes if side == "out" and name not in names]
        are_norms = all(isinstance(modules.get(name), nn.BatchNorm2d) for name in norms)
        is_in_order = all(
            member.size == group.num_channels and torch.equal(member.positions.roots, member.positions.places)
            for member in group.members
        )
        if len(makers) == len(readers) == 1 and len(axes) == 2 + len(norms) and are_norms and is_in_order:
            found.append((makers[0], readers[0], norms))
    return found


def _fold(model: nn.Module, pairs: Iterable[tuple[str, str, list[str]]]) -> None:
    """Gives the channels between two layers the order in which the second reads them."""
    for maker, reader, norms in pairs:
        first, second = model.get_submodule(maker), model.get_submodule(reader)
        assert isinstance(first, ShuffledConv2d), "it was replaced"
        assert isinstance(second, ShuffledConv2d), "it was replaced"
        order = second.inputs.clone()
        for norm in map(model.get_submodule, norms):
            for values in (*norm._parameters.values(), *norm._buffers.values()):
                if values is not None and values.dim():
                    values.copy_(values[order])
        first.order(first.inputs, first.outputs[order])
        second.order(torch.arange(len(order), device=order.device), second.outputs)


def _grouped(layer: Any, number: int, rows: Tensor, columns: Tensor) -> ShuffledConv2d:
    """The grouped convolution that computes what a layer does whose other weights are zeros."""
    made = ShuffledConv2d.like(layer, number)
    by_row, by_column = (groups.argsort(stable=True).to(layer.weight.device) for groups in (rows, columns))
    size = layer.in_channels // number
    own = by_column.view(number, size).repeat_interleave(layer.out_channels // number, dim=0)  # (O, I / g)
    made.weight.copy_(layer.weight[by_row[:, None], own])
    if layer.bias is not None:
        assert made.bias is not None, "it has the form of the layer"
        made.bias.copy_(layer.bias[by_row])
        made.bias.requires_grad_(layer.bias.requires_grad)
    made.order(by_column, by_row.argsort())
    return made


@contextmanager
def _replaced(model: nn.Module, made: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts modules in the places of those of these names, under all names they have; an error puts those back."""
    others = {id(model.get_submodule(name)): module for name, module in made.items()}
    before = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if id(module) in others]

    def put_back() -> None:
        for name, module in before:
            model.set_submodule(name, module)

    with undone_on_error(put_back):
        for name, module in before:
            model.set_submodule(name, others[id(module)])
        yield
