"""Frozen dataclasses from JSON, checked against their annotations."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def decode(kind: type[T], data: Any, where: str = "report") -> T:
    """An instance of a dataclass from parsed JSON; unknown keys are skipped, missing ones take the field's default.

    Raises:
        ValueError: a field without a default is missing, or has another type than its annotation; the message says
            where.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where} is {_shown(data)}; expected an object.")
    hints = typing.get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name not in data:
            if field.default is not dataclasses.MISSING:
                continue
            raise ValueError(f"{where} has no {field.name!r}; it has {', '.join(map(repr, data)) or 'nothing'}.")
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
        return {key: _value(args[1], item, f"{where}.{key}") for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return decode(typing.cast("type", kind), data, where)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        data = float(data)
    _expect(kind, data, where)
    if kind is float and not math.isfinite(data):
        raise ValueError(f"{where} is {data}; expected a finite number.")
    return data


def _expect(kind: type, data: Any, where: str) -> None:
    if type(data) is not kind:
        names = {list: "a list", dict: "an object", str: "a string", int: "an integer", float: "a number"}
        raise ValueError(f"{where} is {_shown(data)}; expected {names[kind]}.")


def _shown(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:57]}..."
