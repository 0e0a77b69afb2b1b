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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, nn
from tqdm import tqdm

from bayesprune.batches import device_of, on_device, split
from bayesprune.laplace.conditioning import conditional_mean
from bayesprune.laplace.flow import LayerCall, layer_calls
from bayesprune.laplace.kronecker import about, variational_layer
from bayesprune.laplace.matrices import (
    damped,
    drawn_positions,
    from_matrix,
    input_rows,
    is_matrix_product,
    output_rows,
    removed_columns,
    to_matrix,
)
from bayesprune.layers import VariationalLayer, variational_layers
from bayesprune.layers.drawn import DrawnLayer

_DAMPINGS = (1e-3, 1e-2, 1e-1)
"""Tried, as fractions of the mean diagonal of E[x~ x~^T]."""

_ROWS_PER_COLUMN = 128  # positions in all that a regression takes, for each of its columns
_MAX_COLUMNS = 8192  # above it a layer stays as it is
_MAX_PASSES = 64  # over the data; layers share one where there are more
_STEPS_AT_ONCE = 8  # whose dense outputs, at the chosen positions, are kept in memory
_SMALLEST_GAIN = 1e-2  # relative to a layer's largest: outputs that are multiplied by less correct no stream


@torch.no_grad()
def compensate(
    model: nn.Module,
    data: Iterable[Any],
    removed: Mapping[str, Sequence[int]],
    *,
    dense: nn.Module | None = None,
    damping: float | None = None,
    progress: bool = False,
) -> nn.Module:
    """Moves weights to make up for input channels that are about to go; in place, without training.

    The weights of those channels become zero, and every linear layer and convolution from the first that loses some is
    fitted to the dense model's outputs, see the module's text. Layers that are frozen, tied, not variational, inside
    `nn.MultiheadAttention`, or of more than 8,192 inputs times taps, stay as they are, without those channels.

    Cost: for each layer a forward over the data that ends there, and some C^3 + R C^2 multiplications for C inputs
    (times taps) and R outputs.

    Args:
        model: A variational model, uncut; evaluated at its means.
        data: Batches in any form that `bayesprune.batches` names; labels are not read. All are kept in memory.
        removed: Input channels (features) that go, by the layer that loses them.
        dense: The model whose outputs are fitted, of the same structure; None is the model as it is now.
        damping: How far each fit is held at the dense weights, as a fraction of the mean diagonal of E[x~ x~^T]; None
            chooses for each layer by a quarter of the examples.
        progress: Show a progress bar.

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
        ...     before_cut=functools.partial(bp.compensate, model, data),
        ... )
    """
    batches = [on_device(batch, device_of(model)) for batch in data]
    if not batches:
        raise ValueError("data has no batch; expected an iterable of input batches.")
    dense = copy.deepcopy(model) if dense is None else dense
    keeps = {name: _silence(model.get_submodule(name), lost) for name, lost in removed.items() if lost}
    steps = _steps(_sites(dense, batches[0], keeps))
    targets: dict[_Key, tuple[Size, Tensor]] = {}
    for number, step in enumerate(tqdm(steps, desc="Compensate", unit="step", disable=not progress)):
        if number % _STEPS_AT_ONCE == 0:
            window = [site for following in steps[number : number + _STEPS_AT_ONCE] for site in following]
            targets = _targets(dense, batches, window)
        moments = _moments(model, batches, step, targets)
        for site in step:
            if site.name in moments:
                _fit(model, dense, site, moments[site.name], keeps.get(site.name), damping)
    return model


_Key = tuple[int, str, int]
"""Number of a batch, name of a layer, and how often the layer ran before in the same forward."""


@dataclass
class _Site:
    """A layer to fit.

    Attributes:
        name: Its name.
        source: Identity of its input: layers with the same one are fitted together.
        norm: The batch norm that takes up its shift.
        num_calls: How often it runs in a forward.
        num_sums: How often its output is added to a stream.
    """

    name: str
    source: int
    norm: str | None
    num_calls: int = 0
    num_sums: int = 0


