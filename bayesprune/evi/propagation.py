"""Mean and covariance of the class probabilities in one pass, with the paper's covariance between positions.

Source: Dera et al. (MLSP 2019) and the authors' code. A kernel with weights N(M_k, s_k I) on patches X (P, R) of an
image gives a feature map with covariance s_k X X^T, of P^2 numbers a channel (42 MB for one MNIST image and 32
kernels). It is never formed here: kept is the factor X, once for all channels, with a scale for every position and
channel, so that

    Cov_k[p, q] = scale_p scale_q <X_row(p), X_row(q)> + [p = q] variance_p.

Activations (first order) multiply the scale, max-pooling gathers scale and row, and a linear layer contracts the
factor: the result is that of the P x P computation. As in the authors' code, channels are independent of each other,
and a second convolution sees only the diagonal of the covariance that comes in.

Shapes: N examples, K channels, *S their positions, P positions before pooling, R weights of a kernel, I / O features.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesprune.errors import UnsupportedModelError
from bayesprune.layers import VariationalLayer
from bayesprune.moments import parts, settings
from bayesprune.prediction.predict import sampling


class ClassMoments(NamedTuple):
    """Class probabilities under the posterior, to first order.

    Attributes:
        mean: (N, C), the softmax of the mean logits.
        covariance: (N, C, C), of rank C - 1 at most, since probabilities sum to one.
    """

    mean: Tensor
    covariance: Tensor


def propagate(model: nn.Module, x: Tensor, *, covariance: Literal["diagonal", "spatial"] = "diagonal") -> ClassMoments:
    """Mean and covariance of the class probabilities, by the paper's first-order rules; differentiable.

    With J = diag(p) - p p^T the softmax takes the covariance S of the logits to J S J^T.

    Args:
        model: A variational classifier whose output are logits (N, C). It runs in the mode that it is in.
        x: Inputs, certain.
        covariance: "diagonal": variances only, through any model that `bayesprune.moments` knows; logits are taken as
            uncorrelated. "spatial": the full covariance between the positions of each channel, and between logits,
            through an `nn.Sequential` of convolutions, activations, max-pooling, dropout and linear layers with one
            std per kernel.

    Raises:
        ValueError: the covariance is unknown or the model has no variational layer.
        UnsupportedModelError: "spatial", and the model is not such a chain.
        UnsupportedFunctionError: "diagonal", and the model calls a function that has no rule.
    """
    if covariance == "spatial":
        mean, logit_covariance = logit_moments(model, x)
    elif covariance == "diagonal":
        mean, logit_covariance = _diagonal(model, x)
    else:
        raise ValueError(f'covariance is {covariance!r}; expected "diagonal" or "spatial".')
    probabilities = mean.softmax(-1)
    slope = torch.diag_embed(probabilities) - probabilities.unsqueeze(2) * probabilities.unsqueeze(1)
    return ClassMoments(probabilities, slope @ logit_covariance @ slope)


def _diagonal(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    with sampling(model, "moments"), settings(covariance="diagonal", taylor=True):
        mean, variance, _ = parts(model(x))
    return mean, torch.diag_embed(torch.zeros_like(mean) if variance is None else variance)


ACTIVATIONS = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Softplus)
CERTAIN_STD = 1e-6  # below it a std is that of a parameter without uncertainty


class MapMoments(NamedTuple):
    """Feature maps with the covariance of the positions of each channel.

    Attributes:
        mean: (N, K, *S).
        patches: The factor's rows (N, P, R), the same for all channels.
        scale: Factor of each row, (N, K, *S).
        row: Row of `patches` that stands for each position, (N, K, *S); None: each its own.
        variance: Variance that no two positions share, (N, K, *S).
        is_flat: Whether the model has flattened the maps; the shapes here stay.
    """

    mean: Tensor
    patches: Tensor
    scale: Tensor
    row: Tensor | None
    variance: Tensor | None
    is_flat: bool = False


class VectorMoments(NamedTuple):
    """Features (N, I) with their covariance (N, I, I)."""

    mean: Tensor
    covariance: Tensor


State = Tensor | MapMoments | VectorMoments


def logit_moments(model: nn.Module, x: Tensor) -> VectorMoments:
    """Mean and covariance of a chain's output, (N, O) and (N, O, O).

    Args:
        model: `nn.Sequential`, nested as it may be, of Conv2d, elementwise activations, MaxPool2d, Dropout, Flatten and
            Linear; before its first variational layer anything.
        x: Certain inputs.

    Raises:
        UnsupportedModelError: the chain has another module after its first variational layer, or no linear layer.
    """
    state = _through(model, "", x)
    if not isinstance(state, VectorMoments):
        raise UnsupportedModelError(
            "the chain ends without an uncertain linear layer; expected features (N, O) from a Linear, with a "
            "variational layer in or before it."
        )
    return state


def _through(module: Any, name: str, state: State) -> State:
    # By exact type: a subclass may do more than its base, and would be passed over in silence.
    kind = _stock_type(module)
    if kind is nn.Sequential:
        for child, layer in module.named_children():
            state = _through(layer, f"{name}.{child}" if name else child, state)
        return state
    if isinstance(state, Tensor):
        if kind is type(module):
            return module(state)
        if kind is nn.Conv2d and state.dim() == 4:
            return _convolution(module, name, state)
        if kind is nn.Linear and state.dim() == 2:
            return _linear(module, state)
    elif kind in ACTIVATIONS:
        return _scaled(state, *_value_and_slope(module, state.mean))
    elif kind is nn.Dropout:
        kept = F.dropout(torch.ones_like(state.mean), module.p, module.training)
        return _scaled(state, state.mean * kept, kept)
    elif kind is nn.Identity:
        return state
    elif isinstance(state, VectorMoments) or state.is_flat:
        if kind is nn.Linear:
            return _linear(module, state) if isinstance(state, VectorMoments) else _linear_of_maps(module, state)
    elif kind is nn.Conv2d:
        return _convolution(module, name, state)
    elif kind is nn.MaxPool2d:
        return _max_pool(module, name, state)
    elif kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return state._replace(is_flat=True)
    raise UnsupportedModelError(
        f"spatial covariance has no rule for {name or '(model)'} ({type(module).__name__}) here; expected "
        "nn.Sequential of Conv2d, activations, MaxPool2d, Dropout, Flatten() and Linear, in an order that the paper's "
        'rules know. covariance="diagonal" takes any model that bayesprune.moments knows.'
    )


def _convolution(layer: nn.Conv2d, name: str, x: Tensor | MapMoments) -> State:
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise UnsupportedModelError(
            f"{name} has groups={layer.groups}, padding={layer.padding!r}, padding_mode={layer.padding_mode!r}; the "
            "spatial covariance is for one group and a padding of zeros in numbers."
        )
    weight, std, bias, bias_variance = _weights(layer)
    if bias_variance is not None and float(bias_variance.detach().max()) > CERTAIN_STD**2:
        raise UnsupportedModelError(
            f"the bias of {name} is uncertain; the paper's biases are not: convert with bayesprune.evi.convert."
        )
    options: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    mean_in = x if isinstance(x, Tensor) else x.mean
    mean = F.conv2d(mean_in, weight, bias, **options)
    patches = F.unfold(mean_in, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)
    scale = std.reshape(1, -1, 1, 1).expand_as(mean)
    if isinstance(x, Tensor):
        return MapMoments(mean, patches, scale, None, None)
    variance_in = _variance(x)
    box = torch.ones_like(weight[:1, :1])
    patch_sums = F.conv2d(variance_in.sum(1, keepdim=True), box, **options)
    variance = F.conv2d(variance_in, weight.square(), **options) + scale.square() * patch_sums
    return MapMoments(mean, patches, scale, None, variance)


def _linear(layer: nn.Linear, x: Tensor | VectorMoments) -> VectorMoments:
    weight, std, bias, bias_variance = _weights(layer)
    mean_in, covariance_in = x if isinstance(x, VectorMoments) else (x, None)
    energy = mean_in.square().sum(1)
    if covariance_in is not None:
        energy = energy + covariance_in.diagonal(dim1=1, dim2=2).sum(1)
    covariance = _own_noise(energy, std, bias_variance)
    if covariance_in is not None:
        covariance = covariance + weight @ covariance_in @ weight.T
    return VectorMoments(F.linear(mean_in, weight, bias), covariance)


def _linear_of_maps(layer: nn.Linear, x: MapMoments) -> VectorMoments:
    """W Cov W^T by channel, as the square of (W * scale) patches: N K P R O products."""
    weight, std, bias, bias_variance = _weights(layer)
    num, channels = x.mean.shape[:2]
    by_channel = weight.reshape(len(weight), channels, -1).transpose(0, 1).contiguous()  # (K, O, S)
    rows, scale = _rows(x), x.scale.reshape(num, channels, 1, -1)
    factor = (by_channel * scale) @ rows  # (N, K, O, R)
    factor = factor.transpose(1, 2).flatten(2)
    energy = (x.mean.square() + _variance(x)).flatten(1).sum(1)
    covariance = factor @ factor.transpose(1, 2) + _own_noise(energy, std, bias_variance)
    if x.variance is not None:
        covariance = covariance + (weight * x.variance.flatten(1).unsqueeze(1)) @ weight.T
    return VectorMoments(F.linear(x.mean.flatten(1), weight, bias), covariance)


def _max_pool(layer: nn.MaxPool2d, name: str, x: MapMoments) -> MapMoments:
    kernel, stride, dilation = (_pair(size) for size in (layer.kernel_size, layer.stride, layer.dilation))
    if dilation != (1, 1) or any(step < size for step, size in zip(stride, kernel, strict=True)):
        raise UnsupportedModelError(
            f"the windows of {name} overlap (kernel {kernel}, stride {stride}, dilation {dilation}); the spatial "
            "covariance is for windows apart from each other."
        )
    options: dict[str, Any] = {"stride": stride, "padding": layer.padding, "ceil_mode": layer.ceil_mode}
    mean, chosen = F.max_pool2d(x.mean, kernel, **options, return_indices=True)

    def gathered(values: Tensor) -> Tensor:
        return values.flatten(2).gather(2, chosen.flatten(2)).reshape(mean.shape)

    row = chosen if x.row is None else gathered(x.row)
    return MapMoments(mean, x.patches, gathered(x.scale), row, None if x.variance is None else gathered(x.variance))


def _value_and_slope(function: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """f(x) and f'(x) of an elementwise function, differentiable where x is."""
    is_differentiable = x.requires_grad and torch.is_grad_enabled()
    with torch.enable_grad():
        point = x if is_differentiable else x.detach().requires_grad_()
        value = function(point.clone())  # it may work in place
        (slope,) = torch.autograd.grad(value.sum(), point, create_graph=is_differentiable)
    return value if is_differentiable else value.detach(), slope


