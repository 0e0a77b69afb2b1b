"""Random numbers for the estimators, from torch's generators, different on every rank.

Nothing is stored between two draws, so a run whose generator state was saved and restored (torch, HF `Trainer`,
gradient checkpointing) draws the same noise again.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_RANK_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: neighbouring ranks get distant seeds


def normal(shape: torch.Size | tuple[int, ...], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers of this shape."""
    return torch.randn(shape, generator=_generator(device), device=device, dtype=dtype)


def signs(shape: torch.Size | tuple[int, ...], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random signs, -1 or 1 with equal probability."""
    bits = torch.randint(0, 2, shape, generator=_generator(device), device=device)
    return (2 * bits - 1).to(dtype)


def many_signs(
    count: int, shape: torch.Size | tuple[int, ...], *, device: torch.device, dtype: torch.dtype
) -> Iterator[Tensor]:
    """So many tensors of random signs, eight of them from one random byte an entry."""
    generator, byte = _generator(device), torch.empty(0)
    for index in range(count):
        if index % 8 == 0:
            byte = torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)
        yield (2 * ((byte >> (index % 8)) & 1)).to(dtype) - 1


def logistic(shape: torch.Size | tuple[int, ...], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard logistic numbers of this shape."""
    uniform = torch.rand(shape, generator=_generator(device), device=device, dtype=dtype)
    return torch.logit(uniform, eps=torch.finfo(dtype).eps)


def _generator(device: torch.device) -> torch.Generator | None:
    """torch's default generator in one process; with several, one seeded from the default stream and the rank.

    Trainers seed every rank alike; the same weight noise on every rank would not average out.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    if torch.distributed.get_world_size() == 1:
        return None
    seed = int(torch.empty((), dtype=torch.int64).random_()) + torch.distributed.get_rank() * _RANK_STRIDE
    return torch.Generator(device).manual_seed(seed % 2**63)
