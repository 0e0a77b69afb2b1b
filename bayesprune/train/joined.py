"""Many small tensors as one, so that a pass over it serves all of them."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

_NUM_REMEMBERED = 64


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Their numbers one behind the other, a copy."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def split_like(numbers: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of what was `joined`, in the tensors' shapes."""
    split = numbers.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(split, tensors, strict=True)]


def sums_of(numbers: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The sum of each of the tensors of these sizes, in the same order whenever it is computed."""
    offsets = _offsets(sizes, numbers.device)
    return torch.segment_reduce(numbers, "sum", offsets=offsets, axis=0, unsafe=True)


@lru_cache(_NUM_REMEMBERED)
def spread(values: tuple[float, ...], sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """A value for each number of tensors of these sizes; not to be written to."""
    counts = torch.tensor(sizes)
    return torch.tensor(values, dtype=dtype).repeat_interleave(counts, output_size=sum(sizes)).to(device)


@lru_cache(_NUM_REMEMBERED)
def _offsets(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(device)
