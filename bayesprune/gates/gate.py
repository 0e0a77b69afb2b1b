"""Gates: Bernoulli posteriors that decide whether a channel or a weight is there at all (spike and slab).

With a gate z of inclusion probability pi = sigmoid(logit), a weight has the posterior pi N(mean, std^2) + (1 - pi)
delta_0. In training a gate draws a hard 0 or 1 whose gradient is that of the binary concrete relaxation
sigmoid((logit + logistic noise) / temperature) (Maddison et al., 2017; Jang et al., 2017; straight through as in
Jantre et al., 2023), one draw for the whole batch; anywhere else it is 1 where pi > 1/2 (the median probability model).

A channel's gate multiplies the input of every layer that reads the channel, behind norm and activation, so that a
closed gate is exactly a channel that was removed. A weight's gate multiplies mean and std.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils.hooks import RemovableHandle

from bayesprune.estimators import Gaussian, Posterior, as_gaussian
from bayesprune.foundation import noise
from bayesprune.foundation.target import Target
from bayesprune.gates.patterns import inclusion_in_blocks, patterns
from bayesprune.layers.auxiliary import Auxiliary
from bayesprune.layers.structures import not_narrowed

CHANNEL_GATE = "channel_gate"


@dataclass(frozen=True)
class GateOptions:
    """How gates start and learn.

    Attributes:
        prior_inclusion: Prior probability that a gate is open.
        initial_inclusion: Posterior probability at the start.
        temperature: Of the relaxation: lower is less biased, and noisier.
        lr: Learning rate of the logits, about what one step moves them by.
    """

    prior_inclusion: float
    initial_inclusion: float
    temperature: float
    lr: float

    def __post_init__(self) -> None:
        if not 0 < self.prior_inclusion < 1:
            raise ValueError(f"prior_inclusion is {self.prior_inclusion!r}; expected a probability between 0 and 1.")
        if not 0.5 < self.initial_inclusion < 1:
            raise ValueError(
                f"initial_inclusion is {self.initial_inclusion!r}; expected a probability above 1/2, where evaluation "
                "is that of the model without gates, and below 1."
            )
        for name in ("temperature", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a positive number.")


class Gate(Auxiliary):
    """Independent Bernoulli posteriors, by their logits: of `like`'s shape and place, float32 whatever its dtype."""

    def __init__(self, like: Tensor, options: GateOptions) -> None:
        super().__init__()
        initial = math.log(options.initial_inclusion / (1 - options.initial_inclusion))
        self.logits = nn.Parameter(torch.full_like(like, initial, dtype=torch.float32))
        self.prior_inclusion, self.temperature, self.lr = options.prior_inclusion, options.temperature, options.lr

    @property
    def probabilities(self) -> Tensor:
        """Inclusion probabilities, in the graph."""
        return self.logits.sigmoid()

    @property
    def has_prior(self) -> bool:
        """Whether its KL counts."""
        return True

    @property
    def is_open(self) -> Tensor:
        """Where the inclusion probability is above 1/2."""
        return self.logits.detach() > 0

    def kl(self) -> Tensor:
        """KL divergence of the Bernoulli posteriors from the prior, in nats, summed: a scalar."""
        log_open, log_closed = math.log(self.prior_inclusion), math.log1p(-self.prior_inclusion)
        open_term = self.probabilities * (logsigmoid(self.logits) - log_open)
        return (open_term + (-self.logits).sigmoid() * (logsigmoid(-self.logits) - log_closed)).sum()

    def draw(self, logistic: Tensor | None = None) -> Tensor:
        """0 or 1 for each gate: drawn in training mode, with the relaxation's gradient; else by `is_open`."""
        if not self.training:
            return self.is_open.to(self.logits.dtype)
        logistic = self.noise() if logistic is None else logistic
        soft = torch.sigmoid((self.logits + logistic) / self.temperature)
        return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())  # exactly 0 or 1

    def noise(self) -> Tensor:
        """Logistic noise for one draw."""
        return noise.logistic(self.logits.shape, device=self.logits.device, dtype=self.logits.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Casts to half precision leave the logits in float32, where they can take small steps."""
        return super()._apply(not_narrowed(fn), recurse)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: Any,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> None:
        """A stock checkpoint leaves the gates as they are."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys[:] = [key for key in missing_keys if key != f"{prefix}logits"]


class WeightGate(Gate):
    """A gate for every weight of a parameter; of the parameter `weight` it is the layer's child `weight_gate`.

    Gates with a target make in training the decision of evaluation, with the relaxation's gradient: where next to all
    weights are gone, draws leave too little of the network to learn from. How many are open is held to the target while
    training goes on, so they have no prior. With an N:M target the gates of a block are one choice among its patterns:
    their probabilities, and the relaxation, are those of the block (`patterns`).

    Attributes:
        target: What the gates are held to; None where they have a prior.
        input_dim: The dimension of the parameter along which an N:M pattern counts.
        masks: The patterns (P, M) of a block; None where there is no pattern, or too many.
    """

    masks: Tensor | None

    def __init__(self, like: Tensor, options: GateOptions, target: Target | None = None, input_dim: int = -1) -> None:
        super().__init__(like, options)
        self.target, self.input_dim = target, input_dim
        masks = None if target is None or target.pattern is None else patterns(*target.pattern)
        self.register_buffer("masks", None if masks is None else masks.to(like.device), persistent=False)

    @property
    def probabilities(self) -> Tensor:
        """Inclusion probabilities, in the graph."""
        return self._inclusion(self.logits)

    @property
    def has_prior(self) -> bool:
        """Whether nothing but the prior and the data decides."""
        return self.target is None

    @property
    def presence(self) -> Tensor:
        """How much of each weight counts in the KL: its inclusion probability, or whether its gate is open."""
        return self.probabilities if self.target is None else self.is_open.to(self.logits.dtype)

    def draw(self, logistic: Tensor | None = None) -> Tensor:
        """0 or 1 for each gate: drawn in training mode where they have a prior; else by `is_open`."""
        if self.target is None or not self.training:
            return super().draw(logistic)
        soft = self._inclusion(self.logits / self.temperature)
        return self.is_open.to(soft.dtype) + (soft - soft.detach())

    def _inclusion(self, logits: Tensor) -> Tensor:
        """Probability that each gate is open, by itself or as one of its block."""
        if self.masks is None:
            return logits.sigmoid()
        moved = logits.movedim(self.input_dim, -1)
        found = inclusion_in_blocks(moved.reshape(-1, self.masks.shape[1]), self.masks)
        return found.view(moved.shape).movedim(-1, self.input_dim)

    def forward(self, posterior: Gaussian) -> Gaussian:
        """The posterior of the weights given one draw of the gates."""
        gates = self.draw()
        return Gaussian(posterior.mean * gates.to(posterior.mean.dtype), posterior.std * gates)


class ChannelGate(Gate):
    """A gate for every unit of a dependency group; the child `channel_gate` of the group's first layer.

    Attributes:
        sides: The sides of layers whose channels it decides on.
        shared: Noise of the forward that is under way, where several layers read the channels; else None.
    """

    def __init__(self, num_units: int, options: GateOptions, device: torch.device) -> None:
        super().__init__(torch.empty(num_units, device=device), options)
        self.sides: list[GatedSide] = []
        self.shared: Tensor | None = None

    @property
    def num_readers(self) -> int:
        """How many layers read its channels."""
        return sum(side.feature_dim is not None for side in self.sides)

    def add_side(self, layer: nn.Module, units: Tensor, **fields: Any) -> "GatedSide":
        """Puts the channels of one side of a layer under this gate; see `GatedSide`."""
        side = GatedSide(self, layer, f"units_{len(self.sides)}", **fields)
        self.register_buffer(side.key, units.to(self.logits.device), persistent=False)
        self.sides.append(side)
        return side

    def values(self, units: Tensor) -> Tensor:
        """What channels of these units are multiplied by."""
        if self.training and self.num_readers > 1 and self.shared is None:
            raise RuntimeError(
                "a layer that reads gated channels was called in training outside the model's own forward, so that it "
                "cannot share the gate's draw with the other layers that read them. Call the model as a whole, and "
                'without gradient checkpointing; or gate granularity=("heads", "mlp") alone.'
            )
        return self.by_position(self.draw(self.shared), units)

    def by_position(self, values: Tensor, units: Tensor) -> Tensor:
        """Values (U,) of the units at the positions that belong to these units; 1 where they belong to none."""
        return torch.cat([values, values.new_ones(1)])[units]


@dataclass(eq=False)
class GatedSide:
    """One side of a layer whose channels a gate decides on; where that is its input, a pre-hook of the layer.

    Attributes:
        gate: The gate.
        layer: The layer.
        key: Name of the gate's buffer of the unit of each position, the number of units where it has none.
        parameters: Name and dimension of the parameters that the side cuts.
        feature_dim: The (negative) dimension of the layer's input that holds the channels; None for an output side.
        blocks: Groups of a convolution of whose input this is.
    """

    gate: ChannelGate
    layer: nn.Module
    key: str
    parameters: tuple[tuple[str, int], ...]
    feature_dim: int | None = None
    blocks: int = 1

    def attach(self) -> RemovableHandle:
        """Makes the layer read its input through the gate."""
        return self.layer.register_forward_pre_hook(self, with_kwargs=True)

    @property
    def units(self) -> Tensor:
        """Unit of each position along the axis."""
        return self.gate.get_buffer(self.key)

    def units_of(self, name: str, units: Tensor | None = None) -> Tensor | None:
        """Unit of each entry of a parameter, broadcastable to it; None where the side does not cut it."""
        dim = dict(self.parameters).get(name)
        if dim is None:
            return None
        units, parameter = self.units if units is None else units, getattr(self.layer, name)
        if self.blocks == 1 or self.feature_dim is None:
            return units.view([-1 if d == dim else 1 for d in range(parameter.dim())])
        rows, columns = parameter.shape[:2]  # of a grouped convolution (O, I / groups)
        by_row = units.view(self.blocks, 1, columns).expand(-1, rows // self.blocks, -1).reshape(rows, columns)
        return by_row.view(rows, columns, *[1] * (parameter.dim() - 2))

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """The layer's inputs with the channels multiplied by their gates."""
        if self.gate.passes:
            return None
        assert self.feature_dim is not None, "only inputs are hooked"
        name = None if args else next(iter(kwargs))
        x, units = args[0] if name is None else kwargs[name], self.units
        if x.shape[self.feature_dim] != len(units):
            raise RuntimeError(
                f"a {type(layer).__name__} behind gates for {len(units)} channels got {x.shape[self.feature_dim]}: "
                "gates do not follow another tool's cut. Use bayesprune.prune_channels, or gates.close before the cut."
            )
        values = self.gate.values(units).view(-1, *[1] * (-1 - self.feature_dim))
        gated = x * values.to(x.dtype)
        return ((gated, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: gated})


@dataclass(eq=False)
class SharedDraws:
    """Hooks of the model: layers that read the same channels meet the same draw of their gates in one forward."""

    gates: list[ChannelGate]

    def begin(self, *_: Any) -> None:
        """Draws the noise of the forward that begins."""
        for gate in self.gates:
            gate.shared = gate.noise() if gate.training else None

    def end(self, *_: Any) -> None:
        """Drops the noise of the forward that has ended."""
        for gate in self.gates:
            gate.shared = None


def named_gates(model: nn.Module) -> Iterator[tuple[str, Gate]]:
    """Every gate once: those of channels by the name of their first layer, those of weights by the parameter's."""
    for name, module in model.named_modules():
        if isinstance(module, ChannelGate):
            yield name.removesuffix(CHANNEL_GATE).removesuffix("."), module
        elif isinstance(module, WeightGate):
            yield name.removesuffix("_gate"), module


def weight_gate(layer: nn.Module, name: str) -> WeightGate | None:
    """The gate of a layer's parameter, if it has one."""
    gate = layer._modules.get(f"{name}_gate")
    return gate if isinstance(gate, WeightGate) else None


def keep_slow_path(*_: Any) -> None:
    """A hook that does nothing: torch's fused transformer layers read raw weights, past the gates, where none is."""


def gated(layer: nn.Module, name: str, posterior: Posterior) -> Posterior:
    """The `posterior_hook` of layers with gates: the posterior of a parameter given a draw of its gates, if any."""
    gate = weight_gate(layer, name)
    return posterior if gate is None or gate.passes else gate(as_gaussian(posterior))


def has_channel_gates(model: nn.Module) -> bool:
    """Whether gates decide on channels of the model."""
    return any(isinstance(gate, ChannelGate) for _, gate in named_gates(model))
