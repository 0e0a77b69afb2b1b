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
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.foundation.batches import with_examples
from bayesprune.foundation.kinds import kind_of
from bayesprune.foundation.model import restored_on_error
from bayesprune.foundation.sharding import check_whole
from bayesprune.laplace.kronecker import variational_layer
from bayesprune.laplace.matrices import (
    definite,
    input_weight,
    is_matrix_product,
    removed_columns,
    silenced,
    to_matrix,
)
from bayesprune.laplace.regression import DAMPINGS, Moments, best_damping, ridge
from bayesprune.laplace.sequence import fit_in_sequence
from bayesprune.laplace.sites import Site, fittable_experts, fittable_layers, sites_of
from bayesprune.layers import VariationalLayer

ROWS_PER_COLUMN = 32
"""Positions in all that a regression takes, for each of its columns."""


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

    The weights of those channels become zero, in layers of any kind, and every linear layer and convolution from the
    first layer that loses some is fitted to the dense model's outputs, see the module's text. So are the matrices with
    which stacked experts read their hidden units, each by the tokens that the dense model's router sends to its expert.
    Transposed convolutions, and layers that are frozen, tied, not variational, inside `nn.MultiheadAttention`, with
    gates on their weights, or of more than 8,192 inputs times taps, stay as they are, without those channels.

    Cost: some three forwards over the data, which wait behind each layer until it is fitted and take 4 GiB of memory at
    most meanwhile; layers whose activations take more cost forwards of their own up to them. For each layer some
    C^3 + R C^2 multiplications for C inputs (times taps) and R outputs. E experts cost two gradients of their matrices
    for each R of 16 C rows, one pair at least for each batch, and 16 E C (C + R) bytes.

    Args:
        model: A variational model, uncut; evaluated at its means.
        data: Batches in any form that `bayesprune.foundation.batches` names; labels are not read. All are kept in
            memory. Positions that an `attention_mask` excludes do not count.
        removed: Input channels (features) that go, by the layer that loses them.
        dense: The model whose outputs are fitted, of the same structure; None is the model as it is now, and an error
            then leaves its values as they were.
        damping: How far each fit is held at the dense weights, as a fraction of the mean diagonal of E[x~ x~^T]; None
            chooses for each layer by a quarter of the examples.
        progress: Show a progress bar; None shows it on a terminal.

    Raises:
        ValueError: there is no batch, the attention masks hide all positions, or what a layer is given or gives is not
            finite.
        UnsupportedModelError: the model is sharded over processes.

    Examples:
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
    check_whole(model, "compensate")
    batches = list(with_examples(model, data))
    if not batches:
        raise ValueError("data has no batch; expected an iterable of input batches.")
    if dense is None:
        dense = copy.deepcopy(model)
        with restored_on_error(model, dense):
            return compensate(model, batches, removed, dense=dense, damping=damping, progress=progress)
    keeps = {name: _kept_columns(model.get_submodule(name), lost) for name, lost in removed.items() if lost}
    for layer, lost in ((model.get_submodule(name), removed[name]) for name in keeps):
        input_weight(layer).copy_(silenced(layer, lost))
    layers = fittable_layers(dense) | fittable_experts(dense)
    sites = sites_of(dense, batches, layers, rows_per_column=ROWS_PER_COLUMN, keeps=keeps)

    def fit(site: Site, moments: tuple[Moments, Moments]) -> Tensor | None:
        keep = keeps.get(site.name)
        return refit(model, dense, site, moments, kept=None if keep is None else keep[:, None], damping=damping)

    fit_in_sequence(model, dense, batches, sites, fit, progress=progress)
    return model


def _kept_columns(layer: nn.Module, lost: Sequence[int]) -> Tensor | None:
    """Which columns (G, C) are kept without these input channels; None for layers that are not fitted."""
    if not isinstance(layer, VariationalLayer) or not (is_matrix_product(layer) or kind_of(layer).num_stacked):
        return None
    return ~removed_columns(layer, list(lost))


Choose = Callable[[Tensor, Tensor], Tensor]
"""choose(mean, precision): which weights (G, R, C) stay, of those that fit best where all stay."""

Settle = Callable[[Tensor, Tensor], Tensor]
"""settle(weights, xx): what weights (G, R, C) that fit best become, rounded say; xx (G, C, C) is E[x x^T] of inputs."""


def refit(
    model: nn.Module,
    dense: nn.Module,
    site: Site,
    moments: tuple[Moments, Moments],
    *,
    kept: Tensor | None = None,
    choose: Choose | None = None,
    settle: Settle | None = None,
    damping: float | None = None,
) -> Tensor | None:
    """Moves a matrix, and the shift of its layer; returns what the mean of a batch norm has become smaller by.

    Args:
        model: What is changed. Weights that a mask has removed stay zero.
        dense: The model as it was.
        site: The matrix.
        moments: Of three quarters of the examples, and of the last quarter.
        kept: Which weights may stay, of a shape that broadcasts to (G, R, C); None is all.
        choose: Says which of them do; None keeps them.
        settle: Says what they become before the shift takes up the mean of what is left; None is what fits best.
        damping: See `compensate`.
    """
    layer, stock = variational_layer(model, site.name), variational_layer(dense, site.name)
    weight = layer.get_parameter(site.parameter)
    start = to_matrix(stock, stock.get_parameter(site.parameter).detach()).double()
    stays = torch.ones(start.shape, dtype=torch.bool, device=start.device)
    if kept is not None:
        stays &= kept.to(stays.device)
    whole = torch.zeros_like(start)
    if (mask := layer.mask(site.parameter, whole=True)) is not None:
        stays &= to_matrix(layer, mask)
    start, stays = start[..., site.columns], stays[..., site.columns]
    bias = layer._parameters.get("bias")
    takes_shift = (bias is not None and bias.requires_grad) or site.norm is not None
    fitted, check = moments
    if bias is not None and not bias.requires_grad:
        fitted, check = (part.less(bias.detach().double().view(len(start), -1)) for part in moments)
    total = fitted + check
    xx, yx = total.centred(about_mean=takes_shift)
    if damping is None:
        both = fitted.number and check.number
        damping = best_damping(start, stays, fitted, check, about_mean=takes_shift) if both else DAMPINGS[1]
    if choose is not None:
        free = ridge(start, stays, xx, yx, damping)
        stays &= choose(free, definite(xx, damping)).to(stays.device)
    found = ridge(start, stays, xx, yx, damping)
    if settle is not None:
        found = settle(found, xx)
    whole[..., site.columns] = found
    weight.copy_(kind_of(layer).from_matrices(whole.to(weight.dtype), weight.shape))
    shift = ((total.y - (found @ total.x[:, :, None])[..., 0]) / total.number).flatten()
    if bias is not None and bias.requires_grad:
        bias.copy_(shift)
        return None
    if site.norm is None:
        return None
    before = dense.get_submodule(site.norm).get_buffer("running_mean")
    model.get_submodule(site.norm)._buffers["running_mean"] = before - shift.to(before)
    return shift
