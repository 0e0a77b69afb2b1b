"""Targets of a removal in one grammar: "macs=0.5", "weights=0.2", "snr=1", "2:4". Every number says what is kept.

The library, the callback, the tasks, the command line and the report read and write the same words.
"""

import math
import reprlib
from collections.abc import Collection
from dataclasses import dataclass

FRACTIONS = ("macs", "params", "latency", "weights")
PATTERN = "N:M"
_EXAMPLES = {
    "macs": '"macs=0.5" (half of the multiply-accumulates are kept)',
    "params": '"params=0.5" (half of the parameters are kept)',
    "latency": '"latency=0.7" (a forward on the example inputs takes 0.7 of its time)',
    "weights": '"weights=0.2" (a fifth of the single weights is kept)',
    "bytes": '"bytes=50000" (the tensors take at most so many bytes)',
    "snr": '"snr=1" (what has a signal-to-noise ratio of 1 or more is kept)',
    "evidence": '"evidence=0" (what the log evidence, in nats, does not count against is kept)',
    "inclusion": '"inclusion=0.5" (what is included with this probability or more is kept)',
    PATTERN: '"2:4" (the best 2 of every 4 consecutive inputs are kept)',
}


@dataclass(frozen=True)
class Target:
    """The share of a model that a removal keeps; prints as it was written.

    Attributes:
        kind: "macs", "params", "latency", "weights", "bytes", "snr", "evidence", "inclusion" or "N:M".
        value: The number behind the "="; the fraction N / M of a pattern.
        pattern: (N, M) of a pattern.
    """

    kind: str
    value: float
    pattern: tuple[int, int] | None = None

    @classmethod
    def parse(
        cls, target: "str | Target", kinds: Collection[str], caller: str, *, is_partial: bool = False
    ) -> "Target":
        """The target that a text names.

        Args:
            target: A text such as "macs=0.5", or a target, which is checked alike.
            kinds: What the caller can meet.
            caller: Who says so in errors.
            is_partial: Refuses a fraction of weights that keeps all or nothing.

        Raises:
            ValueError: it is not in the grammar, none of these kinds, or its number is out of range.

        Examples:
            >>> Target.parse("weights=0.2", ("weights", "N:M"), "prune_weights")
            Target(kind='weights', value=0.2, pattern=None)
        """
        found = _read(str(target)) if isinstance(target, str | Target) else None
        if found is None or found.kind not in kinds:
            expected = ", ".join(_EXAMPLES[kind] for kind in kinds)
            raise ValueError(f"{caller} got the target {reprlib.repr(target)}; expected a text like {expected}.")
        if complaint := found.complaint():
            raise ValueError(f"{caller} got the target {str(target)!r}; {complaint}.")
        if is_partial and found.kind == "weights" and not 0 < found.value < 1:
            raise ValueError(f"{caller} got the target {str(target)!r}; expected a fraction between 0 and 1.")
        return found

    @property
    def removed(self) -> float:
        """The fraction that is removed, of a target that keeps one."""
        return 1 - self.value

    def complaint(self) -> str:
        """The reason why the number cannot be met; empty where it can."""
        if self.kind == PATTERN:
            return "" if self.pattern and 0 < self.pattern[0] < self.pattern[1] else 'expected "N:M" with 0 < N < M'
        ranges = {
            "weights": (0 <= self.value <= 1, "the fraction of the weights to keep, from 0 to 1"),
            "bytes": (0 < self.value < math.inf, "a number of bytes above 0"),
            "snr": (0 <= self.value < math.inf, "a ratio of 0 or more, usually 1"),
            "evidence": (abs(self.value) < math.inf, "a number of nats, usually 0"),
            "inclusion": (0 < self.value < 1, "a probability between 0 and 1, usually 0.5"),
        }
        fraction = (0 < self.value < 1, f"the fraction of the {self.kind} to keep, between 0 and 1")
        is_fine, expected = ranges.get(self.kind, fraction)
        return "" if is_fine else f"expected {expected}"

    def __str__(self) -> str:
        """The text that names it."""
        return "{}:{}".format(*self.pattern) if self.pattern else f"{self.kind}={float(self.value)!r}"


def _read(text: str) -> Target | None:
    n, colon, m = text.partition(":")
    if colon and n.strip().isdigit() and m.strip().isdigit():
        pattern = int(n), int(m)
        return Target(PATTERN, pattern[0] / pattern[1] if pattern[1] else math.nan, pattern)
    kind, _, number = text.partition("=")
    try:
        return Target(kind.strip(), float(number))
    except ValueError:
        return None
