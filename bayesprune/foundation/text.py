"""Text for people: tables as plain text, and the first of many names."""

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
