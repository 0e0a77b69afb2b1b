"""Reading and writing the files of a saved directory: all of them or none, every damage named."""

import json
import os
import reprlib
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayesprune.errors import StorageError

TENSORS = "model.safetensors"
SHARD = "model-{number:05}-of-{count:05}.safetensors"
INDEX = "model.safetensors.index.json"
RECORD = "bayesprune.json"
FORMAT_VERSION = 1
MAX_JSON_BYTES = 64 * 2**20

Writer = Callable[[Path], None]


def json_writer(value: Any) -> Writer:
    """Writes a JSON value; it is encoded now, so that a value JSON cannot hold fails before any file is touched."""
    data = (json.dumps(value, indent=1) + "\n").encode()

    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def tensor_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Writer:
    """Writes a safetensors file with this header metadata."""

    def write(path: Path) -> None:
        save_file(dict(tensors), path, metadata=dict(metadata))

    return write


def write_together(directory: Path, writers: Mapping[str, Writer]) -> None:
    """Writes the files under temporary names beside their own, and renames all of them once all are on the disk.

    Files of tensors that an earlier save left there under other names are removed at the end.

    Whatever fails before or between the renames, the previous files stay as they were and no temporary one is left.
    A killed process leaves temporary ones (`.NAME.MARK.new`, `.old`), which nobody reads and anybody may delete; killed
    between two renames, it leaves files of two saves, which `load` tells from their save ids.

    Raises:
        StorageError: the directory cannot be made or written.
    """
    mark = uuid.uuid4().hex[:12]
    temporary = {name: directory / f".{name}.{mark}.new" for name in writers}
    previous = {name: directory / f".{name}.{mark}.old" for name in writers}
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        mode = None
        for name, write in sorted(writers.items(), key=lambda item: item[0] == TENSORS):  # the largest last
            write(temporary[name])
            mode = _settle(temporary[name], mode)
        _swap({name: directory / name for name in writers}, temporary, previous)
    except (OSError, SafetensorError) as error:
        _remove(temporary.values(), made)
        raise StorageError(
            f"could not save to {directory}: {error}. Nothing was changed there. Check that the directory is "
            "writable and has space for the model, or save to another one."
        ) from error
    except BaseException:
        _remove(temporary.values(), made)
        raise
    stale = [directory / TENSORS, directory / INDEX, *directory.glob("model-*-of-*.safetensors")]
    _remove([*previous.values(), *(path for path in stale if path.name not in writers)], [])


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        StorageError: the file is missing, unreadable, too large, not JSON, or not an object.
    """
    try:
        require_file(path)
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise StorageError(f"{path} has {size:,} bytes; expected at most {MAX_JSON_BYTES:,}. It is not ours.")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}.") from error
    except RecursionError as error:
        raise StorageError(f"{path} is nested too deeply. It is not ours.") from error
    except StorageError:
        raise
    except ValueError as error:  # not UTF-8, not JSON
        raise StorageError(f"{path} is not valid JSON: {error}. It is damaged or truncated; save again.") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path} holds {reprlib.repr(value)}; expected a JSON object.")
    return value


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its header's metadata.

    Raises:
        StorageError: the file is missing, truncated or damaged.
    """
    try:
        require_file(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{path} cannot be read: {error}. It is truncated, damaged or not a safetensors file: save or copy it anew."
        ) from error


def read_all_tensors(directory: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a directory, from one file or from those that its index names, and their common metadata.

    Raises:
        StorageError: a file is missing or damaged, or the files come from several saves.
    """
    if (directory / TENSORS).is_file() or not (directory / INDEX).is_file():
        return read_tensors(directory / TENSORS)
    found = read_json(directory / INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(n, str) and Path(n).name == n for n in found.values()):
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


def shard_writers(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], max_bytes: int | None
) -> dict[str, Writer]:
    """Writers of one file, or of several of at most this size with their index; a larger tensor has one of its own."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if max_bytes is not None and shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {TENSORS: tensor_writer(tensors, metadata)}
    names = [SHARD.format(number=number, count=len(shards)) for number in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    writers = {name: tensor_writer(shard, metadata) for name, shard in zip(names, shards, strict=True)}
    return writers | {INDEX: json_writer(index)}


def num_bytes(size: int | str) -> int:
    """A size such as "5GB" or "200MB" (powers of 1000) in bytes.

    Raises:
        ValueError: it is no such text, or not positive.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    if isinstance(size, str) and size[-2:].upper() in units and size[:-2].strip().isdigit():
        size = int(size[:-2]) * units[size[-2:].upper()]
    if not isinstance(size, int) or size <= 0:
        raise ValueError(f'max_shard_size is {size!r}; expected bytes, or a text such as "5GB" or "200MB".')
    return size


def require_file(path: Path) -> None:
    """Refuses a path that is not a file, and says what its directory holds.

    Raises:
        StorageError: it is not a file.
    """
    if path.is_file():
        return
    if not path.parent.is_dir():
        raise StorageError(f"{path.parent} is not a directory; expected one that bayesprune.save wrote.")
    found = ", ".join(sorted(entry.name for entry in path.parent.iterdir())[:8]) or "nothing"
    raise StorageError(f"{path.parent} has no file {path.name} (it has {found}); expected what bayesprune.save wrote.")


def _settle(path: Path, mode: int | None) -> int:
    """Puts the file on the disk; with the access rights of its siblings, which safetensors keeps to the owner."""
    if mode is not None:
        path.chmod(mode)
    with path.open("r+b") as file:
        os.fsync(file.fileno())
    return path.stat().st_mode


def _swap(final: dict[str, Path], temporary: dict[str, Path], previous: dict[str, Path]) -> None:
    """Renames temporary to final names; on any failure the previous files take their names back."""
    moved: list[str] = []
    try:
        for name, path in final.items():
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a directory, in the place of a file to write")
            moved.append(name)
            if path.exists():
                path.replace(previous[name])
            temporary[name].replace(path)
        _sync_directory(next(iter(final.values())).parent)
    except BaseException:
        for name in moved:
            if previous[name].exists():
                previous[name].replace(final[name])
            elif not temporary[name].exists():
                final[name].unlink()
        raise


def _sync_directory(directory: Path) -> None:
    """Puts the renames on the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(paths: Iterable[Path], made: Iterable[Path]) -> None:
    """Removes these files where they exist, and then the directories made for them where they are empty."""
    for path in paths:
        if path.exists():
            path.unlink()
    for directory in made:
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
