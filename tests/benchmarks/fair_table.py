"""The results of the fair comparison as Markdown."""

from typing import Any


def markdown(rows: list[dict[str, Any]]) -> str:
    return ""
