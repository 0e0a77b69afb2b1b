"""The complexity term of the ELBO: the KL of the weights, and what auxiliary modules such as gates add to it."""

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.layers import Posterior, rooms_in
from bayesprune.priors import BoundPrior

Bound = dict[Posterior, BoundPrior]


def total(terms: Sequence[Tensor]) -> Tensor:
    """The sum of scalars that may be on several devices; of none, zero."""
    return torch.stack([term.to(terms[0]) for term in terms]).sum() if terms else torch.zeros(())


def sum_kl(bound: Bound, keep: Callable[[Posterior], Tensor | None] = attrgetter("mask")) -> Tensor:
    """KL divergence of these posteriors from their priors, in nats: a scalar; `keep` is how much of each counts."""
    return total([prior.kl(p.mean, p.log_std, keep(p)) for p, prior in bound.items()])


class Complexity:
    """The KL of a model's weights alone. That of a side room says what its auxiliary modules add, and moves them.

    Attributes:
        parameters: Those of the auxiliary modules.
        names: Names of the modules, by which a saved state is known.
    """

    def __init__(self) -> None:
        self.parameters: list[nn.Parameter] = []
        self.names: list[str] = []

    def keep(self, posterior: Posterior) -> Tensor | None:
        """How much of each weight counts in the KL, 0 where it was removed; None is all."""
        return posterior.mask

    def kl(self, bound: Bound) -> Tensor:
        """KL divergence of weights and auxiliary modules from their priors, in nats: a scalar, in the graph."""
        return sum_kl(bound, self.keep)

    def add_gradients(
        self, bound: Bound, weight: float, scale: Tensor | None = None, share: Tensor | None = None
    ) -> None:
        """Unscales the gradients of `parameters` and adds `weight` times the KL's.

        Args:
            bound: The priors of all posteriors.
            weight: Weight of the KL.
            scale: What a gradient scaler multiplied the gradients by; None where it did not.
            share: What the weight is multiplied by, a number on the device; None for 1.
        """

    def plan(self, num_steps: int | None) -> None:
        """Takes note of how long the training is; None where that is not known.

        Raises:
            ValueError: the modules need to know.
        """

    def step(self, number: int, found_inf: Tensor | None = None) -> None:
        """Moves `parameters`, unless a gradient scaler found that gradients overflowed; steps count from 1."""

    def collapsed(self) -> Iterator[tuple[str, str]]:
        """Name of each module that has switched a layer off altogether, and what it did."""
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        """Names of the modules and the state of what moves them; empty where there are none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of the same modules.

        Raises:
            ValueError: the state belongs to other modules.
        """
        names = state.get("names", [])
        if names != self.names:
            raise ValueError(
                f"the attachment's state has gates {names[:5] or 'nowhere'}, the model {self.names[:5] or 'nowhere'}; "
                "add the gates of the run that was saved before attaching."
            )


def complexity_of(model: nn.Module) -> Complexity:
    """The complexity term of a model.

    Raises:
        ValueError: auxiliary modules of two rooms are in the model.
    """
    rooms = rooms_in(model)
    if len(rooms) > 1:
        raise ValueError(f"the model has modules of {len(rooms)} rooms that change its training; expected one at most.")
    return rooms[0].complexity(model) if rooms else Complexity()
