"""Random numbers for the estimators, from torch's generators, different on every rank.

Nothing is stored between two draws, so a run whose generator state was saved and restored (torch, HF `Trainer`,
gradient checkpointing) draws the same noise again.

Noise that is needed twice is drawn from a seed of torch's default CPU stream (`draw_seed`), on any device and without
waiting for it. Many normal numbers in float32 on a CPU, where torch's own cost more than all else that is done to a
weight, come from such a seed by SFC64 (Doty-Humphrey, 2010): each is one of 65,536 equally probable values, the means
of a standard normal between its quantiles, rescaled to variance 1. Their fourth moment is 3 - 2e-4, the largest is 4.4.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

_RANK_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: neighbouring ranks get distant seeds
_MIN_SIZE = 1 << 13  # fewer cost less by torch
_CHUNK = 1 << 15  # normal numbers at a time: what is between bits and numbers stays in a core's cache


def normal(
    shape: torch.Size | tuple[int, ...], *, device: torch.device, dtype: torch.dtype, seed: int | None = None
) -> Tensor:
    """Standard normal numbers of this shape; for one seed always the same."""
    is_tabled = comes_in_chunks(shape, device=device, dtype=dtype)
    if is_tabled and seed is None and can_repeat(device):
        seed = draw_seed()
    if seed is None:
        return torch.randn(shape, **_from_rank(device), device=device, dtype=dtype)
    if is_tabled:
        values = torch.empty(shape, dtype=dtype)
        for _ in normal_chunks(values.numel(), seed, out=values.view(-1)):
            pass
        return values
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device, dtype=dtype)


def comes_in_chunks(shape: torch.Size | tuple[int, ...], *, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `normal` of a seed is what `normal_chunks` yields."""
    return device.type == "cpu" and dtype == torch.float32 and math.prod(shape) >= _MIN_SIZE


def normal_chunks(count: int, seed: int, *, out: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """So many standard normal numbers, a piece at a time that stays in the cache; without `out` in the same memory."""
    bits, table = np.random.SFC64(seed), _normal_table()
    indices, values = torch.empty(_CHUNK, dtype=torch.int32), torch.empty(_CHUNK)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        words = torch.from_numpy(bits.random_raw((size + 3) // 4).view(np.uint16))[:size]
        chunk = slice(start, start + size)
        eps = values[:size] if out is None else out[chunk]
        yield chunk, torch.index_select(table, 0, indices[:size].copy_(words), out=eps)


def normal_like(like: Tensor, *, dtype: torch.dtype, seed: int | None = None) -> Tensor:
    """Standard normal numbers of a tensor's shape, channels last in memory where it has them last."""
    if can_repeat(like.device) and has_channels_last(like):
        shape = (like.shape[0], *like.shape[2:], like.shape[1])
        return normal(shape, device=like.device, dtype=dtype, seed=seed).movedim(-1, 1)
    return normal(like.shape, device=like.device, dtype=dtype, seed=seed)


def draw_seed() -> int:
    """The seed of one draw, from torch's default CPU stream and the rank: no device has to be waited for."""
    seed = int(torch.empty((), dtype=torch.int64).random_())
    rank = torch.distributed.get_rank() if _is_distributed() else 0
    return (seed + rank * _RANK_STRIDE) % 2**63


def can_repeat(device: torch.device) -> bool:
    """Whether draws may be seeds now: not while a program is recorded, transformed or captured, nor without data."""
    if torch.compiler.is_compiling() or device.type == "meta":
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    if forward_ad._current_level >= 0:
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def signs(shape: torch.Size | tuple[int, ...], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Random signs, -1 or 1 with equal probability."""
    bits = torch.randint(0, 2, shape, **_from_rank(device), device=device)
    return (2 * bits - 1).to(dtype)


def many_signs(
    count: int, shape: torch.Size | tuple[int, ...], *, device: torch.device, dtype: torch.dtype
) -> Iterator[Tensor]:
    """So many tensors of random signs, eight of them from one random byte an entry."""
    options, byte = _from_rank(device), torch.empty(0)
    for index in range(count):
        if index % 8 == 0:
            byte = torch.randint(0, 256, shape, **options, device=device, dtype=torch.uint8)
        yield (2 * ((byte >> (index % 8)) & 1)).to(dtype) - 1


def logistic(shape: torch.Size | tuple[int, ...], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard logistic numbers of this shape."""
    uniform = torch.rand(shape, **_from_rank(device), device=device, dtype=dtype)
    return torch.logit(uniform, eps=torch.finfo(dtype).eps)


def has_channels_last(tensor: Tensor) -> bool:
    """Whether an image-like tensor has its channels last in memory."""
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if memory_format is None or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=memory_format)


@cache
def _normal_table() -> Tensor:
    """The means of a standard normal in 2^16 intervals of equal probability, scaled to variance 1."""
    quantiles = torch.special.ndtri(torch.linspace(0, 0.5, 2**15 + 1, dtype=torch.float64))
    density = torch.exp(-0.5 * quantiles.square()) / (2 * torch.pi) ** 0.5
    means = -(2.0**16) * density.diff()
    values = torch.cat([means, -means.flip(0)])
    return (values / values.square().mean().sqrt()).to(torch.float32)


def _from_rank(device: torch.device) -> dict[str, Any]:
    """The `generator` to draw from: torch's default in one process; with several, one seeded from that and the rank.

    Trainers seed every rank alike; the same weight noise on every rank would not average out. The
    default is not named: with a generator that is None, torch draws nothing of a shape that is symbolic.
    """
    return {"generator": torch.Generator(device).manual_seed(draw_seed())} if _is_distributed() else {}


def _is_distributed() -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return torch.distributed.get_world_size() > 1
