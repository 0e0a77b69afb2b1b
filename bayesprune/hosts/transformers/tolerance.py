"""The loss of accuracy that a compression accepts, and what happens beyond it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_TIE_BREAK = 1e-3  # the most that a metric counts beside a sparsity of 1


@dataclass(frozen=True)
class Tolerance:
    """Ends the training at the first evaluation, after weights began to go, that is worse than the best by too much.

    Attributes:
        drop: By how much the metric may be worse than the reference, in the metric's own unit.
        metric: Name of an evaluation metric, with or without "eval_". It is better when larger, unless its name ends
            with "loss", as for `metric_for_best_model`. Of several evaluation sets, {"a": ..., "b": ...}, one is named:
            "a_loss".
        then: "rollback" puts the model of the last evaluation within the tolerance back, kept on the CPU until then;
            "stop" leaves the model as it is.
        reference: What the metric is compared with; None is its best value so far.
    """

    drop: float
    metric: str = "loss"
    then: Literal["rollback", "stop"] = "rollback"
    reference: float | None = None

    def __post_init__(self) -> None:
        if not self.drop >= 0:
            raise ValueError(f"drop is {self.drop!r}; expected 0 or more, in the unit of {self.metric!r}.")
        if self.then not in ("rollback", "stop"):
            raise ValueError(f'then is {self.then!r}; expected "rollback" or "stop".')

    @property
    def key(self) -> str:
        """The metric's name among evaluation metrics."""
        return self.metric if self.metric.startswith("eval_") else f"eval_{self.metric}"

    def shortfall(self, metrics: Mapping[str, Any], log_history: Sequence[Mapping[str, Any]]) -> float | None:
        """By how much an evaluation is worse than the reference, below 0 where it is better; None for other logs.

        Raises:
            ValueError: the evaluation, of the only set, has no such metric.
        """
        if self.key not in metrics:
            if evaluation_prefix(metrics) == "eval":
                self.check(metrics)
            return None
        sign = self._sign
        value = sign * metrics[self.key]
        if self.reference is not None:
            return sign * self.reference - value
        return max((sign * entry[self.key] for entry in log_history if self.key in entry), default=value) - value

    def check(self, names: Collection[str]) -> None:
        """Refuses evaluations without the metric.

        Args:
            names: Of what was evaluated, on all sets.

        Raises:
            ValueError: the metric is not among them.
        """
        if self.key not in names:
            raise ValueError(
                f"the evaluation has no {self.key}; it has {', '.join(sorted(names))}. Name one of them in "
                "Tolerance(metric=...), or pass compute_metrics to the Trainer."
            )

    def is_exceeded(self, shortfall: float) -> bool:
        """Whether the metric fell too far; NaN has."""
        return not shortfall <= self.drop

    def score(self, sparsity: float, metrics: Mapping[str, Any], shortfall: float) -> float:
        """For `metric_for_best_model`: the sparsity within the tolerance, the better metric among equals; else < 0."""
        if self.is_exceeded(shortfall):
            return -shortfall
        value = self._sign * metrics[self.key]
        return sparsity + _TIE_BREAK * 0.5 * (1 + value / (1 + abs(value)))  # never below 0, as what exceeds it is

    @property
    def _sign(self) -> int:
        return -1 if self.metric.endswith("loss") else 1


def evaluation_prefix(metrics: Mapping[str, Any]) -> str | None:
    """The prefix of an evaluation's metrics, "eval" by default; None for other logs."""
    prefixes = [key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")]
    return prefixes[0] if prefixes and prefixes[0] != "train" else None
