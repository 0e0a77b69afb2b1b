"""What is fast on which device, and how often one is waited for."""

from collections.abc import Sequence

import torch
from torch import Tensor

CHEAP_CALLS = {"cpu"}
"""Types of devices on which a pass over a tensor costs little beside what it does, so that cache is what counts."""


def has_cheap_calls(device: torch.device) -> bool:
    """Whether many passes that stay in cache are better than few; elsewhere each is a kernel to be launched."""
    return device.type in CHEAP_CALLS


def numbers_of(tensors: Sequence[Tensor]) -> list[int]:
    """Whole numbers that are on devices, brought here together: a device is waited for once."""
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).tolist() if tensors else []