class _Moments:
    """Sums over positions of products of inputs (n, G, C) and targets (n, G, R), float64."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        x, y = inputs.transpose(0, 1), targets.transpose(0, 1)
        self.number = x.shape[1]
        self.xx, self.yx = torch.bmm(x.mT, x).double(), torch.bmm(y.mT, x).double()
        self.x, self.y = x.double().sum(1), y.double().sum(1)

    def __add__(self, other: "_Moments") -> "_Moments":
        total = copy.copy(self)
        for name, value in vars(other).items():
            setattr(total, name, getattr(self, name) + value)
        return total

    def centred(self, *, about_mean: bool) -> tuple[Tensor, Tensor]:
        """Means of x x^T (G, C, C) and y x^T (G, R, C), about the means where asked for."""
        xx, yx = self.xx / self.number, self.yx / self.number
        if about_mean:
            x, y = self.x / self.number, self.y / self.number
            xx, yx = about(xx, x), yx - y[:, :, None] * x[:, None]
        return xx, yx

    def less(self, bias: Tensor) -> "_Moments":
        """The moments with this (G, R) taken off every target."""
        other = copy.copy(self)
        other.yx, other.y = self.yx - bias[:, :, None] * self.x[:, None], self.y - self.number * bias
        return other


def _silence(layer: nn.Module, lost: Sequence[int]) -> Tensor | None:
    """Sets the weights of lost input channels to zero; which columns (G, C) of a matrix product are kept."""
    if not isinstance(layer, VariationalLayer) or not is_matrix_product(layer):
        return None
    gone = removed_columns(layer, list(lost))
    weight = layer.get_parameter("weight")
    weight.masked_fill_(from_matrix(layer, gone[:, None].expand_as(to_matrix(layer, weight))).to(weight.device), 0)
    return ~gone


def _sites(dense: nn.Module, batch: Any, losing: Collection[str]) -> list[_Site]:
    """Layers from the first that loses inputs, in the order in which they run first."""
    holders = Counter(id(p) for module in dense.modules() for p in module._parameters.values())
    layers = {
        name: layer
        for name, layer in variational_layers(dense)
        if not isinstance(layer, DrawnLayer)
        and is_matrix_product(layer)
        and holders[id(layer.weight)] == 1
        and layer.get_parameter("weight").requires_grad
        and to_matrix(layer, layer.get_parameter("weight")).shape[2] <= _MAX_COLUMNS
    }
    names = {id(module): name for name, module in dense.named_modules()}
    sites: dict[str, _Site] = {}
    for call in layer_calls(dense, batch, layers):
        if sites or call.name in losing:
            norm = None if call.norm is None else names[id(call.norm)]
            site = sites.setdefault(call.name, _Site(call.name, id(call.inputs), norm))
            site.num_calls += 1
            site.num_sums += call.addend is not None
            site.norm = norm if site.norm == norm else None
    return list(sites.values())


def _steps(sites: list[_Site]) -> list[list[_Site]]:
    """Layers that are fitted together: those with the same input, and neighbours where there are very many."""
    steps: list[list[_Site]] = []
    for site in sites:
        if steps and steps[-1][0].source == site.source:
            steps[-1].append(site)
        else:
            steps.append([site])
    size = max(1, math.ceil(len(steps) / _MAX_PASSES))
    return [[site for step in steps[start : start + size] for site in step] for start in range(0, len(steps), size)]


def _targets(dense: nn.Module, batches: list[Any], sites: list[_Site]) -> dict[_Key, tuple[Size, Tensor]]:
    """Of every run of these layers in the dense model the output's shape, and y + s / g at the chosen positions."""
    found: dict[_Key, tuple[Size, Tensor]] = {}
    for number, batch in enumerate(batches):
        num_examples = split(dense, batch).num_examples
        for key, call in _runs(dense, batch, number, sites):
            if not len(call.output) % num_examples:
                rows = _rows(call, call.output, num_examples, len(batches))
                found[key] = call.output.shape, rows + _stream_rows(call, num_examples, len(batches))
    return found


def _moments(
    model: nn.Module, batches: list[Any], step: list[_Site], targets: dict[_Key, tuple[Size, Tensor]]
) -> dict[str, tuple[_Moments, _Moments]]:
    """Of each layer, the moments of three quarters of the examples, and of the last quarter.

    A layer is missing where it does not meet what it meets in the dense model, as behind a router.
    """
    found: dict[str, tuple[_Moments, _Moments]] = {}
    misfits: set[str] = set()
    seen = 0
    for number, batch in enumerate(batches):
        num_examples = split(model, batch).num_examples
        is_check = torch.arange(seen, seen := seen + num_examples) % 4 == 3
        for key, call in _runs(model, batch, number, step):
            shape, target = targets.get(key, (None, None))
            if target is None or shape != call.output.shape:
                misfits.add(call.name)
                continue
            y = target - _stream_rows(call, num_examples, len(batches))
            x = _rows(call, call.inputs, num_examples, len(batches))
            parts = (_Moments(x[part].flatten(0, 1), y[part].flatten(0, 1)) for part in (~is_check, is_check))
            if call.name in found:
                parts = (old + new for old, new in zip(found[call.name], parts, strict=True))
            found[call.name] = (next(parts), next(parts))
    return {name: moments for name, moments in found.items() if name not in misfits}


