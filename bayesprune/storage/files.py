"""Writing the files of a saved directory: all of them or none, one process at a time."""

import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bayesprune.errors import StorageError
from bayesprune.storage import coding
from bayesprune.storage.digests import tensor_header
from bayesprune.storage.levels import LEVELS
from bayesprune.storage.parsing import parse_json
from bayesprune.storage.reading import INDEX, RECORD, TENSORS, read_json

SHARD = "model-{number:05}-of-{count:05}.safetensors"
_OWN_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_JSON_NAME = re.compile(r"[\w-]+(\.[\w-]+)*\.json")

Writer = Callable[[Path], None]
_LOGGER = logging.getLogger(__name__)


def json_writer(value: Any) -> Writer:
    """Writes a JSON value; it is encoded now, so that what cannot be read again fails before any file is touched.

    Raises:
        StorageError: it is larger or deeper than what is read.
    """
    data = (json.dumps(value, indent=1) + "\n").encode()
    parse_json(data, "what is to be saved as JSON")

    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def tensor_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, coded: bool = False) -> Writer:
    """Writes a safetensors file with this header metadata, and the tensors' digests; entropy-coded if asked for.

    Raises:
        StorageError: it cannot be coded; see `bayesprune.storage.coding`.
    """
    if coded:
        tensors, metadata = coding.encoded(tensors), {**metadata, **coding.HEADER}
    header = {**metadata, **tensor_header(tensors)}

    def write(path: Path) -> None:
        save_file(dict(tensors), path, metadata=header)

    return write


def write_together(directory: Path, writers: Mapping[str, Writer]) -> None:
    """Writes the files under temporary names beside their own, and renames all of them once all are on the disk.

    Files of tensors that an earlier save left there under other names, and those that its record names beside itself,
    are removed at the end.

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
        order = sorted(writers, key=lambda name: (name.endswith(".safetensors"), name == TENSORS))
        for name in order:  # JSON first, whose access rights are the user's, the largest last
            writers[name](temporary[name])
            mode = settle(temporary[name], mode)
        with _alone_in(directory):
            stale = _of_earlier_saves(directory)
            _swap({name: directory / name for name in writers}, temporary, previous)
            _remove_stale(directory, [*previous.values(), *(path for path in stale if path.name not in writers)])
    except (OSError, SafetensorError) as error:
        _remove(temporary.values(), made)
        raise StorageError(
            f"could not save to {directory}: {error}. Nothing was changed there. Check that the directory is "
            "writable and has space for the model, or save to another one."
        ) from error
    except BaseException:
        _remove(temporary.values(), made)
        raise


def shard_writers(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], max_bytes: int | None, *, coded: bool = False
) -> dict[str, Writer]:
    """Writers of one file, or of several of at most this size with their index; a larger tensor has one of its own.

    Sizes are those before coding.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if max_bytes is not None and shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {TENSORS: tensor_writer(tensors, metadata, coded=coded)}
    names = [SHARD.format(number=number, count=len(shards)) for number in range(1, len(shards) + 1)]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    writers = {name: tensor_writer(shard, metadata, coded=coded) for name, shard in zip(names, shards, strict=True)}
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


def settle(path: Path, mode: int | None) -> int:
    """Puts the file on the disk; with these access rights, as of any new file, which safetensors keeps to the owner."""
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


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Lets one process at a time rename files of a directory, where the system has locks; the last to come stays."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have none
            _LOGGER.warning("%s is not locked (%s): save to it from one process at a time", directory, error)
        yield
    finally:
        os.close(descriptor)


def _of_earlier_saves(directory: Path) -> list[Path]:
    """The files of tensors that a save may have left there, and those for its library that the record there names."""
    try:
        named = read_json(directory / RECORD).get("files")
    except StorageError:  # there is none, or it is damaged
        named = None
    beside = filter(_JSON_NAME.fullmatch, named if isinstance(named, dict) else ())
    shards = [path.name for path in directory.glob("model-*-of-*.safetensors") if _OWN_SHARD.fullmatch(path.name)]
    return [directory / name for name in (TENSORS, INDEX, LEVELS, *shards, *beside)]


def _remove_stale(directory: Path, paths: Iterable[Path]) -> None:
    try:
        _remove(paths, [])
    except OSError as error:
        raise StorageError(f"saved to {directory}, but an older file there cannot be removed: {error}.") from error


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
