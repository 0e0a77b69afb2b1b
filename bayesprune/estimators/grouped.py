"""Tensors of channels in groups, seen as (N, G, C / G, P) with whatever lies before and behind the channels flat."""

from typing import NamedTuple

import torch
from torch import Size, Tensor

from bayesprune.foundation.noise import has_channels_last


class Layout(NamedTuple):
    """How tensors with channels at one dimension are seen.

    Attributes:
        feature_dim: The (negative) dimension of the channels.
        groups: Number of groups G.
        is_last: Whether channels are last in memory; positions then belong to N and P is 1.
    """

    feature_dim: int
    groups: int
    is_last: bool

    @classmethod
    def of(cls, tensor: Tensor, feature_dim: int, groups: int) -> "Layout":
        """The layout of tensors like this one."""
        return cls(feature_dim, groups, feature_dim == -1 or has_channels_last(tensor))

    def view(self, tensor: Tensor) -> Tensor:
        """(N, G, C / G, P); a copy only where the tensor is laid out otherwise."""
        if self.is_last:
            channels = tensor if self.feature_dim == -1 else tensor.movedim(self.feature_dim, -1)
            return channels.reshape(-1, self.groups, channels.shape[-1] // self.groups, 1)
        dim = tensor.dim() + self.feature_dim
        grouped = tensor.unflatten(dim, (self.groups, -1))
        return grouped.flatten(dim + 2).reshape(-1, *grouped.shape[dim : dim + 2], grouped.shape[dim + 2 :].numel())

    def unview(self, tensor: Tensor, shape: Size) -> Tensor:
        """What `view` saw in a tensor of this shape."""
        if not self.is_last:
            return tensor.reshape(shape)
        dim = len(shape) + self.feature_dim
        moved = (*shape[:dim], *shape[dim + 1 :], shape[dim])
        return tensor.reshape(moved).movedim(-1, self.feature_dim)


def over_channels(values: Tensor, weights: Tensor | None) -> Tensor:
    """Sum of values (N, G, C, P) over the channels of each group with weights (G, C), or of one: (N, G, 1, P)."""
    n, groups, channels, positions = values.shape
    if weights is None:
        return values.sum(2, keepdim=True)
    if groups > 1:
        return (values * weights.unsqueeze(-1)).sum(2, keepdim=True)
    if positions == 1:
        return torch.mv(values.view(n, channels), weights.view(channels)).view(n, 1, 1, 1)
    return torch.matmul(weights, values.view(n, channels, positions)).view(n, 1, 1, positions)


def over_positions(values: Tensor, weights: Tensor) -> Tensor:
    """Sum of values (N, G, C, P) over examples and positions with weights (N, G, 1, P): (G, C)."""
    n, groups, channels, positions = values.shape
    if groups > 1:
        return (values * weights).sum((0, 3))
    if positions == 1:
        return torch.mv(values.view(n, channels).t(), weights.view(n)).view(1, channels)
    return torch.bmm(values.view(n, channels, positions), weights.view(n, positions, 1)).sum(0).view(1, channels)