def _runs(net: nn.Module, batch: Any, number: int, sites: list[_Site]) -> Iterator[tuple[_Key, LayerCall]]:
    """The runs of these layers in one forward, which ends with the last of them and its sum."""
    layers = {site.name: variational_layer(net, site.name) for site in sites}
    ends = {"num_calls": sum(site.num_calls for site in sites), "num_sums": sum(site.num_sums for site in sites)}
    before: Counter[str] = Counter()
    for call in layer_calls(net, batch, layers, **ends):
        yield (number, call.name, before[call.name]), call
        before[call.name] += 1


def _rows(call: LayerCall, values: Tensor, num_examples: int, num_batches: int) -> Tensor:
    """The run's inputs (N, T, G, C), or values of its output's shape (N, T, G, R), at drawn positions, float32."""
    layer = call.layer
    num_positions = call.output.numel() // (num_examples * call.output.shape[layer.feature_dim])
    num_columns = to_matrix(layer, layer.get_parameter("weight")).shape[2]
    number = max(1, math.ceil(_ROWS_PER_COLUMN * num_columns / (num_batches * num_examples)))
    chosen = drawn_positions(num_positions, number)
    rows = input_rows if values is call.inputs else output_rows
    return rows(layer, values.to(torch.promote_types(values.dtype, torch.float32)), num_examples, chosen)


def _stream_rows(call: LayerCall, num_examples: int, num_batches: int) -> Tensor | float:
    """s / g at the drawn positions, (N, T, G, R); 0 where the output meets no sum."""
    if call.addend is None:
        return 0.0
    stream = call.addend
    if call.gain is not None:
        stream = torch.where(call.gain.abs() > _SMALLEST_GAIN * call.gain.abs().max(), stream / call.gain, 0.0)
    return _rows(call, stream, num_examples, num_batches)


def _fit(
    model: nn.Module,
    dense: nn.Module,
    site: _Site,
    moments: tuple[_Moments, _Moments],
    keep: Tensor | None,
    damping: float | None,
) -> None:
    layer, stock = variational_layer(model, site.name), variational_layer(dense, site.name)
    weight = layer.get_parameter("weight")
    start = to_matrix(stock, stock.get_parameter("weight").detach()).double()
    kept = torch.ones(start.shape, dtype=torch.bool, device=start.device)
    if keep is not None:
        kept &= keep[:, None].to(kept.device)
    if (mask := layer.mask("weight", whole=True)) is not None:
        kept &= to_matrix(layer, mask)
    bias = layer._parameters.get("bias")
    takes_shift = (bias is not None and bias.requires_grad) or site.norm is not None
    fitted, check = moments
    if bias is not None and not takes_shift:
        fitted, check = (part.less(bias.detach().double().view(len(start), -1)) for part in moments)
    if damping is None:
        damping = _best_damping(start, kept, fitted, check, about_mean=takes_shift) if check.number else _DAMPINGS[1]
    total = fitted + check
    xx, yx = total.centred(about_mean=takes_shift)
    found = _ridge(start, kept, xx, yx, damping)
    weight.copy_(from_matrix(layer, found.to(weight.dtype)))
    shift = ((total.y - (found @ total.x[:, :, None])[..., 0]) / total.number).flatten()
    if bias is not None and bias.requires_grad:
        bias.copy_(shift)
    elif site.norm is not None:
        before = dense.get_submodule(site.norm).get_buffer("running_mean")
        model.get_submodule(site.norm)._buffers["running_mean"] = before - shift.to(before)


def _best_damping(start: Tensor, kept: Tensor, fitted: _Moments, check: _Moments, *, about_mean: bool) -> float:
    """The damping whose fit to the one part has the smallest squared error on the other."""
    xx, yx = fitted.centred(about_mean=about_mean)
    other_xx, other_yx = check.centred(about_mean=about_mean)

    def error(damping: float) -> float:
        found = _ridge(start, kept, xx, yx, damping)
        return float(((found @ other_xx) * found).sum() - 2 * (found * other_yx).sum())

    return min(_DAMPINGS, key=error)


def _ridge(start: Tensor, kept: Tensor, xx: Tensor, yx: Tensor, damping: float) -> Tensor:
    """Weights (G, R, C), zero where they are not kept, that fit best; damped towards `start`."""
    precision = damped(xx, damping)
    push = yx + (precision - xx).diagonal(dim1=1, dim2=2)[:, None] * start
    found = torch.zeros_like(start)
    for group, own in enumerate(kept):
        columns = own.any(0).nonzero()[:, 0]  # what no row keeps is zero in all, and needs no solution
        among = precision[group][columns][:, columns]
        free = torch.cholesky_solve(push[group][:, columns].mT, torch.linalg.cholesky(among)).mT
        found[group][:, columns] = conditional_mean(free, among, own[:, columns])
    return found
