"""JSON from a file that is not to be trusted: bounded before anything is made of it, and as frozen dataclasses."""

import dataclasses
import json
import math
import reprlib
import types
import typing
import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

from bayesprune.errors import StorageError
from bayesprune.foundation.text import printable

MAX_BYTES = 64 * 2**20
MAX_VALUES = 10**6  # an empty list takes three bytes of a file and a hundred of memory
MAX_DEPTH = 100
_MAX_INFLATED = 16 * 2**20


def parse_json(data: bytes, where: str) -> Any:
    """The value of JSON text whose size is bounded before anything is made of it.

    Args:
        data: The text.
        where: What holds it, for the message.

    Raises:
        StorageError: it is too large or nested too deeply, is not JSON, or names a key twice.
    """
    if len(data) > MAX_BYTES:
        raise StorageError(f"{where} has more than {MAX_BYTES:,} bytes, which is the most that is read.")
    if (count := sum(map(data.count, (b",", b"[", b"{")))) > MAX_VALUES:
        raise StorageError(f"{where} has some {count:,} values; expected at most {MAX_VALUES:,}.")
    too_deep = StorageError(f"{where} is nested too deeply; expected at most {MAX_DEPTH} levels.")
    try:
        value = json.loads(data, object_pairs_hook=_once)
    except RecursionError as error:
        raise too_deep from error
    except ValueError as error:  # not UTF-8, not JSON
        raise StorageError(f"{where} is not valid JSON: {error}. It is damaged or truncated; save again.") from error
    if _depth(value) > MAX_DEPTH:
        raise too_deep
    return value


def deflated(value: Any) -> bytes:
    """A JSON value in few bytes."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(json.dumps(value, separators=(",", ":")).encode()) + deflate.flush()


def inflated(data: bytes, where: str) -> Any:
    """The JSON value that `deflated` was given, its size bounded before anything is made of it.

    Raises:
        StorageError: it cannot be inflated, is too large, or is not JSON.
    """
    try:
        text = zlib.decompressobj(-15).decompress(data, _MAX_INFLATED)
    except zlib.error as error:
        raise StorageError(f"{where} cannot be inflated ({error}). It is damaged: save the model again.") from error
    return parse_json(text, where)


def _depth(value: Any) -> int:
    """How many lists and objects stand inside each other, found without recursion."""
    depth, level = 0, [value]
    while level := [node for node in level if isinstance(node, (dict, list))]:
        depth += 1
        level = [item for node in level for item in (node.values() if isinstance(node, dict) else node)]
    return depth


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; of a key that stands there twice, readers would take one or the other."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("it names a key twice in one object")
    return value


T = TypeVar("T")

_LARGEST = {int: 2**63, float: 1e100}
_LONGEST = 2_000


def decode(kind: type[T], data: Any, where: str = "report") -> T:
    """An instance of a dataclass from parsed JSON; unknown keys are skipped, missing ones take the field's default.

    Raises:
        ValueError: a field without a default is missing, has another type than its annotation, or is a number that
            nothing measured has; the message says where.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where} is {_shown(data)}; expected an object.")
    hints = typing.get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in data:
            if field.default is not dataclasses.MISSING:
                continue
            found = ", ".join(_shown(key) for key in list(data)[:20]) or "nothing"
            raise ValueError(f"{where} has no {field.name!r}; it has {found}.")
        values[field.name] = _value(hints[field.name], data[field.name], f"{where}.{field.name}")
    return kind(**values)


def _value(kind: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        inner = next(arg for arg in args if arg is not type(None))
        return None if data is None else _value(inner, data, where)
    if origin is tuple:
        _expect(list, data, where)
        return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin in (dict, Mapping):
        _expect(dict, data, where)
        return {printable(key): _value(args[1], item, f"{where}.{printable(key)}") for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return decode(typing.cast("type", kind), data, where)
    if kind is float and type(data) is int and abs(data) <= _LARGEST[int]:
        data = float(data)
    _expect(kind, data, where)
    if kind is float and not math.isfinite(data):
        raise ValueError(f"{where} is {data}; expected a finite number.")
    if kind in _LARGEST and abs(data) > _LARGEST[kind]:
        raise ValueError(f"{where} is {_shown(data)}; expected at most {_LARGEST[kind]:g}.")
    return printable(data, _LONGEST) if isinstance(data, str) else data


def _expect(kind: type, data: Any, where: str) -> None:
    if type(data) is not kind:
        names = {list: "a list", dict: "an object", str: "a string", int: "an integer", float: "a number"}
        raise ValueError(f"{where} is {_shown(data)}; expected {names[kind]}.")


def _shown(data: Any) -> str:
    return printable(reprlib.repr(data), 60)
