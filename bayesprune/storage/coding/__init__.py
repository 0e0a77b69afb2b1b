"""Entropy-coded tensors: what `save(coding="entropy")` puts into a safetensors file, and what every reader gets back.

All tensors of a file are one tensor of bytes, `bayesprune.coded`: an outline (names, shapes, dtypes; JSON, deflated), a
checksum of it and of the values, and a stream of symbols. What a file claims to hold is bounded by its size before
anything is made of it.
"""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesprune.errors import StorageError
from bayesprune.foundation.progress import progress_bar
from bayesprune.storage.coding.stream import SymbolReader, SymbolWriter, require_coding
from bayesprune.storage.coding.tensors import DTYPES, as_integers, entropy_bits, read_tensor, write_tensor
from bayesprune.storage.parsing import deflated, inflated

__all__ = [
    "CODED",
    "HEADER",
    "as_integers",
    "decoded",
    "encoded",
    "entropy_bits",
    "is_coded",
    "outline",
    "require_coding",
]

CODED = "bayesprune.coded"
HEADER = {"coding": "entropy-1"}
"""What the header of a coded file says."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BYTES_PER_BYTE, _MIN_BYTES = 4096, 2**28
_AGAIN = "It is damaged, or of another version: save the model again."


def encoded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a coded file: one of bytes, and those of a dtype that is not coded. `decoded` is the opposite.

    Args:
        tensors: On the CPU.

    Raises:
        StorageError: `constriction` is missing, or no reader would take the outline: so few bytes are left, or there
            are so many tensors or dimensions.
    """
    if CODED in tensors:
        raise StorageError(f"a tensor is called {CODED!r}, which coded files need. Rename it, or save without coding.")
    own = {name: _without_minus_zero(tensor) for name, tensor in tensors.items() if tensor.dtype in _NAMES}
    entries = [[name, _NAMES[tensor.dtype], *tensor.shape] for name, tensor in own.items()]
    text = deflated(entries)
    writer, check = SymbolWriter(), zlib.crc32(text)
    for tensor in progress_bar(own.values(), "Code", "tensor"):
        write_tensor(writer, tensor)
        check = _checksum(tensor, check)
    data = len(text).to_bytes(4, "little") + text + check.to_bytes(4, "little") + writer.finish()
    _outline(data, "what is to be saved")  # as every reader does first
    others = {name: tensor for name, tensor in tensors.items() if name not in own}
    return {CODED: torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()), **others}


def is_coded(header: Mapping[str, str], where: str) -> bool:
    """Whether the header of a safetensors file says that it is coded.

    Raises:
        StorageError: it is, in a way that this version does not know.
    """
    said = header.get("coding")
    if said not in (None, HEADER["coding"]):
        raise StorageError(f"{where} is coded as {said!r}; this version of bayesprune reads {HEADER['coding']!r}.")
    return said is not None


def decoded(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors that `encoded` was given, to the last bit; but a zero has no sign.

    Args:
        tensors: Of a coded file.
        where: Its name, for messages.

    Raises:
        StorageError: the stream is damaged, claims more than its size allows, or `constriction` is missing.
    """
    data = _data(tensors, where)
    entries, rest = _outline(data, where)
    found: dict[str, Tensor] = {}
    check = zlib.crc32(data[4:rest])
    require_coding()
    try:
        reader = SymbolReader(data[rest + 4 :])
        for name, (dtype, shape) in progress_bar(entries.items(), "Decode", "tensor"):
            found[name] = read_tensor(reader, shape, dtype)
            check = _checksum(found[name], check)
    except (ValueError, OverflowError, IndexError, ArithmeticError) as error:
        raise StorageError(f"{where} cannot be decoded ({error}). {_AGAIN}") from error
    if check != int.from_bytes(data[rest : rest + 4], "little"):
        raise StorageError(f"{where} decodes to other values than were saved. {_AGAIN}")
    return found | {name: tensor for name, tensor in tensors.items() if name != CODED}


def outline(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The same tensors on the meta device, nothing decoded.

    Raises:
        StorageError: the outline is damaged, or claims more than the file's size allows.
    """
    entries, _ = _outline(_data(tensors, where), where)
    found = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in entries.items()}
    return found | {name: tensor.to("meta") for name, tensor in tensors.items() if name != CODED}


def _data(tensors: Mapping[str, Tensor], where: str) -> bytes:
    found = tensors.get(CODED)
    if found is None or found.dtype != torch.uint8 or found.dim() != 1:
        raise StorageError(f"{where} says that it is coded, and holds no bytes under {CODED!r}. {_AGAIN}")
    return found.numpy().tobytes()


def _outline(data: bytes, where: str) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...]]], int]:
    """Dtype and shape by name, and where what follows begins."""
    end = 4 + int.from_bytes(data[:4], "little")
    if len(data) < end + 4:
        raise StorageError(f"{where} is coded, and truncated. {_AGAIN}")
    entries = inflated(data[4:end], f"the outline of {where}")
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        raise StorageError(f"{where} has an outline that is no list of names, dtypes and shapes. {_AGAIN}")
    found = {name: (DTYPES[dtype], tuple(shape)) for name, dtype, *shape in entries}
    if len(found) != len(entries):
        raise StorageError(f"{where} has an outline that names a tensor twice. {_AGAIN}")
    _check_size(sum(dtype.itemsize * math.prod(shape) for dtype, shape in found.values()), len(data), where)
    return found, end


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, list)
        and len(entry) >= 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], str)
        and entry[1] in DTYPES
        and all(type(size) is int and 0 <= size < 2**40 for size in entry[2:])
        and len(entry) < 20
    )


def _check_size(num_bytes: int, coded: int, where: str) -> None:
    if num_bytes > _BYTES_PER_BYTE * coded + _MIN_BYTES:
        raise StorageError(
            f"{where}: {num_bytes:,} bytes of tensors in {coded:,} coded ones; expected at most {_BYTES_PER_BYTE:,} "
            "times as many. Nothing is decoded that a file only claims to hold."
        )


def _without_minus_zero(tensor: Tensor) -> Tensor:
    """The same numbers; what was pruned by a product with a mask holds zeros of both signs."""
    return tensor.masked_fill(tensor == 0, 0) if tensor.is_floating_point() else tensor


def _checksum(tensor: Tensor, start: int) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, start)
