"""Progress bars: on a terminal alone, and only once something has taken a while."""

import os
from collections.abc import Iterable, Sized
from typing import Any, TypeVar

from tqdm import tqdm

_Item = TypeVar("_Item")
_DELAY = 2.0  # seconds before a bar shows


def progress_bar(
    items: Iterable[_Item] | None,
    title: str,
    unit: str,
    *,
    total: int | None = None,
    progress: bool | None = None,
) -> "tqdm[_Item]":
    """A bar over these items, or one that `update` moves; it is gone once it is closed.

    Args:
        items: What is gone through; None where there is a `total`, or nothing to count to.
        title: What it says in front.
        unit: What is counted.
        total: How many there are; None is the length of the items, where they have one.
        progress: False hides it, True shows it at once; None shows it on a terminal after two seconds, unless the
            environment has TQDM_DISABLE.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    is_hidden: bool | None = None if progress is None else not progress
    if progress is None and os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false"):
        is_hidden = True
    options: dict[str, Any] = {"total": total, "desc": title, "unit": unit, "disable": is_hidden, "leave": False}
    bar: Any = tqdm(items, delay=0.0 if progress else _DELAY, **options)
    return bar
