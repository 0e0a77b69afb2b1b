"""How moments are propagated: the choices that hold for every rule."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

COVARIANCES = ("shared", "diagonal", "low_rank")
MAX_POOLS = ("argmax", "clark")
LIKELIHOODS = ("second_order", "sampling")


@dataclass(frozen=True)
class Settings:
    """The choices.

    Attributes:
        covariance: "shared": beside the variance of each entry, the covariance that positions of one channel (or tokens
            of one feature) have because they met the same weights; "diagonal": none, every entry on its own;
            "low_rank": that of all entries, along random directions, at the cost of as many samples.
        taylor: First-order rules for elementwise functions, f(m) and f'(m)^2 v (Dera et al., 2019), in place of the
            expectations under a Gaussian.
        max_pool: "argmax": the variance where the mean is largest (Dera et al., 2019); "clark": the moments of the
            maximum (Clark, 1961).
        num_nodes: Gauss-Hermite nodes of elementwise functions without a closed form.
        num_directions: Directions K of the low-rank covariance.
        likelihood: Expected cross-entropy of uncertain logits; "second_order": in their variances, without noise;
            "sampling": the average over draws of the logits, unbiased however wide they are.
        num_logit_samples: Draws of the logits.
    """

    covariance: str = "shared"
    taylor: bool = False
    max_pool: str = "argmax"
    num_nodes: int = 5
    num_directions: int = 8
    likelihood: str = "second_order"
    num_logit_samples: int = 8

    def __post_init__(self) -> None:
        choices = {"covariance": COVARIANCES, "max_pool": MAX_POOLS, "likelihood": LIKELIHOODS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}.")
        for name, least in (("num_nodes", 2), ("num_directions", 1), ("num_logit_samples", 1)):
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

    Example:
        >>> import bayesprune as bp
        >>> with bp.moments.settings(covariance="diagonal", taylor=True) as chosen:
        ...     chosen.max_pool
        'argmax'

    Raises:
        TypeError: there is no such setting.
        ValueError: its value is none of those allowed.
    """
    token = _CURRENT.set(replace(_CURRENT.get(), **changes))
    try:
        yield _CURRENT.get()
    finally:
        _CURRENT.reset(token)
