"""Compensation layer by layer: each layer is fitted to what the dense model computes, from what it is given itself.

Layers are visited in forward order. With x~ the input that a layer has behind those that are cut and fitted by now, and
y its output in the dense model on the same data, the weights that stay are the ridge regression

    W = argmin  E |y + (s - s~) / g - W x~ - b|^2  +  damping |W - W_dense|^2,

where s is what the layer's output is added to in the dense model (the stream of a residual network), s~ the same here,
and g what the output is multiplied by on the way. So a layer makes up for the inputs that it lost, and for what layers
before it could not make up for. The shift b goes into the bias, or into the mean of the batch norm behind; with neither
the fit has none. The damping of each layer is the one with which three quarters of the examples predict the last best.

Regression on the dense outputs: Frantar & Alistarh (2022), Kwon et al. (2022, one number a unit), in sequence.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bayesprune.foundation.batches import Batch, device_of, on_device, split
from bayesprune.foundation.model import eval_mode
from bayesprune.laplace.calibration import counted_positions
from bayesprune.laplace.flow import LayerCall, Walk, layer_calls, watched
from bayesprune.laplace.kronecker import variational_layer
from bayesprune.laplace.matrices import (
    drawn_positions,
    from_matrix,
    input_rows,
    is_matrix_product,
    output_rows,
    removed_columns,
    to_matrix,
)
from bayesprune.laplace.regression import DAMPINGS, Moments, best_damping, ridge
from bayesprune.layers import VariationalLayer, variational_layers
from bayesprune.layers.drawn import DrawnLayer

_ROWS_PER_COLUMN = 32  # positions in all that a regression takes, for each of its columns
_MAX_COLUMNS = 8192  # above it a layer stays as it is
_MAX_HELD = 4 * 2**30  # bytes that forwards over all batches hold while they wait for a layer
_LIVE = 3  # times the input and output of a layer are alive in a forward, at most as a rule
_MAX_PASSES = 64  # over the data from the start; layers share one where there are more
_PLENTY = 16  # positions for each that is drawn, from where a quarter of the examples is enough
_SMALLEST_GAIN = 1e-2  # relative to a layer's largest: outputs that are multiplied by less correct no stream


@torch.no_grad()
def compensate(
    model: nn.Module,
    data: Iterable[Any],
    removed: Mapping[str, Sequence[int]],
    *,
    dense: nn.Module | None = None,
    damping: float | None = None,
    progress: bool | None = False,
) -> nn.Module:
    """Moves weights to make up for input channels that are about to go; in place, without training.

    The weights of those channels become zero, and every linear layer and convolution from the first that loses some is
    fitted to the dense model's outputs, see the module's text. Layers that are frozen, tied, not variational, inside
    `nn.MultiheadAttention`, or of more than 8,192 inputs times taps, stay as they are, without those channels.

    Cost: some three forwards over the data, which wait behind each layer until it is fitted and take 4 GiB of memory at
    most meanwhile; layers whose activations take more cost forwards of their own up to them. For each layer some
    C^3 + R C^2 multiplications for C inputs (times taps) and R outputs.

    Args:
        model: A variational model, uncut; evaluated at its means.
        data: Batches in any form that `bayesprune.foundation.batches` names; labels are not read. All are kept in
            memory. Positions that an `attention_mask` excludes do not count.
        removed: Input channels (features) that go, by the layer that loses them.
        dense: The model whose outputs are fitted, of the same structure; None is the model as it is now.
        damping: How far each fit is held at the dense weights, as a fraction of the mean diagonal of E[x~ x~^T]; None
            chooses for each layer by a quarter of the examples.
        progress: Show a progress bar; None shows it on a terminal.

    Raises:
        ValueError: there is no batch.

    Example:
        >>> import functools, torch, torch_pruning as tp, bayesprune as bp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = bp.to_variational(model)
        >>> data = [torch.randn(32, 4)]
        >>> report = bp.prune_channels(
        ...     model,
        ...     data[0],
        ...     "macs=0.5",
        ...     importance=tp.importance.MagnitudeImportance(),
        ...     before_cut=functools.partial(bp.laplace.compensate, model, data),
        ... )
    """
    batches = [on_device(batch, device_of(model)) for batch in data]
    if not batches:
        raise ValueError("data has no batch; expected an iterable of input batches.")
    dense = copy.deepcopy(model) if dense is None else dense
    keeps = {name: _silence(model.get_submodule(name), lost) for name, lost in removed.items() if lost}
    layers = _layers(dense)
    sites = _sites(dense, batches, keeps, layers)
    steps = _steps(sites, len(batches))
    forwards = _Forwards(model, dense, batches, sites)
    same = {name: variational_layer(model, name) for name in layers}
    is_hidden = None if progress is None else not progress
    with eval_mode(model), eval_mode(dense), watched(layers), watched(same), closing(forwards):
        for step in tqdm(steps, desc="Compensate", unit="layer", disable=is_hidden, leave=False):
            for name, moments in forwards.moments(step).items():
                shift = _fit(model, dense, step.sites[name], moments, keeps.get(name), damping)
                forwards.change(shift)
    return model


@dataclass
class _Site:
    """A layer to fit.

    Attributes:
        name: Its name.
        source: Identity of its input: layers with the same one are fitted together.
        norm: The batch norm that takes up its shift.
        num_bytes: Of its largest input and output, for one batch.
        num_positions: At which an example meets it in a run.
        num_drawn: How many of these a regression takes, of as many examples as there are.
        columns: Which columns some row keeps.
        num_calls: How often it runs in a forward.
        num_sums: How often its output is added to a stream.
    """

    name: str
    source: int
    norm: str | None
    num_bytes: int
    num_positions: int
    num_drawn: int
    columns: Tensor
    num_calls: int = 0
    num_sums: int = 0

    @property
    def is_at_sum(self) -> bool:
        """Whether it is fitted where its output is added to a stream."""
        return self.num_sums == self.num_calls


@dataclass
class _Step:
    """Layers that are fitted together.

    Attributes:
        sites: Them, by name.
        num_batches: How many batches fit them.
        is_held: Whether the forwards of both models wait for them, and go on.
    """

    sites: dict[str, _Site]
    num_batches: int
    is_held: bool


def _silence(layer: nn.Module, lost: Sequence[int]) -> Tensor | None:
    """Sets the weights of lost input channels to zero; which columns (G, C) of a matrix product are kept."""
    if not isinstance(layer, VariationalLayer) or not is_matrix_product(layer):
        return None
    gone = removed_columns(layer, list(lost))
    weight = layer.get_parameter("weight")
    weight.masked_fill_(from_matrix(layer, gone[:, None].expand_as(to_matrix(layer, weight))).to(weight.device), 0)
    return ~gone


def _layers(dense: nn.Module) -> dict[str, VariationalLayer]:
    """Layers that can be fitted."""
    holders = Counter(id(p) for module in dense.modules() for p in module._parameters.values())
    return {
        name: layer
        for name, layer in variational_layers(dense)
        if not isinstance(layer, DrawnLayer)
        and is_matrix_product(layer)
        and holders[id(layer.weight)] == 1
        and layer.get_parameter("weight").requires_grad
        and _num_columns(layer) <= _MAX_COLUMNS
    }


def _num_columns(layer: VariationalLayer) -> int:
    return to_matrix(layer, layer.get_parameter("weight")).shape[2]


def _sites(
    dense: nn.Module, batches: list[Any], keeps: Mapping[str, Tensor | None], layers: dict[str, VariationalLayer]
) -> list[_Site]:
    """Layers from the first that loses inputs, in the order in which they are to be fitted."""
    names = {id(module): name for name, module in dense.named_modules()}
    num_examples = split(dense, batches[0]).num_examples
    sites: dict[str, _Site] = {}
    for call in layer_calls(dense, batches[0], layers):
        if not sites and call.name not in keeps:
            continue
        norm = None if call.norm is None else names[id(call.norm)]
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in (call.inputs, call.output))
        drawn = math.ceil(_ROWS_PER_COLUMN * _num_columns(call.layer) / (len(batches) * num_examples))
        positions = _num_positions(call, num_examples)
        keep = keeps.get(call.name)
        columns = torch.arange(_num_columns(call.layer)) if keep is None else keep.any(0).nonzero()[:, 0]
        fresh = _Site(call.name, id(call.inputs), norm, num_bytes, positions, drawn, columns)
        site = sites.setdefault(call.name, fresh)
        site.num_calls += 1
        site.num_sums += call.addend is not None
        site.norm = norm if site.norm == norm else None
        site.num_bytes = max(site.num_bytes, num_bytes)
    return list(sites.values())


def _steps(sites: list[_Site], num_batches: int) -> list[_Step]:
    """Each layer by itself where forwards can wait for it, else those with the same input, and neighbours of many."""
    steps: list[_Step] = []
    held = [site.num_calls == 1 and 2 * _LIVE * site.num_bytes * num_batches <= _MAX_HELD for site in sites]
    most = max(1, math.ceil(held.count(False) / _MAX_PASSES))
    for site, is_held in zip(sites, held, strict=True):
        is_plenty = not is_held and site.num_positions >= _PLENTY * site.num_drawn
        number = math.ceil(num_batches / 4) if is_plenty else num_batches
        last = steps[-1] if steps and not steps[-1].is_held and not is_held else None
        if last and (len(last.sites) < most or next(iter(last.sites.values())).source == site.source):
            last.sites[site.name] = site
            last.num_batches = max(last.num_batches, number)
        else:
            steps.append(_Step({site.name: site}, number, is_held))
    return steps


class _Forwards:
    """Forwards of the model and of the dense one over all batches, side by side."""

    def __init__(self, model: nn.Module, dense: nn.Module, batches: list[Any], sites: list[_Site]) -> None:
        self._model, self._dense, self._batches = model, dense, batches
        self._at_sum = [site.name for site in sites if site.is_at_sum]
        self._pairs: dict[int, tuple[Walk, Walk]] = {}

    def moments(self, step: _Step) -> dict[str, tuple[Moments, Moments]]:
        """Of each layer of a step, the moments of three quarters of the examples, and of the last quarter.

        A layer is missing where it does not meet what it meets in the dense model, as behind a router.
        """
        found: dict[str, tuple[Moments, Moments]] = {}
        misfits: set[str] = set()
        seen = 0
        for number, batch in enumerate(self._batches[: step.num_batches]):
            inputs = split(self._model, batch)
            num_examples = inputs.num_examples
            is_check = torch.arange(seen, seen := seen + num_examples) % 4 == 3
            for site in step.sites.values():
                for _ in range(site.num_calls):
                    call, stock = (walk.advance(site.name) for walk in self._pair(number))
                    if not call or not stock or not _is_alike(call, stock, num_examples):
                        misfits.add(site.name)
                    else:
                        x, y, counted = _regression_rows(call, stock, site, inputs, step.num_batches)
                        if site.name not in found:
                            sizes = (x.shape[2], y.shape[3], x.shape[3])
                            found[site.name] = Moments(*sizes, x.device), Moments(*sizes, x.device)
                        for moments, part in zip(found[site.name], (~is_check, is_check), strict=True):
                            rows = part.to(x.device)[:, None] & counted
                            moments.add(x[rows], y[rows])
            if not step.is_held:
                self._close(number)
        if not step.is_held:
            self.close()
        for moments in (each for pair in found.values() for each in pair):
            moments.finish()
        return {name: moments for name, moments in found.items() if name not in misfits}

    def change(self, shift: Tensor | None) -> None:
        """Makes forwards that wait go on with the layer as it is now; see `Walk.change`."""
        for walk, _ in self._pairs.values():
            walk.change(shift)

    def close(self) -> None:
        """Ends all forwards."""
        for number in list(self._pairs):
            self._close(number)

    def _pair(self, number: int) -> tuple[Walk, Walk]:
        if number in self._pairs and any(walk.is_over for walk in self._pairs[number]):
            self._close(number)
        if number not in self._pairs:
            batch = self._batches[number]
            self._pairs[number] = Walk(self._model, batch, self._at_sum), Walk(self._dense, batch, self._at_sum)
        return self._pairs[number]

    def _close(self, number: int) -> None:
        for walk in self._pairs.pop(number, ()):
            walk.close()


def _is_alike(call: LayerCall, stock: LayerCall, num_examples: int) -> bool:
    """Whether the layer meets as many positions of each example as in the dense model, one at least."""
    shape = call.output.shape
    return shape == stock.output.shape and shape.numel() > 0 and shape[0] % num_examples == 0


def _regression_rows(
    call: LayerCall, stock: LayerCall, site: _Site, batch: Batch, num_batches: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs that stay (N, T, G, C), y + (s - s~) / g, (N, T, G, R), and which count (N, T), at drawn positions."""
    num_examples = batch.num_examples
    num_positions = _num_positions(call, num_examples)
    number = max(1, math.ceil(_ROWS_PER_COLUMN * _num_columns(call.layer) / (num_batches * num_examples)))
    chosen = drawn_positions(num_positions, number)
    x = input_rows(call.layer, _wide(call.inputs), num_examples, chosen)
    y = output_rows(call.layer, _wide(stock.output), num_examples, chosen)
    for stream, sign in ((_stream(stock), 1), (_stream(call), -1)):
        if stream is not None:
            y = y + sign * output_rows(call.layer, _wide(stream), num_examples, chosen)
    counted = counted_positions(batch, num_positions)
    if counted is None:
        counted = torch.ones(num_examples, num_positions, dtype=torch.bool)
    counted = counted if chosen is None else counted[:, chosen.to(counted.device)]
    return x[..., site.columns.to(x.device)], y, counted.to(x.device)


