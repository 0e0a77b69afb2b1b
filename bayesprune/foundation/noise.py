"""Random numbers for the estimators, from torch's generators, different on every rank.

Nothing is stored between two draws, so a run whose generator state was saved and restored (torch, HF `Trainer`,
gradient checkpointing) draws the same noise again.

Noise that is needed twice is drawn from a seed of torch's default CPU stream (`draw_seed`), on any device and without
waiting for it. Such numbers in float32 are read from one table at places that the seed says (the shared noise of
Salimans et al., 2017, arXiv:1703.03864): on a CPU torch's own cost more than all else that is done to a weight, and
elsewhere reading costs no kernel. The table has a flat spectrum: over all places the numbers of a block have mean 0,
variance 1 and no correlation, exactly.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import _TorchDispatchModeKey as _ModeKey
from torch.autograd import forward_ad

from bayesprune.foundation.device import has_cheap_calls

_RANK_STRIDE = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: neighbouring ranks get distant seeds
_TABLE = 1 << 20  # numbers: 4 MiB
MAX_AT_ONCE = 1 << 18
"""Numbers of the table in a row, which are used together."""
_BITS, _MOST = 2**64 - 1, 2**63 - 1
_RECORDING = (_ModeKey.PROXY, _ModeKey.FAKE, _ModeKey.FUNCTIONAL)


class _Scratch(threading.local):
    """What a thread makes seeds in: making a tensor takes longer than drawing its number."""

    def __init__(self) -> None:
        with torch.inference_mode(False):
            self.number = torch.empty((), dtype=torch.int64, device="cpu")
        self.ahead = torch.Generator("cpu")
        self.num_seeds = 0


_SCRATCH = _Scratch()


def normal(
    shape: torch.Size | tuple[int, ...], *, device: torch.device, dtype: torch.dtype, seed: int | None = None
) -> Tensor:
    """Standard normal numbers of this shape; for one seed always the same."""
    is_known = is_tabled(shape, device=device, dtype=dtype)
    if is_known and seed is None and can_repeat(device):
        seed = draw_seed()
    if is_known and torch.compiler.is_compiling():
        return _read(list(shape), torch.empty(0, device=device))
    if seed is None:
        return torch.randn(shape, **_from_rank(device), device=device, dtype=dtype)
    if is_known:
        return torch.cat(table_blocks(seed, shape, device)).view(shape)
    return torch.randn(shape, generator=_seeded(device, seed), device=device, dtype=dtype)


def is_tabled(shape: torch.Size | tuple[int, ...], *, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `normal` of a seed is what `table_blocks` gives; a compiled program has torch's own numbers on a GPU."""
    if torch.compiler.is_compiling():
        return has_cheap_calls(device) and dtype == torch.float32
    return dtype == torch.float32 and math.prod(shape) > 0


def normal_blocks(seed: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`normal` of this seed a piece at a time, each with the pieces of contiguous tensors that it belongs to.

    The noise is a view of the table, not to be written to. A piece is a number of whole rows, the first dimension's
    entries, where one fits, and has no dimensions left but where there is one piece alone.
    """
    first, *_ = tensors
    blocks = table_blocks(seed, first.shape, first.device)
    if len(blocks) == 1:
        yield blocks[0].view(first.shape), *tensors
        return
    size = blocks[0].numel()
    yield from zip(blocks, *(tensor.view(-1).split(size) for tensor in tensors), strict=True)


@torch.library.custom_op("bayesprune::normal", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _read(shape: list[int], like: Tensor) -> Tensor:
    """`normal` as one operation of a compiled program, which torch's own numbers would take most of the time of."""
    return torch.cat(table_blocks(draw_seed(), shape, like.device)).view(shape)


@_read.register_fake
def _(shape: list[int], like: Tensor) -> Tensor:
    return torch.empty(shape, device=like.device)


def read(seed: int, shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    """`normal` of this seed in float32, not to be written to: a part of the table where it is one block."""
    blocks = table_blocks(seed, shape, device)
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks)).view(shape)


def table_blocks(seed: int, shape: torch.Size | Sequence[int], device: torch.device) -> list[Tensor]:
    """Views of the table that hold the numbers of this seed for a tensor in float32, one behind the other."""
    table, count = _table_on(device), math.prod(shape)
    if count <= MAX_AT_ONCE:
        return [table.narrow(0, _split_seed(seed, 0) % _TABLE, count)]
    row = count // shape[0]
    size = MAX_AT_ONCE // row * row or MAX_AT_ONCE
    starts = range(0, count, size)
    return [
        table.narrow(0, _split_seed(seed, index) % _TABLE, min(size, count - start))
        for index, start in enumerate(starts)
    ]


