"""Texts, and labels where a task has them, from the user's own files: CSV, TSV, JSON, JSON lines, plain text.

TSV is read as it is usually written for language data: a tab always ends a column, and quotation marks are text.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT_COLUMNS = ("text", "sentence", "content", "review", "comment", "document", "message")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")
TABLES = (".csv", ".tsv", ".json", ".jsonl")
_PLAIN = ".txt"
_LARGEST_FIELD = 1 << 24


@dataclass(frozen=True)
class Columns:
    """Which columns are read.

    Attributes:
        text: Name of the column of texts; None finds one by a usual name.
        label: Name of the column of labels; None finds one by a usual name.
        has_labels: Whether the task has labels.
    """

    text: str | None = None
    label: str | None = None
    has_labels: bool = True


@dataclass(frozen=True)
class Rows:
    """Texts with their labels as they were written; no labels where the task has none."""

    texts: list[str]
    labels: list[Any]


def read_rows(path: Path, columns: Columns) -> Rows:
    """The texts of one file.

    Raises:
        ValueError: the file is of another kind, is damaged, or lacks a column.
        FileNotFoundError: it is not there.
    """
    expected = TABLES if columns.has_labels else (*TABLES, _PLAIN)
    if path.suffix.lower() not in expected:
        raise ValueError(f"{str(path)!r} ends with {path.suffix!r}; expected {', '.join(expected)}.")
    try:
        if path.suffix.lower() == _PLAIN:
            return Rows([path.read_text(encoding="utf-8")], [])
        if path.suffix.lower() in (".json", ".jsonl"):
            names, rows = _objects(path)
        else:
            names, rows = _lines(path, columns)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}); convert it, as with iconv.") from error
    found = [list(names).index(name) for name in find_columns(names, columns, str(path)) if name is not None]
    picked = [[row[index] for row in rows] for index in found]
    return checked(picked[0], picked[1] if columns.has_labels else [], str(path))


def find_columns(names: Sequence[str], columns: Columns, where: str) -> tuple[str, str | None]:
    """Names of the column of texts and of that of labels; None for those of a task without labels.

    Raises:
        ValueError: there is none of a usual name, or of the given one.
    """
    text = _find(names, columns.text, TEXT_COLUMNS, "text", where)
    return text, _find(names, columns.label, LABEL_COLUMNS, "label", where) if columns.has_labels else None


def checked(texts: Sequence[Any], labels: Sequence[Any], where: str) -> Rows:
    """The same as rows.

    Raises:
        ValueError: a text or a label is missing, or there are none.
    """
    if not texts:
        raise ValueError(f"{where} holds no rows.")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise ValueError(f"{where}: the text of row {number} is {text!r}; expected a string.")
    for number, label in enumerate(labels, start=1):
        if label is None or label == "":
            raise ValueError(f"{where}: row {number} has no label; fill it in, or leave the row out.")
    return Rows(list(texts), list(labels))


def _lines(path: Path, columns: Columns) -> tuple[Sequence[str], list[list[str]]]:
    """Names and rows of a table; two columns without names are taken where one of them holds nothing but numbers."""
    is_tsv = path.suffix.lower() == ".tsv"
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {}
    csv.field_size_limit(_LARGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **options)
        try:
            rows = [(reader.line_num, row) for row in reader if row]
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}.") from error
    if not rows:
        raise ValueError(f"{path} is empty.")
    names = rows[0][1]
    for line, row in rows:
        if len(row) != len(names):
            raise ValueError(
                f"{path}, line {line}: {len(row)} columns, but the first line has {len(names)}; expected "
                f"{'tabs between columns and nowhere else' if is_tsv else 'texts with commas in quotation marks'}."
            )
    cells = [row for _, row in rows]
    if _has_names(names, columns) or columns.text or columns.label:
        return names, cells[1:]
    if not columns.has_labels and len(names) == 1:
        return ["text"], cells
    numeric = [all(_is_integer(row[index]) for row in cells) for index in range(len(names))]
    if columns.has_labels and sorted(numeric) == [False, True]:
        return ["label" if is_number else "text" for is_number in numeric], cells
    raise ValueError(
        f"{path} begins with {', '.join(map(repr, names[:4]))}, which names no column that is known; expected a first "
        f"line of names with one of {', '.join(TEXT_COLUMNS)}"
        + (
            f" and one of {', '.join(LABEL_COLUMNS)}; or two columns, a text and a number."
            if columns.has_labels
            else "."
        )
        + " Other names are given by --text-column and --label-column."
    )


def _has_names(first: Sequence[str], columns: Columns) -> bool:
    """Whether a table's first line names its columns."""
    known = {*TEXT_COLUMNS, *LABEL_COLUMNS} | {name.lower() for name in (columns.text, columns.label) if name}
    return any(cell.strip().lower() in known for cell in first)


def _objects(path: Path) -> tuple[Sequence[str], list[list[Any]]]:
    """Names and rows of a list of objects, or of one object per line."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is no JSON: {error}.") from error
    else:
        found = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                found += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                expected = 'expected one object per line, such as {"text": "good", "label": 1}, or a list of them'
                raise ValueError(f"{path}, line {number}: {error}; {expected}.") from error
    for number, item in enumerate(found, start=1):
        if not isinstance(item, dict):
            raise ValueError(f"{path}: item {number} is {str(item)[:40]!r}; expected an object with a text.")
    names = list(dict.fromkeys(name for item in found for name in item))
    return names, [[item.get(name) for name in names] for item in found]


def _find(names: Sequence[str], given: str | None, usual: Sequence[str], what: str, where: str) -> str:
    lowered = [name.strip().lower() for name in names]
    if given is not None and given in names:
        return given
    for name in () if given is not None else usual:
        if name in lowered:
            return names[lowered.index(name)]
    asked = f"no column {given!r}" if given is not None else f"no column of {what}s, such as {', '.join(usual[:2])}"
    raise ValueError(f"{where} has {asked}; it has {', '.join(map(repr, names))}. Name one with --{what}-column.")


def _is_integer(cell: str) -> bool:
    return cell.strip().lstrip("+-").isdigit()
