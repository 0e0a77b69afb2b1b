"""What a library's training loop is told of posteriors, and what it does with it: convert the model, then attach."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from bayesprune.convert import to_variational
from bayesprune.layers import make_masks, variational_layers
from bayesprune.priors import Prior
from bayesprune.prune.weights.schedule import PruneSchedule
from bayesprune.train.attach import attach
from bayesprune.train.attachment import Attachment
from bayesprune.train.checks import check_options, check_schedule, check_warmup


@dataclass
class TrainingOptions:
    """The options of `BayesPruneCallback` and `BayesPruneTask`; a target as `prune` becomes a schedule."""

    prior: Prior | None
    temperature: float | Literal["auto"]
    warmup: float
    std_lr: float
    max_noise_cost: float | None
    prune: str | PruneSchedule | None
    convert: Mapping[str, Any] | None
    schedule: PruneSchedule | None = field(init=False)

    def __post_init__(self) -> None:
        check_options(self.temperature, self.std_lr, self.max_noise_cost)
        check_warmup(self.warmup)
        self.schedule = PruneSchedule(self.prune) if isinstance(self.prune, str) else self.prune
        check_schedule(self.schedule)

    def convert_model(self, model: nn.Module) -> None:
        """Makes it variational, with masks where weights are to go, before anything copies, wraps or loads it.

        Raises:
            ValueError: no layer can be converted, or there are options for a model that is variational.
        """
        if not is_variational(model):
            to_variational(model, **(self.convert or {}))
        elif self.convert:
            raise ValueError(
                f"convert={dict(self.convert)!r} was given, but the model is variational already; give the options to "
                "to_variational, or leave the conversion out."
            )
        if self.schedule is not None:
            make_masks(model)

    def attach(self, optimizer: Optimizer, model: nn.Module, *, num_data: int, num_steps: int) -> Attachment:
        """As `train.attach`, with these options."""
        return attach(
            optimizer,
            model,
            num_data=num_data,
            num_steps=num_steps,
            prior=self.prior,
            temperature=self.temperature,
            warmup=self.warmup,
            prune=self.schedule,
            std_lr=self.std_lr,
            max_noise_cost=self.max_noise_cost,
        )


def is_variational(model: nn.Module) -> bool:
    """Whether a layer of the model has a posterior."""
    return next(variational_layers(model), None) is not None
