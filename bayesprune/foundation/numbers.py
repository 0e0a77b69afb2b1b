"""Numbers that a function of the user returned, and losses to be differentiated."""

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


def as_loss(value: Any, source: str) -> Tensor:
    """The value, if it is a tensor of one number that has a gradient.

    Args:
        value: What was returned.
        source: What returned it, for the message.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise TypeError(
            f"{source} returned {reprlib.repr(value)}; expected a tensor of one number that has a gradient, a mean "
            "over examples: no float, as .item() gives, and nothing that was computed without gradients."
        )
    return value
