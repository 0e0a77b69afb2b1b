"""Reads a directory that `save` wrote, and gives the model back."""

import reprlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bayesprune.errors import StorageError
from bayesprune.storage import base as bases
from bayesprune.storage.base import BaseModel
from bayesprune.storage.digests import check_json, check_seal
from bayesprune.storage.levels import LEVELS, Levels, record_name, record_of, smaller, tensor_names
from bayesprune.storage.reading import (
    FORMAT_VERSION,
    RECORD,
    TENSORS,
    bounded_building,
    read_all_tensors,
    read_json,
    read_tensors,
)
from bayesprune.storage.rebuild import rebuild, shape_differences
from bayesprune.storage.spec import ModelRecord


@dataclass(frozen=True)
class Record:
    """The content of `bayesprune.json` in a saved directory.

    Attributes:
        base: What the model was made from; None for a plain module.
        spec: What was made of it.
        save_id: The same in all files of one save.
        versions: Of the packages that wrote it.
        files: Digests of the JSON files beside it, which its library reads.
        levels: The smaller versions beside it.
    """

    base: BaseModel | None
    spec: ModelRecord
    save_id: str
    versions: dict[str, str]
    files: dict[str, Any]
    levels: Levels


@dataclass(frozen=True)
class Saved(Record):
    """The contents of a saved directory, checked against each other.

    Attributes:
        tensors: By state-dict name, without the tied names.
    """

    tensors: dict[str, Tensor]


def load(directory: str | Path, level: str | None = None, *, model: nn.Module | None = None) -> nn.Module:
    """The saved model, or a smaller version of it, in eval mode; one of timm or transformers is built, on the CPU.

    The dense model is built in the ordinary way, not on torch's meta device: buffers that are not part of a state dict
    get their values only there. Nothing in the files is executed, and no attribute is made that the dense model does
    not have.

    Args:
        directory: What `save` wrote.
        level: One of the levels that `save` was given, by its name, such as "macs=0.5" or "weights=0.1"; or
            "bytes=50000", the largest of them whose tensors take at most so many. None is the saved model itself.
        model: For a plain module, the dense model (or one that has the saved shapes already), from the same
            constructor. It is changed in place, keeps its device, and is what is returned. Attributes with plain values
            get their saved values.

    Raises:
        StorageError: the directory or a file of it is missing, truncated, of an unknown version, of another save than
            the others, or does not fit the model, or has no such level; the message says which, and what differs. A
            `model` without the recorded layers is left unchanged.
        ValueError: `level` is no target.
        TypeError: `model` is not a module.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"load got model={reprlib.repr(model)}; expected a torch.nn.Module.")
    directory = Path(directory)
    saved = read(directory)
    found = saved if level is None else _at_level(saved, directory, level)
    if model is None:
        if saved.base is None:
            raise StorageError(
                f"{directory} holds a plain module, which no library builds by name; build the dense model and "
                "pass it: load(directory, model=...)."
            )
        with bounded_building(saved.tensors, len(saved.spec.classes)):
            model = bases.build(saved.base)
    return fill(model, found, directory).eval()


def _at_level(saved: Saved, directory: Path, level: str) -> Saved:
    """The contents as if that level had been saved.

    Raises:
        StorageError: there is no such level, or its file is missing or damaged.
        ValueError: it is no target.
    """
    number = saved.levels.number_of(level, str(directory))
    if number is None:
        return saved
    file, header = read_tensors(directory / LEVELS, {record_name(number)})
    record = record_of(file, number)
    if missing := tensor_names(record, number) - file.keys():  # none of a coded file, which is read whole
        file |= read_tensors(directory / LEVELS, missing)[0]
    check_same_save(str(directory / LEVELS), header.get("save_id"), str(directory / RECORD), saved.save_id)
    spec, tensors = smaller(saved.spec, saved.tensors, record, number, file)
    return replace(saved, spec=spec, tensors=tensors)


def fill(model: nn.Module, saved: Saved, directory: Path) -> nn.Module:
    """The model with the saved shapes and values, in place.

    Raises:
        StorageError: it has other layers than the saved one.
    """
    try:
        return rebuild(model, saved.spec, saved.tensors)
    except StorageError as error:
        versions = ", ".join(f"{name} {version}" for name, version in saved.versions.items())
        raise StorageError(f"{directory} (saved with {versions}) cannot be loaded: {error}") from error


def read(directory: Path) -> Saved:
    """The contents of a saved directory.

    Raises:
        StorageError: a file is missing or damaged, or the files do not fit each other.
    """
    record = read_record(directory)
    tensors, header = read_all_tensors(directory)
    check_same_save(str(directory / TENSORS), header.get("save_id"), str(directory / RECORD), record.save_id)
    recorded = {name: shape for name, shape in record.spec.shapes.items() if name not in record.spec.tied}
    recorded |= record.spec.computed
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if problems := shape_differences(found, recorded, TENSORS):
        raise StorageError(f"{directory / TENSORS} does not fit {RECORD}.\n" + "\n".join(problems))
    return Saved(**vars(record), tensors=tensors)


def read_record(directory: Path) -> Record:
    """Reads `bayesprune.json`, and no other file.

    Raises:
        StorageError: it is missing, damaged, or of another version.
    """
    path = directory / RECORD
    record = read_json(path)
    version = record.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise StorageError(
            f"{path} has format_version {reprlib.repr(version)}; this version of bayesprune reads {FORMAT_VERSION}. "
            f"It was written with bayesprune {_versions(record).get('bayesprune', '(unknown version)')}: use "
            "that one."
        )
    save_id = record.get("save_id")
    if not isinstance(save_id, str) or not save_id:
        raise StorageError(f"{path} holds no save_id but {reprlib.repr(save_id)}. The file is damaged.")
    base = None if record.get("base") is None else BaseModel.from_json(record["base"], str(path))
    spec = ModelRecord.from_json(record.get("spec"), str(path))
    check_seal(record, str(path))
    files = record.get("files")
    levels = Levels.from_json(record.get("levels"), str(path))
    return Record(base, spec, save_id, _versions(record), files if isinstance(files, dict) else {}, levels)


def check_file(record: Record, path: Path) -> None:
    """Refuses a JSON file beside `bayesprune.json` that is not the one written with it.

    Raises:
        StorageError: it is missing, damaged or changed.
    """
    check_json(read_json(path), record.files.get(path.name), str(path))


def check_same_save(first: str, first_id: Any, second: str, second_id: Any) -> None:
    """Refuses files that two saves left behind.

    Raises:
        StorageError: their save ids differ.
    """
    if first_id != second_id:
        raise StorageError(
            f"{first} (save id {first_id}) and {second} (save id {second_id}) come from two saves: one was "
            "interrupted, or files were copied or rewritten by another tool. Save the model again."
        )


def _versions(record: dict[str, Any]) -> dict[str, str]:
    versions = record.get("versions")
    return {k: v for k, v in versions.items() if isinstance(v, str)} if isinstance(versions, dict) else {}