def _scaled(x: MapMoments | VectorMoments, mean: Tensor, slope: Tensor) -> MapMoments | VectorMoments:
    """A first-order function: deviations are multiplied by the slope."""
    if isinstance(x, VectorMoments):
        return VectorMoments(mean, x.covariance * slope.unsqueeze(1) * slope.unsqueeze(2))
    variance = None if x.variance is None else x.variance * slope.square()
    return x._replace(mean=mean, scale=x.scale * slope, variance=variance)


def _variance(x: MapMoments) -> Tensor:
    """The diagonal of the covariance, (N, K, *S)."""
    norms = x.patches.square().sum(2)
    if x.row is None:
        norms = norms.reshape(len(norms), 1, *x.mean.shape[2:])
    else:
        norms = norms.gather(1, x.row.flatten(1)).reshape(x.row.shape)
    shared = x.scale.square() * norms
    return shared if x.variance is None else shared + x.variance


def _rows(x: MapMoments) -> Tensor:
    """The factor's rows by position, (N, K, S, R), or (N, 1, S, R) where channels have the same."""
    if x.row is None:
        return x.patches.unsqueeze(1)
    num, size, width = x.patches.shape
    first = size * torch.arange(num, device=x.row.device).reshape(-1, 1, 1)
    return F.embedding(x.row.flatten(2) + first, x.patches.reshape(num * size, width))


