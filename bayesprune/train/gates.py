"""The part of the ELBO that belongs to gates: their own KL, and the weights' KL as far as the weights are there.

KL(q || p) = sum_g KL(Bernoulli(pi_g) || Bernoulli(lambda)) + sum_w P_w KL(slab of w), where P_w is the probability that
all gates of the weight w are open: the product over its different gates, of the channel that it makes, of the one that
it reads, of the weight itself. A channel that it makes and reads, on a residual stream, counts once.
"""

from collections import defaultdict
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from bayesprune.errors import UnsupportedModelError
from bayesprune.layers import Posterior, named_gates
from bayesprune.layers.gates import ChannelGate, Gate, GatedSide, weight_gate
from bayesprune.priors import BoundPrior
from bayesprune.train.optimizers import has_fused_kernel, step_scaled

Bound = dict[Posterior, BoundPrior]


def sum_kl(bound: Bound, keep: Callable[[Posterior], Tensor | None] = attrgetter("mask")) -> Tensor:
    """KL divergence of these posteriors from their priors, in nats: a scalar; `keep` is how much of each counts."""
    return _total([prior.kl(p.mean, p.log_std, keep(p)) for p, prior in bound.items()])


def _total(terms: list[Tensor]) -> Tensor:
    return torch.stack([term.to(terms[0]) for term in terms]).sum()


class GateOptimizer:
    """The gates of a model, what they do to the KL, and the optimizer that moves their logits.

    Attributes:
        gates: The gates by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.gates: dict[str, Gate] = dict(named_gates(model))
        self._sides: dict[int, list[GatedSide]] = defaultdict(list)
        by_lr: dict[float, list[nn.Parameter]] = defaultdict(list)
        for name, gate in self.gates.items():
            if type(gate.logits.data).__name__ == "DTensor":
                raise UnsupportedModelError(
                    f"the gates of {name} are sharded by FSDP; expected a model that is whole on every process (DDP)."
                )
            by_lr[gate.lr].append(gate.logits)
            for side in gate.sides if isinstance(gate, ChannelGate) else ():
                self._sides[id(side.layer)].append(side)
        groups = [{"params": logits, "lr": lr} for lr, logits in by_lr.items()]
        self._optimizer = Adam(groups, fused=has_fused_kernel(self.logits)) if groups else None

    @property
    def logits(self) -> list[nn.Parameter]:
        """The parameters of all gates."""
        return [gate.logits for gate in self.gates.values()]

    def inclusion(self, posterior: Posterior) -> Tensor | None:
        """Probability that each weight is there, of the parameter's shape, in the graph; None where no gate decides."""
        found: Tensor | None = None
        counted: list[tuple[Gate, Tensor]] = []
        for side in self._sides.get(id(posterior.layer), ()):
            if (units := side.units_of(posterior.parameter)) is None:
                continue
            probabilities = side.gate.by_position(side.gate.probabilities, units)
            for gate, others in counted:
                if gate is side.gate:
                    probabilities = torch.where(others == units, 1.0, probabilities)
            counted.append((side.gate, units))
            found = probabilities if found is None else found * probabilities
        if (gate := weight_gate(posterior.layer, posterior.parameter)) is not None:
            found = gate.probabilities if found is None else found * gate.probabilities
        return None if found is None else found.expand(posterior.mean.shape)

    def keep(self, posterior: Posterior) -> Tensor | None:
        """How much of each weight counts in the KL: its inclusion probability, 0 where it was removed; None is all."""
        inclusion, mask = self.inclusion(posterior), posterior.mask
        if inclusion is None or mask is None:
            return mask if inclusion is None else inclusion
        return inclusion * mask

    def kl(self, bound: Bound) -> Tensor:
        """KL divergence of weights and gates from their priors, in nats: a scalar, in the graph."""
        return _total([sum_kl(bound, self.keep), *(gate.kl() for gate in self.gates.values())])

    @torch.no_grad()
    def add_gradients(
        self, bound: Bound, weight: float, scale: Tensor | None = None, share: Tensor | None = None
    ) -> None:
        """Unscales the logits' gradients and adds `weight` times the KL's; logits outside this step have none.

        Args:
            bound: The priors of all posteriors.
            weight: Weight of the KL.
            scale: What a gradient scaler multiplied the gradients by; None where it did not.
            share: What the weight is multiplied by, a number on the device; None for 1.
        """
        if self.gates and set(self.gates.values()) != {gate for _, gate in named_gates(self._model)}:
            raise RuntimeError(
                "gates were added or closed after attach; call detach() first, then make a new optimizer and attach "
                "again where training goes on."
            )
        moving = [logits for logits in self.logits if logits.grad is not None]
        if not moving:
            return
        with torch.enable_grad():
            terms = [gate.kl() for gate in self.gates.values()]
            for posterior, prior in bound.items():
                if (keep := self.keep(posterior)) is not None and keep.requires_grad:
                    terms.append(prior.kl(posterior.mean.detach(), posterior.log_std.detach(), keep))
            gradients = torch.autograd.grad(_total(terms), moving)
        for logits, gradient in zip(moving, gradients, strict=True):
            assert logits.grad is not None, "only those with a gradient move"
            if share is not None:
                gradient = gradient * share
            if scale is not None:
                logits.grad.div_(scale)
            logits.grad.add_(gradient, alpha=weight)

    def closed(self) -> list[str]:
        """Names of the gates that are all closed: nothing passes there any more."""
        return [name for name, gate in self.gates.items() if not gate.is_open.any()]

    def step(self, found_inf: Tensor | None = None) -> None:
        """Moves the logits, unless a gradient scaler found that gradients overflowed."""
        if self._optimizer is not None:
            step_scaled(self._optimizer, None, found_inf)

    def state_dict(self) -> dict[str, Any]:
        """Names of the gates and the optimizer's state; empty without gates."""
        return {} if self._optimizer is None else {"names": list(self.gates), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of the same gates.

        Raises:
            ValueError: the state belongs to other gates.
        """
        names = state.get("names", [])
        if names != list(self.gates):
            raise ValueError(
                f"the attachment's state has gates {names[:5] or 'nowhere'}, the model "
                f"{list(self.gates)[:5] or 'nowhere'}; add the gates of the run that was saved before attaching."
            )
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])
