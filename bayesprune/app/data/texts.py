"""Texts for the command line, in training, validation and test splits: the user's own files, or a `datasets` name.

What is chosen is chosen on `validation`; `test` is for the final number alone. The splits do not depend on a seed.
Tables are read by `datasets`, too. TSV is read as it is usually written for language data: a tab always ends a column,
and quotation marks are text.
"""

import csv
import glob
import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bayesprune.app.data import last_tenth_of_each_class
from bayesprune.foundation.batches import IGNORED_LABEL

_LOGGER = logging.getLogger(__name__)

TEXT_COLUMNS = ("text", "sentence", "content", "review", "comment", "document", "message")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")
TABLES = (".csv", ".tsv", ".json", ".jsonl")
_PLAIN = ".txt"
_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
_NO_LABEL = -1  # what `datasets` writes where a test split's labels are kept secret


@dataclass(frozen=True)
class Columns:
    """The columns that are read.

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


@dataclass(frozen=True)
class LabelledTexts:
    """One split: texts, and the class of each as a number."""

    texts: list[str]
    labels: list[int]


@dataclass(frozen=True)
class ClassifiedTexts:
    """Texts with classes.

    Attributes:
        train: What the model learns from.
        validation: What choices are made by.
        test: For the final number.
        class_names: By number.
        are_numbered: Whether the data had numbers for classes, so that they may mean the classes of a trained model.
    """

    train: LabelledTexts
    validation: LabelledTexts
    test: LabelledTexts
    class_names: tuple[str, ...]
    are_numbered: bool


def classified_texts(spec: str, columns: Columns) -> ClassifiedTexts:
    """Texts with classes in three splits.

    Args:
        spec: A CSV, TSV, JSON or JSON lines file; a folder of files `train`, and `validation` or `test`, of such a
            kind; or a data set of `datasets`, as `hfds/NAME`, `hfds:NAME` or `hfds/NAME:CONFIGURATION`. Where a split
            is missing, the last tenth of each training class is held out for it. Rows labelled -100 are left out.
        columns: Names of the columns.

    Raises:
        ValueError: nothing can be read there, or the labels are no classes.
        ModuleNotFoundError: `datasets` is not installed, and is needed.
    """
    splits, names = _read(spec, columns)
    are_numbered = names is not None or all(_is_number(label) for label in splits["train"].labels)
    names = names or _class_names(splits["train"].labels, spec)
    numbers: dict[Any, int] = {name: number for number, name in enumerate(names)}
    found = {split: _numbered(rows, numbers, f"{spec}, {split} split") for split, rows in splits.items()}
    for split in ("test", "validation"):
        if split not in found:
            found["train"], found[split] = _held_out(found["train"])
    return ClassifiedTexts(found["train"], found["validation"], found["test"], names, are_numbered)


def plain_texts(spec: str, columns: Columns) -> dict[str, list[str]]:
    """Texts by split, as `classified_texts` without labels, from text files too; only splits that are there.

    A folder without files named after splits is a training split of all its text files.
    """
    splits, _ = _read(spec, columns)
    return {split: rows.texts for split, rows in splits.items()}


def read_rows(path: Path, columns: Columns) -> Rows:
    """The texts of one file.

    Raises:
        ValueError: the file is of another kind, is damaged, holds no rows, or lacks a column.
        ModuleNotFoundError: `datasets` is not installed.
    """
    expected = TABLES if columns.has_labels else (*TABLES, _PLAIN)
    suffix = path.suffix.lower()
    if suffix not in expected:
        raise ValueError(f"{str(path)!r} ends with {path.suffix!r}; expected {', '.join(expected)}.")
    try:
        if suffix == _PLAIN:
            return Rows([path.read_text(encoding="utf-8")], [])
        found = _table(path, suffix)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}); convert it, as with iconv.") from error
    text, label = _find_columns(found.column_names, columns, str(path))
    return _checked(list(found[text]), [] if label is None else list(found[label]), str(path))


def _read(spec: str, columns: Columns) -> tuple[dict[str, Rows], tuple[str, ...] | None]:
    """Rows by split, and the names of the classes where the data say them; a lone second split is the test split."""
    library, path = spec[:4], Path(spec)
    names = None
    if library == "hfds" and spec[4:5] in ("/", ":"):
        splits, names = _from_datasets(spec[5:], columns)
    elif path.is_dir():
        splits = {split: _together([read_rows(p, columns) for p in found]) for split, found in _files(path, columns)}
    elif path.is_file():
        splits = {"train": read_rows(path, columns)}
    else:
        raise ValueError(
            f"no file or folder {spec!r}; expected a file ({', '.join(TABLES)}), a folder with files train and "
            "validation or test, or a data set of `datasets` as hfds/NAME."
        )
    if "train" not in splits:
        raise ValueError(f"{spec!r} has no training split; it has {', '.join(splits) or 'no files that are known'}.")
    if "validation" in splits and "test" not in splits:
        splits["test"] = splits.pop("validation")
    return splits, names


def _files(folder: Path, columns: Columns) -> list[tuple[str, list[Path]]]:
    suffixes = TABLES if columns.has_labels else (*TABLES, _PLAIN)
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file())
    found = [(split, [p for p in files if p.stem.lower() in names]) for split, names in _NAMES.items()]
    if doubled := next((paths for _, paths in found if len(paths) > 1), None):
        raise ValueError(f"{folder} has both {' and '.join(p.name for p in doubled)}; keep one of them there.")
    if not columns.has_labels and not any(paths for _, paths in found):
        found = [("train", [path for path in files if path.suffix.lower() == _PLAIN])]
    return [(split, paths) for split, paths in found if paths]


def _together(parts: Sequence[Rows]) -> Rows:
    return Rows([text for part in parts for text in part.texts], [label for part in parts for label in part.labels])


def _find_columns(names: Sequence[str], columns: Columns, where: str) -> tuple[str, str | None]:
    """Names of the column of texts and of that of labels; None for those of a task without labels."""
    text = _find(names, columns.text, TEXT_COLUMNS, "text", where)
    return text, _find(names, columns.label, LABEL_COLUMNS, "label", where) if columns.has_labels else None


def _checked(texts: Sequence[Any], labels: Sequence[Any], where: str) -> Rows:
    """The same as rows, none of which lacks its text or label, but those whose label says that they do not count."""
    if not texts:
        raise ValueError(f"{where} holds no rows.")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise ValueError(f"{where}: the text of row {number} is {text!r}; expected a string.")
    for number, label in enumerate(labels, start=1):
        if label is None or label == "":
            raise ValueError(f"{where}: row {number} has no label; fill it in, or leave the row out.")
    ignored = {number for number, label in enumerate(labels) if str(label).strip() == str(IGNORED_LABEL)}
    if not ignored:
        return Rows(list(texts), list(labels))
    if len(ignored) == len(labels):
        raise ValueError(f"{where}: every label is {IGNORED_LABEL}, with which a row does not count; expected classes.")
    _LOGGER.warning("%s: %d rows are left out: their label %d does not count", where, len(ignored), IGNORED_LABEL)
    counted = [number for number in range(len(texts)) if number not in ignored]
    return Rows([texts[number] for number in counted], [labels[number] for number in counted])


def _table(path: Path, suffix: str) -> Any:
    """A data set of `datasets`; the cells of CSV and TSV are strings, whatever they look like."""
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty; expected rows of texts.")
    datasets = _datasets(str(path))
    kind, options = "json", {}
    expected = 'a list of objects such as {"text": "good", "label": 1}, or one of them per line'
    if suffix in (".csv", ".tsv"):
        kind, expected = "csv", "a first line of names, then rows of as many columns, texts with commas in quotes"
        dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {}
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next((row for row in csv.reader(file, **dialect) if row), [])
        names = [name or f"Unnamed: {index}" for index, name in enumerate(names)]  # as pandas calls them
        options = dialect | {"encoding": "utf-8-sig", "keep_default_na": False, "index_col": False}
        options["features"] = datasets.Features({name: datasets.Value("string") for name in names})
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Length of header")  # pandas would drop the last columns
            return datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError, StopIteration) as error:
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            raise cause from error
        raise ValueError(f"{path} cannot be read ({str(cause).strip()}); expected {expected}, in UTF-8.") from error


def _find(names: Sequence[str], given: str | None, usual: Sequence[str], what: str, where: str) -> str:
    lowered = [name.strip().lower() for name in names]
    if given is not None and given in names:
        return given
    for name in () if given is not None else usual:
        if name in lowered:
            return names[lowered.index(name)]
    asked = f"no column {given!r}" if given is not None else f"no column of {what}s, such as {', '.join(usual[:2])}"
    raise ValueError(f"{where} has {asked}; it has {', '.join(map(repr, names))}. Name one with --{what}-column.")


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{what} is read by datasets, which is not installed: pip install "bayesprune[transformers]"'
        ) from error
    datasets.disable_progress_bars()
    return datasets


def _from_datasets(name: str, columns: Columns) -> tuple[dict[str, Rows], tuple[str, ...] | None]:
    datasets = _datasets(f"hfds/{name}")
    path, _, configuration = name.partition(":")
    loaded: Any = datasets.load_dataset(path, configuration or None)
    splits, class_names = {}, None
    for split, usual in _NAMES.items():
        if (key := next((key for key in usual if key in loaded), None)) is None:
            continue
        found, where = loaded[key], f"hfds/{name}, {key} split"
        text, label = _find_columns(found.column_names, columns, where)
        labels = [] if label is None else list(found[label])
        if labels and set(labels) <= {_NO_LABEL, IGNORED_LABEL}:
            continue
        if label is not None and isinstance(feature := found.features[label], datasets.ClassLabel):
            class_names = tuple(class_name.strip() for class_name in feature.names)
            labels = [class_names[number] if number >= 0 else str(number) for number in labels]
        splits[split] = _checked(list(found[text]), labels, where)
    return splits, class_names


def _class_names(labels: Sequence[Any], spec: str) -> tuple[str, ...]:
    """The different labels in order: of their numbers, else of the alphabet."""
    counts = Counter(str(label).strip() for label in labels)
    is_number = all(_is_number(label) for label in labels)
    if any(isinstance(label, float | list | dict) for label in labels):
        raise ValueError(f"{spec}: labels such as {labels[0]!r} are no classes; expected whole numbers or names.")
    if len(counts) < 2:
        raise ValueError(f"{spec}: all labels are {next(iter(counts))!r}; expected two classes or more.")
    if len(counts) > max(2, len(labels) // 2):
        raise ValueError(
            f"{spec}: {len(counts)} different labels in {len(labels)} rows, such as {next(iter(counts))!r}, are no "
            "classes. Name the right column with --label-column."
        )
    return tuple(sorted(counts, key=int if is_number else None))


def _numbered(rows: Rows, numbers: Mapping[str, int], where: str) -> LabelledTexts:
    labels = [str(label).strip() for label in rows.labels]
    if unknown := sorted(set(labels) - numbers.keys()):
        raise ValueError(
            f"{where}: the label {unknown[0]!r} is none of the training split's, which are {', '.join(numbers)}."
        )
    return LabelledTexts(rows.texts, [numbers[label] for label in labels])


def _held_out(split: LabelledTexts) -> tuple[LabelledTexts, LabelledTexts]:
    parts = last_tenth_of_each_class(torch.tensor(split.labels), what="text")
    kept, held_out = (LabelledTexts([split.texts[i] for i in p], [split.labels[i] for i in p]) for p in parts)
    return kept, held_out


def _is_number(label: Any) -> bool:
    is_number = isinstance(label, int) and not isinstance(label, bool)
    return is_number or (isinstance(label, str) and label.strip().lstrip("+-").isdigit())
