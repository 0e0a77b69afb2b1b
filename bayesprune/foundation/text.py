"""Text for people: tables as plain text, the first of many names, and texts from a file made harmless."""

import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType


def as_text(*parts: RenderableType, width: int = 120) -> str:
    """Tables and lines one after the other, without colour; brackets in lines stay as they are."""
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        for part in parts:
            console.print(part, markup=False, highlight=False)
    return capture.get()


def first_names(names: Iterable[Any], *, most: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(map(str, names))
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def quoted(text: Any) -> str:
    """The text as a string of Python, as a path stands in a program."""
    return json.dumps(str(text), ensure_ascii=False)


_LONGEST = 200


def printable(text: str, longest: int = _LONGEST) -> str:
    """The text on one line, its middle left out where it is long.

    What would move the cursor, change colours, or turn the order of letters around stands there as an escape.
    """
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-(longest // 2) :]}"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
