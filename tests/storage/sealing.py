"""Gives a directory whose files a test changed the digests that fit, so that what lies behind that check is tested."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bayesprune.storage.digests import json_digest, sealed
from bayesprune.storage.reading import RECORD


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes the value of a JSON file in place, and the digests of its directory accordingly."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    reseal(path.parent)


def reseal(directory: Path) -> None:
    """Writes digests that fit the JSON files as they are."""
    record = json.loads((directory / RECORD).read_text())
    files = record.get("files")
    for name in [name for name in files if (directory / name).is_file()] if isinstance(files, dict) else []:
        record["files"][name] = json_digest(json.loads((directory / name).read_text()))
    (directory / RECORD).write_text(json.dumps(sealed(record)))
