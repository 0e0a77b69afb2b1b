"""The part of the ELBO that belongs to gates: their own KL, and the weights' KL as far as the weights are there.

KL(q || p) = sum_g KL(Bernoulli(pi_g) || Bernoulli(lambda)) + sum_w P_w KL(slab of w), where P_w is the probability that
all gates of the weight w are open: the product over its different gates, of the channel that it makes, of the one that
it reads, of the weight itself. A channel that it makes and reads, on a residual stream, counts once.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam

from bayesprune.errors import UnsupportedModelError
from bayesprune.gates.density import DECIDED, hold, move
from bayesprune.gates.gate import ChannelGate, Gate, GatedSide, WeightGate, named_gates, weight_gate
from bayesprune.layers import Posterior
from bayesprune.train.complexity import Bound, Complexity, sum_kl, total
from bayesprune.train.optimizers import has_fused_kernel, step_scaled

_FORGETS = 1e-3
"""Weight of a step in the running mean of the squares of the gradients of held gates; as Adam's second moment has."""


class GatedComplexity(Complexity):
    """The gates of a model, what they do to the KL, and how their logits move.

    Attributes:
        gates: The gates by name.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self.gates: dict[str, Gate] = dict(named_gates(model))
        self._sides: dict[int, list[GatedSide]] = defaultdict(list)
        by_lr: dict[float, list[nn.Parameter]] = defaultdict(list)
        for name, gate in self.gates.items():
            if type(gate.logits.data).__name__ == "DTensor":
                raise UnsupportedModelError(
                    f"the gates of {name} are sharded by FSDP; expected a model that is whole on every process (DDP)."
                )
            if gate.has_prior:
                by_lr[gate.lr].append(gate.logits)
            for side in gate.sides if isinstance(gate, ChannelGate) else ():
                self._sides[id(side.layer)].append(side)
        self._held = [gate for gate in self.gates.values() if isinstance(gate, WeightGate) and gate.target is not None]
        self._num_steps: int | None = None
        self.parameters, self.names = [gate.logits for gate in self.gates.values()], list(self.gates)
        self._mean_square = torch.zeros((), device=self._held[0].logits.device if self._held else None)
        groups = [{"params": logits, "lr": lr} for lr, logits in by_lr.items()]
        self._optimizer = Adam(groups, fused=has_fused_kernel(self.parameters)) if groups else None

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
            found = gate.presence if found is None else found * gate.presence
        return None if found is None else found.expand(posterior.mean.shape)

    def keep(self, posterior: Posterior) -> Tensor | None:
        """How much of each weight counts in the KL: its inclusion probability, 0 where it was removed; None is all."""
        inclusion, mask = self.inclusion(posterior), posterior.mask
        if inclusion is None or mask is None:
            return mask if inclusion is None else inclusion
        return inclusion * mask

    def kl(self, bound: Bound) -> Tensor:
        """KL divergence of weights and gates from their priors, in nats: a scalar, in the graph."""
        return total([sum_kl(bound, self.keep), *(gate.kl() for gate in self.gates.values() if gate.has_prior)])

    @torch.no_grad()
    def add_gradients(
        self, bound: Bound, weight: float, scale: Tensor | None = None, share: Tensor | None = None
    ) -> None:
        """Unscales the logits' gradients and adds `weight` times the KL's; logits outside this step have none."""
        if set(self.gates.values()) != {gate for _, gate in named_gates(self._model)}:
            raise RuntimeError(
                "gates were added or closed after attach; call detach() first, then make a new optimizer and attach "
                "again where training goes on."
            )
        moving = [logits for logits in self.parameters if logits.grad is not None]
        if not moving:
            return
        with torch.enable_grad():
            terms = [gate.kl() for gate in self.gates.values() if gate.has_prior]
            for posterior, prior in bound.items():
                if (keep := self.keep(posterior)) is not None and keep.requires_grad:
                    terms.append(prior.kl(posterior.mean.detach(), posterior.log_std.detach(), keep))
            gradients = torch.autograd.grad(total(terms), moving, allow_unused=True) if terms else [None] * len(moving)
        for logits, gradient in zip(moving, gradients, strict=True):
            assert logits.grad is not None, "only those with a gradient move"
            if scale is not None:
                logits.grad.div_(scale)
            if gradient is not None:
                logits.grad.add_(gradient if share is None else gradient * share, alpha=weight)

    def collapsed(self) -> Iterator[tuple[str, str]]:
        """Names of the gates that are all closed: nothing passes there any more."""
        return ((name, "all its gates are closed") for name, gate in self.gates.items() if not gate.is_open.any())

    def plan(self, num_steps: int | None) -> None:
        """Gates with a target reach it on the way through so many steps.

        Raises:
            ValueError: they have one, and the length of the training is not known.
        """
        if self._held and num_steps is None:
            raise ValueError(
                f'the gates are held to "{self._held[0].target}" by shares of the training, whose length is not known; '
                "pass num_steps, the number of optimizer steps of the whole training, to attach."
            )
        self._num_steps = num_steps

    def step(self, number: int, found_inf: Tensor | None = None) -> None:
        """Moves the logits, unless a gradient scaler found an overflow, and holds them to their target."""
        if self._optimizer is not None:
            step_scaled(self._optimizer, None, found_inf)
        progress = number / self._num_steps if self._num_steps else 0.0
        if self._held and progress <= DECIDED:
            move(self._held, self._mean_square, max(_FORGETS, 1 / number), found_inf)
            hold(self._held, progress)

    def state_dict(self) -> dict[str, Any]:
        """Names of the gates, the optimizer's state, and how large the gradients of held gates are."""
        optimizer = {} if self._optimizer is None else self._optimizer.state_dict()
        return {"names": self.names, "optimizer": optimizer, "mean_square": self._mean_square}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of the same gates.

        Raises:
            ValueError: the state belongs to other gates.
        """
        super().load_state_dict(state)
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])
        self._mean_square.copy_(state["mean_square"])
