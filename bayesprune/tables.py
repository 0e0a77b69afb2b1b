"""What reports print, as plain text."""

from rich.console import Console, RenderableType


def as_text(*parts: RenderableType, width: int = 120) -> str:
    """Tables and lines one after the other, without colour; brackets in lines stay as they are."""
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        for part in parts:
            console.print(part, markup=False, highlight=False)
    return capture.get()
