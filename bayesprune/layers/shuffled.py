"""A grouped convolution between channels that are not in the order of the groups."""

from typing import Any

import torch
from torch import Tensor, nn


class ShuffledConv2d(nn.Conv2d):
    """conv(x[:, inputs])[:, outputs]: an ordinary grouped convolution, its channels taken and given in another order.

    What is in order already is not indexed. Saved and loaded by `bayesprune`; in a state dict it is a convolution with
    two more tensors.

    Attributes:
        inputs: The channel of x that each input of the convolution is, (I,).
        outputs: The output of the convolution that each channel of the result is, (O,).
        shuffles_inputs: Whether they are in another order.
        shuffles_outputs: Whether those are.
    """

    inputs: Tensor
    outputs: Tensor

    def __init__(self, in_channels: int, out_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(in_channels, out_channels, *args, **kwargs)
        device = self.weight.device
        self.register_buffer("inputs", torch.arange(in_channels, device=device))
        self.register_buffer("outputs", torch.arange(out_channels, device=device))
        self.shuffles_inputs = self.shuffles_outputs = False

    @classmethod
    def like(cls, conv: nn.Conv2d, groups: int) -> "ShuffledConv2d":
        """One of the form of another, but for the groups; its weights are those of a new one."""
        made = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=groups,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        return made.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution of (N, I, H, W)."""
        x = input.index_select(-3, self.inputs) if self.shuffles_inputs else input
        output = super().forward(x)
        return output.index_select(-3, self.outputs) if self.shuffles_outputs else output

    def order(self, inputs: Tensor, outputs: Tensor) -> None:
        """Takes and gives channels in these orders, (I,) and (O,)."""
        self.inputs.copy_(inputs)
        self.outputs.copy_(outputs)
        self.shuffles_inputs, self.shuffles_outputs = (not _is_in_order(order) for order in (inputs, outputs))

    def complaint(self) -> str:
        """What is wrong with its orders, as after loading a damaged file; empty where nothing is."""
        for name in ("inputs", "outputs"):
            order = self.get_buffer(name)
            if not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
                return f"{name} are not an order of {len(order)} channels"
            if getattr(self, f"shuffles_{name}") is _is_in_order(order):
                return f"shuffles_{name} contradicts {name}"
        return ""


def _is_in_order(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order), device=order.device))
