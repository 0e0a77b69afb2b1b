"""Settings of the propagation of moments, which hold for every rule."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

COVARIANCES = ("shared", "diagonal", "low_rank")


@dataclass(frozen=True)
class Settings:
    """The choices.

    Attributes:
        covariance: "shared": beside the variance of each entry, the covariance that positions of one channel (or tokens
            of one feature) have because they met the same weights; "diagonal": none, every entry on its own;
            "low_rank": that of all entries, along random directions, at the cost of as many samples.
        taylor: First-order rules for elementwise functions, f(m) and f'(m)^2 v (Dera et al., 2019), in place of the
            expectations under a Gaussian.
        num_nodes: Gauss-Hermite nodes of elementwise functions without a closed form.
        num_directions: Directions K of the low-rank covariance.
    """

    covariance: str = "shared"
    taylor: bool = False
    num_nodes: int = 5
    num_directions: int = 8

    def __post_init__(self) -> None:
        if self.covariance not in COVARIANCES:
            raise ValueError(f"covariance is {self.covariance!r}; expected one of {', '.join(COVARIANCES)}.")
        for name, least in (("num_nodes", 2), ("num_directions", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected at least {least}.")


_DEFAULT = Settings()
_CURRENT: ContextVar[Settings] = ContextVar("bayesprune_moments", default=_DEFAULT)


def current() -> Settings:
    """The settings that hold now."""
    return _CURRENT.get()


def is_low_rank() -> bool:
    """Whether the covariance of everything is followed along directions."""
    return current().covariance == "low_rank"


@contextmanager
def settings(**changes: Any) -> Iterator[Settings]:
    """Inside, moments are propagated with these attributes of `Settings` changed.

    Examples:
        >>> import bayesprune as bp
        >>> with bp.moments.settings(covariance="diagonal", taylor=True) as chosen:
        ...     chosen.num_nodes
        5

    Raises:
        TypeError: there is no such setting.
        ValueError: its value is none of those allowed.
    """
    token = _CURRENT.set(replace(_CURRENT.get(), **changes))
    try:
        yield _CURRENT.get()
    finally:
        _CURRENT.reset(token)
