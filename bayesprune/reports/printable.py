"""Texts from a file as they may be shown: on a terminal, in a table, on a page."""

_LONGEST = 200


def printable(text: str, longest: int = _LONGEST) -> str:
    """The text on one line, its middle left out where it is long.

    What would move the cursor, change colours, or turn the order of letters around stands there as an escape.
    """
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[-(longest // 2) :]}"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
