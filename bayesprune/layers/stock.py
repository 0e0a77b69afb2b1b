"""The variational forms of torch's own layers.

`operation` is written out for each so that `torch.compile` sees plain functions; a layer of another library needs only
a registered class, since the default `operation` runs the stock forward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from bayesprune.estimators import Gradients
from bayesprune.layers.base import VariationalLayer, register_layer
from bayesprune.layers.drawn import DrawnLayer

Needed = tuple[bool, bool]


@register_layer(nn.Linear)
class VariationalLinear(VariationalLayer, nn.Linear):
    """Linear layer with a posterior over weight (O, I) and bias (O)."""

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x weight^T + bias."""
        return F.linear(x, weight, bias)

    def pullback(self, gradient: Tensor, x: Tensor, weight: Tensor, needed: Needed) -> Gradients:
        """Two products."""
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_x = gradient @ weight if needed[0] else None
        return of_x, rows.t() @ x.reshape(-1, x.shape[-1]) if needed[1] else None

    def meets_one_position(self, x: Tensor) -> bool:
        """An input of (N, I), not of tokens (N, T, I)."""
        return x.dim() <= 2


class _VariationalConv(VariationalLayer, _ConvNd):
    """What convolutions share: weight (O, I / groups, *K), input (N, I, *spatial)."""

    def meets_one_position(self, x: Tensor) -> bool:
        """An input of one pixel, as in squeeze-and-excitation blocks."""
        return all(size == 1 for size in x.shape[-len(self.kernel_size) :])


class _VariationalForwardConv(_VariationalConv):
    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution, padding mode included."""
        return self._conv_forward(x, weight, bias)  # type: ignore[attr-defined]

    def pullback(self, gradient: Tensor, x: Tensor, weight: Tensor, needed: Needed) -> Gradients | None:
        """Two convolutions, where zeros are padded alike on both sides."""
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return None
        shape = (self.stride, self.padding, self.dilation, False, [0] * len(self.kernel_size), self.groups)
        is_batched = x.dim() > len(self.kernel_size) + 1
        tensors = (gradient, x) if is_batched else (gradient.unsqueeze(0), x.unsqueeze(0))
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(*tensors, weight, None, *shape, (*needed, False))
        return of_x if is_batched or of_x is None else of_x.squeeze(0), of_weight


@register_layer(nn.Conv1d)
class VariationalConv1d(_VariationalForwardConv, nn.Conv1d):
    """1-D convolution with a posterior over weight (O, I / groups, K) and bias (O)."""


@register_layer(nn.Conv2d)
class VariationalConv2d(_VariationalForwardConv, nn.Conv2d):
    """2-D convolution with a posterior over weight (O, I / groups, K, K) and bias (O)."""


@register_layer(nn.Conv3d)
class VariationalConv3d(_VariationalForwardConv, nn.Conv3d):
    """3-D convolution with a posterior over weight (O, I / groups, K, K, K) and bias (O)."""


class _VariationalTransposedConv(_VariationalConv, _ConvTransposeNd):
    """Transposed convolutions: weight (I, O / groups, *K); the default `operation` keeps their `output_size`."""


@register_layer(nn.ConvTranspose1d)
class VariationalConvTranspose1d(_VariationalTransposedConv, nn.ConvTranspose1d):
    """1-D transposed convolution with a posterior over weight (I, O / groups, K) and bias (O)."""


@register_layer(nn.ConvTranspose2d)
class VariationalConvTranspose2d(_VariationalTransposedConv, nn.ConvTranspose2d):
    """2-D transposed convolution with a posterior over weight (I, O / groups, K, K) and bias (O)."""


@register_layer(nn.ConvTranspose3d)
class VariationalConvTranspose3d(_VariationalTransposedConv, nn.ConvTranspose3d):
    """3-D transposed convolution with a posterior over weight (I, O / groups, K, K, K) and bias (O)."""


@register_layer(nn.MultiheadAttention)
class VariationalMultiheadAttention(DrawnLayer, nn.MultiheadAttention):
    """Multi-head attention with posteriors over its input projections; `out_proj` has its own and is drawn here.

    torch's attention reads the raw weights of all projections at once, so weight sampling is what there is. `bias_k`
    and `bias_v`, tokens beside the keys and values, stay deterministic.
    """

    posterior_names = (
        "in_proj_weight",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "in_proj_bias",
    )
    fallback_reason = "torch's attention reads its raw weights: weight sampling, whatever the estimator"

    def drawn_layers(self) -> list[VariationalLayer]:
        """The attention and its output projection."""
        return [layer for layer in (self, self.out_proj) if isinstance(layer, VariationalLayer)]
