"""What `compress` found: the model, and the score over the size of everything that it tried."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from torch import nn

from bayesprune.tables import as_text

UNITS = {"channels": "MACs", "weights": "weights"}
"""What is counted where these are removed."""


@dataclass(frozen=True)
class Trial:
    """One model: the fraction kept of MACs or weights, its score, and whether that is within the tolerance."""

    kept: float
    score: float
    accepted: bool


@dataclass(frozen=True)
class Compression:
    """The smallest model that was found within the tolerance, and all that was tried; prints as a table.

    Attributes:
        model: The very model that was evaluated, or a copy of the uncut one where no trial was accepted.
        trials: In the order of the search, the uncut model first.
        what: What was removed, "channels" or "weights".
        reference: The score that the others were compared with.
        tolerance: Largest loss of it that was accepted.
    """

    model: nn.Module
    trials: tuple[Trial, ...]
    what: str
    reference: float
    tolerance: float

    @property
    def curve(self) -> tuple[Trial, ...]:
        """The trials from the largest model to the smallest."""
        return tuple(sorted(self.trials, key=lambda trial: trial.kept, reverse=True))

    def to_dict(self) -> dict[str, Any]:
        """All but the model, for JSON: the curve under "trials"."""
        options = {"what": self.what, "reference": self.reference, "tolerance": self.tolerance}
        return options | {"trials": [asdict(trial) for trial in self.curve]}

    def __str__(self) -> str:
        """The curve as plain text."""
        smallest = min((trial.kept for trial in self.trials if trial.accepted), default=None)
        found = "nothing within the tolerance" if smallest is None else f"{smallest:.2%} of the {UNITS[self.what]} kept"
        table = Table("kept", "score", "loss", "")
        for trial in self.curve:
            verdict = "smallest" if trial.accepted and trial.kept == smallest else "" if trial.accepted else "too low"
            table.add_row(f"{trial.kept:.2%}", f"{trial.score:.4f}", f"{self.reference - trial.score:.4f}", verdict)
        return as_text(f"{found} (tolerance {self.tolerance:g})", table)
