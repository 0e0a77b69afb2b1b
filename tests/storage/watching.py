"""What a load opens, asks and runs beside the JSON and tensors of its directory, as Python's audit events tell it."""

import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bayesprune as bp

ALWAYS = ("socket.connect", "socket.getaddrinfo", "builtins.input", "os.system", "os.exec", "os.posix_spawn")
ALWAYS += ("subprocess.Popen", "pickle.find_class")
INSTALLED = (sys.prefix, sys.base_prefix, "/proc/", str(Path(__file__).parents[2]))
DECODED = str(Path(tempfile.gettempdir()) / "bayesprune-")  # where coded files are decoded for a stock call
PACKAGE = str(Path(bp.__file__).parent)
_WATCHES: list[tuple[str, bool, list[str]]] = []


@contextmanager
def watching(directory: Path, *, ours_alone: bool = False) -> Iterator[list[str]]:
    """The events that lead out of this directory, as they come; whoever asks for input hears "y".

    Args:
        directory: Whose JSON and tensors may be opened.
        ours_alone: Whether only events count that come while this package runs: what a library does with a file before
            it asks this package is its own affair, and hears "n".
    """
    events: list[str] = []
    stdin, sys.stdin = sys.stdin, io.StringIO(("n\n" if ours_alone else "y\n") * 9)
    _WATCHES.append((f"{directory}{os.sep}", ours_alone, events))
    try:
        yield events
    finally:
        _WATCHES.pop()
        sys.stdin = stdin


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if not _WATCHES or event not in (*ALWAYS, "open"):  # looking at frames is an event as well
        return
    directory, ours_alone, events = _WATCHES[-1]
    if ours_alone and not _is_ours():
        return
    if event in ALWAYS:
        events.append(f"{event} {arguments!r}"[:200])
    elif event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100  (no link is followed)
        is_data = path.startswith(directory) and not path.endswith((".py", ".pyc", ".bin"))
        if not is_data and not path.startswith((*INSTALLED, DECODED)):
            events.append(f"open {path}"[:200])


def _is_ours() -> bool:
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return frame is not None


sys.addaudithook(_hear)  # for good: Python has no way to take one away
