"""The state of a training in one file: tensors as safetensors, and JSON that says where each belongs; no pickle.

The Trainer's checkpoints keep an attachment in it, and those of `bayesprune compress` all that a training changes.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayesprune.errors import StorageError
from bayesprune.storage.files import settle

_KEY, _FORMAT_VERSION = "bayesprune", 3


def write_state(path: Path, state: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> None:
    """Writes a state, nested dicts, lists and tuples of tensors, numbers and texts: whole or not at all.

    Args:
        path: The file.
        state: Tensors that are sharded have to be gathered before; see `sharding.whole_values`.
        about: JSON values that `read_about` finds without reading the tensors.
    """
    tensors, outline = flattened(state)
    tensors = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    header = {"format_version": _FORMAT_VERSION, "about": dict(about or {}), "outline": outline}
    write_whole(path, lambda partial: save_file(tensors, partial, metadata={_KEY: json.dumps(header)}))


def read_state(path: Path) -> dict[str, Any]:
    """The state that `write_state` wrote, on the CPU.

    Raises:
        StorageError: the file is damaged, or of another version.
    """
    outline = _header(path)["outline"]
    try:
        with safe_open(path, "pt") as file:
            return restored({key: file.get_tensor(key) for key in file.keys()}, outline)  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error


def read_about(path: Path) -> dict[str, Any]:
    """Reads the description that `write_state` put into the file.

    Raises:
        StorageError: it is damaged, or of another version.
    """
    return _header(path)["about"]


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under another name first: a kill leaves the old file or the new one, an error the old one alone."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        settle(partial, mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def flattened(state: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of nested dicts, lists and tuples by their paths, and the rest as JSON; `restored` is the opposite.

    JSON has text keys alone, and no tuples: a dict becomes {"dict": its pairs}, a tuple {"tuple": its entries}, and a
    tensor {"tensor": its path}.
    """
    tensors: dict[str, Tensor] = {}

    def outline(value: Any, *path: Any) -> Any:
        if isinstance(value, Tensor):
            key = "/".join(map(str, path))
            assert key not in tensors, "a path leads to one value"
            tensors[key] = value
            return {"tensor": key}
        if isinstance(value, Mapping):
            return {"dict": [[key, outline(entry, *path, key)] for key, entry in value.items()]}
        if isinstance(value, list | tuple):
            entries = [outline(entry, *path, index) for index, entry in enumerate(value)]
            return {"tuple": entries} if isinstance(value, tuple) else entries
        return value

    return tensors, outline(state)


def restored(tensors: Mapping[str, Tensor], outline: Any) -> Any:
    """The state that `flattened` took apart.

    Raises:
        KeyError: a tensor is missing.
    """
    if isinstance(outline, list):
        return [restored(tensors, entry) for entry in outline]
    if not isinstance(outline, dict):
        return outline
    ((kind, content),) = outline.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(restored(tensors, entry) for entry in content)
    return {key: restored(tensors, entry) for key, entry in content}


def _header(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
        version, _, _ = (header[key] for key in ("format_version", "about", "outline"))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise _damaged(path, error) from error
    if version != _FORMAT_VERSION:
        raise StorageError(
            f"{path} has format version {version!r}; expected {_FORMAT_VERSION}. Go on with the bayesprune version "
            "that wrote it."
        )
    return header


def _damaged(path: Path, error: Exception) -> StorageError:
    return StorageError(
        f"{path} cannot be read ({type(error).__name__}: {error}): it is damaged, or no training state of bayesprune."
    )
