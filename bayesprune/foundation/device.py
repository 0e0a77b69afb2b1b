"""What is fast on which device."""

import torch

CHEAP_CALLS = {"cpu"}
"""Types of devices on which a pass over a tensor costs little beside what it does, so that cache is what counts."""


def has_cheap_calls(device: torch.device) -> bool:
    """Whether many passes that stay in cache are better than few; elsewhere each is a kernel to be launched."""
    return device.type in CHEAP_CALLS
