"""Reading the files of a saved directory: every damage named, nothing allocated or built that a file only claims.

A saved model may be far smaller than the dense one it is built from, but it has about as many layers, and nobody keeps
one weight in hundreds. So a file of a few kilobytes does not make a process build for hours, or fill the memory.
"""

import re
import reprlib
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.parameter import is_lazy

from bayesprune.errors import StorageError
from bayesprune.storage import coding
from bayesprune.storage.coding.tensors import DTYPES
from bayesprune.storage.digests import KEY, check_tensors
from bayesprune.storage.parsing import MAX_BYTES, parse_json

TENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
RECORD = "bayesprune.json"
FORMAT_VERSION = 2
_SHARD_NAME = re.compile(r"[\w-]+(\.[\w-]+)*\.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        StorageError: the file is missing, unreadable, too large, not JSON, names a key twice, or is not an object.
    """
    value = parse_json(read_bounded(path), str(path))
    if not isinstance(value, dict):
        raise StorageError(f"{path} holds {reprlib.repr(value)}; expected a JSON object.")
    return value


def read_bounded(path: Path) -> bytes:
    """The bytes of a JSON file, and no more than one too many.

    Raises:
        StorageError: the file is missing or unreadable.
    """
    try:
        require_file(path)
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}.") from error


def read_tensors(path: Path, names: Collection[str] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU and decoded, and its header's metadata without their digests.

    What a header claims to hold is compared with the file's size before anything is allocated (by safetensors).

    Args:
        path: The file.
        names: Tensors to read, those of them that there are; None is all. Of a coded file all are read.

    Raises:
        StorageError: the file is missing, truncated or damaged, or a tensor is not the one that was saved.
    """
    try:
        require_file(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            is_read = (lambda _: True) if names is None or coding.HEADER.keys() & header.keys() else names.__contains__
            tensors = {name: file.get_tensor(name) for name in filter(is_read, file.keys())}
    except (OSError, SafetensorError, RuntimeError) as error:  # torch says RuntimeError of a file that vanished
        raise StorageError(
            f"{path} cannot be read: {error}. It is truncated, damaged or not a safetensors file: save or copy it anew."
        ) from error
    check_tensors(tensors, header, str(path))
    if coding.is_coded(header, str(path)):
        tensors = coding.decoded(tensors, str(path))
    return tensors, {key: value for key, value in header.items() if key not in (KEY, *coding.HEADER)}


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the meta device, and its header's metadata.

    Raises:
        StorageError: the file is missing or damaged, or holds a dtype that models do not have.
    """
    require_file(path)  # opening a pipe would wait for ever
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            if coding.is_coded(header, str(path)):
                return coding.outline({name: file.get_tensor(name) for name in file.keys()}, str(path)), header  # noqa: SIM118
            return {name: _meta(file.get_slice(name)) for name in file.keys()}, header  # noqa: SIM118
    except (OSError, SafetensorError, RuntimeError) as error:  # torch says RuntimeError of a file that vanished
        raise StorageError(f"{path} cannot be read: {error}. Save or copy it anew.") from error


def read_all_tensors(directory: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a directory, from one file or from those that its index names, and their common metadata.

    Raises:
        StorageError: a file is missing or damaged, or the files come from several saves.
    """
    if (directory / TENSORS).is_file() or not (directory / INDEX).is_file():
        return read_tensors(directory / TENSORS)
    found = read_json(directory / INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(n, str) and _SHARD_NAME.fullmatch(n) for n in found.values()):
        raise StorageError(f"{directory / INDEX} holds no weight_map of tensor names to file names. It is damaged.")
    tensors: dict[str, Tensor] = {}
    headers: list[dict[str, str]] = []
    for name in sorted(set(found.values())):
        part, header = read_tensors(directory / name)
        tensors |= part
        headers.append(header)
    if tensors.keys() != found.keys() or any(header != headers[0] for header in headers):
        raise StorageError(f"the files that {directory / INDEX} names come from several saves. Save the model again.")
    return tensors, headers[0] if headers else {}


def require_file(path: Path) -> None:
    """Refuses a path that is not a file, and says what its directory holds.

    Raises:
        StorageError: it is not a file.
    """
    if path.is_file():
        return
    if not path.parent.is_dir():
        raise StorageError(f"{path.parent} is not a directory; expected one that bayesprune.save wrote.")
    if path.exists():
        raise StorageError(f"{path} is a directory, pipe or device; expected the file that bayesprune.save wrote.")
    found = ", ".join(sorted(entry.name for entry in path.parent.iterdir())[:8]) or "nothing"
    raise StorageError(f"{path.parent} has no file {path.name} (it has {found}); expected what bayesprune.save wrote.")


def _meta(tensor: Any) -> Tensor:
    if tensor.get_dtype() not in DTYPES:
        raise StorageError(f"a tensor of dtype {tensor.get_dtype()}; expected one of {', '.join(DTYPES)}.")
    return torch.empty(tensor.get_shape(), dtype=DTYPES[tensor.get_dtype()], device="meta")


MAX_INTEGER = 2**28
_UNBOUNDED = ("theta", "base", "seed", "max_length", "_id", "_ids")  # numbers that are no sizes
_PARTS_PER_PART, _MIN_PARTS = 8, 2_000
_BYTES_PER_BYTE, _MIN_BYTES = 256, 2**30


def check_integers(value: Any, where: str, key: str = "") -> None:
    """Refuses whole numbers that no size of a layer is, of which a constructor would make lists or tensors.

    Raises:
        StorageError: there is one; the message names it.
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            check_integers(item, where, str(name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_integers(item, where, key)
    elif isinstance(value, int) and abs(value) > MAX_INTEGER and not any(part in key for part in _UNBOUNDED):
        digits = str(value) if abs(value) < 10**20 else "a number of more than 20 digits"
        raise StorageError(f"{where}: {key!r} is {digits}; expected at most {MAX_INTEGER:,}. It is damaged.")


@contextmanager
def bounded_building(saved: Mapping[str, Tensor], num_modules: int) -> Iterator[None]:
    """Inside, building a model that is out of all proportion to the saved one is stopped.

    Args:
        saved: The tensors of the saved model; on the meta device they say as much.
        num_modules: How many modules without children it has.

    Raises:
        StorageError: more modules, parameters and buffers were made than eight times as many as the saved model has, or
            more bytes of them than 256 times as many, beyond what is little in any case.
    """
    max_parts = _PARTS_PER_PART * (num_modules + len(saved)) + _MIN_PARTS
    max_bytes = _BYTES_PER_BYTE * sum(tensor.nbytes for tensor in saved.values()) + _MIN_BYTES
    thread, made = threading.get_ident(), {"parts": 0, "bytes": 0}

    def count(owner: nn.Module, name: str, part: nn.Module | Tensor | None) -> None:
        if threading.get_ident() != thread or part is None:
            return
        made["parts"] += 1
        made["bytes"] += part.nbytes if isinstance(part, Tensor) and not is_lazy(part) else 0
        for what, most in (("parts", max_parts), ("bytes", max_bytes)):
            if made[what] > most:
                raise StorageError(
                    f"the dense model that the files describe has more than {most:,} {what}, which is out of all "
                    f"proportion to what they hold ({len(saved):,} tensors). They are damaged, or not ours."
                )

    handles = [
        hooks.register_module_module_registration_hook(count),
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
