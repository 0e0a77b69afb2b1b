"""What is fast on which device, and how often one is waited for."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

CHEAP_CALLS = {"cpu"}
"""Types of devices on which a pass over a tensor costs little beside what it does, so that cache is what counts."""


def has_cheap_calls(device: torch.device) -> bool:
    """Whether many passes that stay in cache are better than few; elsewhere each is a kernel to be launched."""
    return device.type in CHEAP_CALLS


def present_autocast(device: torch.device) -> Callable[[], torch.autocast]:
    """Makes the autocast that this thread is under, to be entered later or in another one.

    It has no cache, which would keep weights as they were when the other was entered.
    """
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return partial(torch.autocast, device.type, dtype=dtype, enabled=enabled, cache_enabled=False)


def numbers_of(tensors: Sequence[Tensor]) -> list[int]:
    """Whole numbers that are on devices, brought here together: a device is waited for once."""
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors]).tolist() if tensors else []


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The k-th smallest number along the last dimension, which is kept: (..., M) to (..., 1), k from 1 to M.

    On a CPU NumPy selects, with vector instructions: of a million float32 numbers in a tenth of torch's time.
    """
    if has_cheap_calls(values.device) and values.dtype in (torch.float32, torch.float64):
        selected = np.partition(values.detach().numpy(), k - 1, axis=-1)
        return torch.from_numpy(selected[..., k - 1 : k].copy())
    return values.kthvalue(k, dim=-1, keepdim=True).values
