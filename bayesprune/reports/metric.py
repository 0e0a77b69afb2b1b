"""What says how good a model is: the name of the number, and which way is better."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """The number that `evaluate` returns.

    Attributes:
        name: As readers of a report know it.
        is_lower_better: Whether a smaller number is a better model.
    """

    name: str
    is_lower_better: bool = False

    def shown(self, value: float) -> str:
        """The value with its name; an accuracy in percent."""
        return f"{self.name} {value:.2%}" if self == ACCURACY else f"{self.name} {value:.4g}"


ACCURACY = Metric("accuracy")
PERPLEXITY = Metric("perplexity", is_lower_better=True)
