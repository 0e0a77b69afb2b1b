"""Numbers that a function of the user returned."""

import reprlib
from typing import Any

from torch import Tensor


def as_number(value: Any, source: str) -> float:
    """The value as a float, which may be infinite or NaN.

    Args:
        value: What was returned: a number, or a tensor of one.
        source: What returned it, for the message.

    Raises:
        TypeError: it is no number.
    """
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(
            f"{source} returned {reprlib.repr(value)}; expected a number, or a tensor that holds one."
        ) from None