def _own_noise(energy: Tensor, std: Tensor, bias_variance: Tensor | None) -> Tensor:
    """diag(s_o energy), (N, O, O): what the noise of a layer's own weights adds."""
    variance = energy.unsqueeze(1) * std.square()
    return torch.diag_embed(variance if bias_variance is None else variance + bias_variance)


def _weights(layer: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Means, std of each output unit (O), bias and its variance; a layer without posterior has stds of zero."""
    if not isinstance(layer, VariationalLayer):
        return layer.weight, layer.weight.new_zeros(len(layer.weight)), layer.bias, None
    if layer.std != "per_channel" or layer.masked_names():
        found = "single weights removed" if layer.masked_names() else f"{layer.std!r} stds"
        raise UnsupportedModelError(
            f"a layer has {found}; the spatial covariance is for one std per kernel: convert with "
            "bayesprune.evi.convert."
        )
    posteriors = layer.posteriors()
    weight, bias = posteriors["weight"], posteriors.get("bias")
    std = weight.std.flatten().to(weight.mean.dtype)
    if bias is None:
        return weight.mean, std, layer.bias, None
    return weight.mean, std, bias.mean, bias.std.to(bias.mean.dtype).square()


def _stock_type(module: nn.Module) -> type[nn.Module]:
    return module.stock_type if isinstance(module, VariationalLayer) else type(module)


def _pair(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)
