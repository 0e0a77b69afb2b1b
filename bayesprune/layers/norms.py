"""The variational forms of torch's normalisations: a posterior over the scale gamma, one entry for each channel.

A norm undoes the scale of the layer in front of it, so what tells whether a channel is needed is gamma. A layer of
another library joins with `register_layer` and a class that derives from `VariationalNorm`. `to_variational` converts
them with `norm_scales=True` alone.
"""

from typing import Any

from torch import Tensor, nn

from bayesprune.layers.base import VariationalLayer
from bayesprune.layers.registry import register_layer


class VariationalNorm(VariationalLayer):
    """Mixin in front of a stock norm: a posterior over weight (C), none over the bias.

    The output is not linear in the input, so every random estimator is weight sampling: a draw of gamma for all
    examples and positions. Statistics are those of the stock forward, which runs once.
    """

    posterior_names = ("weight",)
    is_linear_in_weight = False
    is_norm = True

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """The stock forward with this scale; the bias, which has no posterior, stays the layer's own."""
        with self.substituted(weight=weight):
            return self.stock_type.forward(self, x, *args, **kwargs)


@register_layer(nn.BatchNorm1d)
class VariationalBatchNorm1d(VariationalNorm, nn.BatchNorm1d):
    """Batch norm of (N, C) or (N, C, L) with a posterior over its scale (C)."""


@register_layer(nn.BatchNorm2d)
class VariationalBatchNorm2d(VariationalNorm, nn.BatchNorm2d):
    """Batch norm of (N, C, H, W) with a posterior over its scale (C)."""


@register_layer(nn.BatchNorm3d)
class VariationalBatchNorm3d(VariationalNorm, nn.BatchNorm3d):
    """Batch norm of (N, C, D, H, W) with a posterior over its scale (C)."""


@register_layer(nn.LayerNorm)
class VariationalLayerNorm(VariationalNorm, nn.LayerNorm):
    """Layer norm over the last dimension, with a posterior over its scale (C)."""


@register_layer(nn.GroupNorm)
class VariationalGroupNorm(VariationalNorm, nn.GroupNorm):
    """Group norm of (N, C, ...) with a posterior over its scale (C)."""


@register_layer(nn.RMSNorm)
class VariationalRMSNorm(VariationalNorm, nn.RMSNorm):
    """RMS norm over the last dimension, with a posterior over its scale (C)."""
