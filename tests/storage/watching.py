"""What a load opens, asks and runs beside the JSON and tensors of its directory, as Python's audit events tell it."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ALWAYS = ("socket.connect", "socket.getaddrinfo", "builtins.input", "os.system", "os.exec", "os.posix_spawn")
ALWAYS += ("subprocess.Popen", "pickle.find_class")
INSTALLED = (sys.prefix, sys.base_prefix, "/proc/", str(Path(__file__).parents[2]))
_WATCHES: list[tuple[str, list[str]]] = []


@contextmanager
def watching(directory: Path) -> Iterator[list[str]]:
    """The events that lead out of this directory, as they come; whoever asks for input hears "y"."""
    events: list[str] = []
    stdin, sys.stdin = sys.stdin, io.StringIO("y\n" * 9)
    _WATCHES.append((f"{directory}{os.sep}", events))
    try:
        yield events
    finally:
        _WATCHES.pop()
        sys.stdin = stdin


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if not _WATCHES:
        return
    directory, events = _WATCHES[-1]
    if event in ALWAYS:
        events.append(f"{event} {arguments!r}"[:200])
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100  (no link is followed)
        is_data = path.startswith(directory) and not path.endswith((".py", ".pyc", ".bin"))
        if not is_data and not path.startswith(INSTALLED):
            events.append(f"open {path}"[:200])


sys.addaudithook(_hear)  # for good: Python has no way to take one away