def _split_seed(seed: int, index: int) -> int:
    """One of many seeds that one seed stands for: number `index` of the generator SplitMix64 (Steele et al., 2014)."""
    bits = (seed + (index + 1) * _RANK_STRIDE) & _BITS
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _BITS
    return (bits ^ (bits >> 31)) >> 1


def multiplied(values: Tensor, seed: int, *, out: Tensor | None = None) -> Tensor:
    """Contiguous values times `normal` of their shape and this seed; `out` may be the values."""
    if not is_tabled(values.shape, device=values.device, dtype=values.dtype):
        return torch.mul(values, normal(values.shape, device=values.device, dtype=values.dtype, seed=seed), out=out)
    if not has_cheap_calls(values.device):
        return torch.mul(values, read(seed, values.shape, values.device), out=out)
    out = torch.empty_like(values) if out is None else out
    for eps, block, product in normal_blocks(seed, values, out):
        torch.mul(block, eps, out=product)
    return out


def normal_like(like: Tensor, *, dtype: torch.dtype, seed: int | None = None) -> Tensor:
    """Standard normal numbers of a tensor's shape, channels last in memory where it has them last."""
    if can_repeat(like.device) and has_channels_last(like):
        shape = (like.shape[0], *like.shape[2:], like.shape[1])
        return normal(shape, device=like.device, dtype=dtype, seed=seed).movedim(-1, 1)
    return normal(like.shape, device=like.device, dtype=dtype, seed=seed)


def draw_seed() -> int:
    """The seed of one draw, from torch's default CPU stream and the rank: no device has to be waited for."""
    _SCRATCH.num_seeds += 1
    return (int(_SCRATCH.number.random_()) + _offset()) & _MOST


def num_seeds() -> int:
    """How many seeds this thread has drawn so far."""
    return _SCRATCH.num_seeds


def coming_seeds(count: int) -> list[int]:
    """What `draw_seed` will give the next times, if nothing else takes numbers from torch's default CPU stream."""
    ahead = _SCRATCH.ahead.set_state(torch.default_generator.get_state())
    numbers = torch.empty(count, dtype=torch.int64, device="cpu").random_(generator=ahead)
    offset = _offset()
    return [(number + offset) & _MOST for number in numbers.tolist()]


def can_repeat(device: torch.device) -> bool:
    """Whether draws may be seeds now: not while a program is recorded, transformed or captured, nor without data."""
    if torch.compiler.is_compiling() or device.type == "meta":
        return False
    if torch._C._are_functorch_transforms_active() or _is_recorded():
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
    """Yields `count` tensors of random signs; each random byte supplies eight of them."""
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
    """Normal numbers whose circular autocorrelation is exactly 0: random phases at equal amplitudes, then its start."""
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator("cpu").manual_seed(0)
        spectrum = torch.fft.rfft(torch.randn(_TABLE, generator=generator, device="cpu", dtype=torch.float64))
        spectrum /= spectrum.abs()
        spectrum[0] = 0  # the mean
        values = torch.fft.irfft(spectrum, n=_TABLE)
        values /= values.square().mean().sqrt()
        return torch.cat([values, values[:MAX_AT_ONCE]]).to(torch.float32)


def _is_recorded() -> bool:
    """Whether operations are traced, or run on tensors without data; modes that count or log them do not matter."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(torch._C._get_dispatch_mode(key) is not None for key in _RECORDING)


def _seeded(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _table_on(device: torch.device) -> Tensor:
    """The table where it is read."""
    return _normal_table() if device.type == "cpu" else _copy_of_table(device)


@cache
def _copy_of_table(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _normal_table().to(device)


def _from_rank(device: torch.device) -> dict[str, Any]:
    """The `generator` to draw from: torch's default in one process; with several, one seeded from that and the rank.

    Trainers seed every rank alike; the same weight noise on every rank would not average out. The
    default is not named: with a generator that is None, torch draws nothing of a shape that is symbolic.
    """
    return {"generator": torch.Generator(device).manual_seed(draw_seed())} if _is_distributed() else {}


def _offset() -> int:
    """What makes the seeds of ranks differ."""
    return torch.distributed.get_rank() * _RANK_STRIDE if _is_distributed() else 0


def _is_distributed() -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return torch.distributed.get_world_size() > 1