def _num_positions(call: LayerCall, num_examples: int) -> int:
    return call.output.numel() // (num_examples * call.output.shape[call.layer.feature_dim])


def _wide(values: Tensor) -> Tensor:
    """The values in float32 at least."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _stream(call: LayerCall) -> Tensor | None:
    """s / g, of the output's shape; None where the output meets no sum."""
    if call.addend is None or call.gain is None:
        return call.addend
    is_large = call.gain.abs() > _SMALLEST_GAIN * call.gain.abs().max()
    return torch.where(is_large, call.addend / call.gain, 0.0)


def _fit(
    model: nn.Module,
    dense: nn.Module,
    site: _Site,
    moments: tuple[Moments, Moments],
    keep: Tensor | None,
    damping: float | None,
) -> Tensor | None:
    """Moves a layer's weights, and the shift; returns what the mean of a batch norm has become smaller by."""
    layer, stock = variational_layer(model, site.name), variational_layer(dense, site.name)
    weight = layer.get_parameter("weight")
    start = to_matrix(stock, stock.get_parameter("weight").detach()).double()
    kept = torch.ones(start.shape, dtype=torch.bool, device=start.device)
    if keep is not None:
        kept &= keep[:, None].to(kept.device)
    whole = torch.zeros_like(start)
    if (mask := layer.mask("weight", whole=True)) is not None:
        kept &= to_matrix(layer, mask)
    start, kept = start[..., site.columns], kept[..., site.columns]
    bias = layer._parameters.get("bias")
    takes_shift = (bias is not None and bias.requires_grad) or site.norm is not None
    fitted, check = moments
    if bias is not None and not takes_shift:
        fitted, check = (part.less(bias.detach().double().view(len(start), -1)) for part in moments)
    if damping is None:
        damping = best_damping(start, kept, fitted, check, about_mean=takes_shift) if check.number else DAMPINGS[1]
    total = fitted + check
    xx, yx = total.centred(about_mean=takes_shift)
    found = ridge(start, kept, xx, yx, damping)
    whole[..., site.columns] = found
    weight.copy_(from_matrix(layer, whole.to(weight.dtype)))
    shift = ((total.y - (found @ total.x[:, :, None])[..., 0]) / total.number).flatten()
    if bias is not None and bias.requires_grad:
        bias.copy_(shift)
        return None
    if site.norm is None:
        return None
    before = dense.get_submodule(site.norm).get_buffer("running_mean")
    model.get_submodule(site.norm)._buffers["running_mean"] = before - shift.to(before)
    return shift
