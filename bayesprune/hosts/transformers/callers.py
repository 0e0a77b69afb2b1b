"""Whose method is running: what the Trainer hands to no callback, such as itself, is found with the caller."""

import sys
from typing import TypeVar

_T = TypeVar("_T")


def nearest_caller(kind: type[_T]) -> _T | None:
    """The object of this kind whose method is running, the innermost of several; None outside all of them."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(caller := frame.f_locals.get("self"), kind):
            return caller
        frame = frame.f_back
    return None
