"""Parameters that hold the matrices of several layers, one behind the other, and the modules of experts made of them.

Mixtures of experts keep the weights of all E experts in parameters (E, ., .): one or two put out hidden units ("up"),
one takes them in ("down"). The hidden units of such a module are numbered through, those of the first expert first, so
that each expert may lose units of its own, as long as all lose equally many.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from bayesprune.foundation.kinds import LayerKind

# Names of the parameters of experts by what they do. In a fused one the gate and the values of all units stand one
# behind the other, or those of each unit side by side.
_FUSED, _GATES, _VALUES, _DOWN = "gate_up_proj", "gate_proj", "up_proj", "down_proj"
STACKED_NAMES = tuple(f"{name}{end}" for end in ("", "_bias") for name in (_FUSED, _GATES, _VALUES, _DOWN))

# Attributes of such modules that hold the number of hidden units of an expert.
SIZES = ("intermediate_dim", "intermediate_size", "expert_dim", "moe_intermediate_size", "ffn_hidden_size")


@dataclass(frozen=True)
class Stack:
    """How a module arranges the matrices of its experts.

    Attributes:
        num_experts: E.
        num_units: Hidden units of one expert.
        is_transposed: Whether the matrices are (I, O), not (O, I) as those of linear layers.
        is_interleaved: Whether the gate and the value of a unit stand side by side in a fused parameter.
    """

    num_experts: int
    num_units: int
    is_transposed: bool
    is_interleaved: bool = False

    @property
    def out_dim(self) -> int:
        """Dimension of a weight that numbers outputs."""
        return 2 if self.is_transposed else 1

    @property
    def in_dim(self) -> int:
        """Dimension of a weight that numbers inputs."""
        return 3 - self.out_dim

    @property
    def kind(self) -> LayerKind:
        """The layout of their weights, whose first dimension numbers the experts."""
        return LayerKind("experts", output_dim=self.out_dim, input_dim=self.in_dim, num_stacked=1)

    def cut_parameters(self, module: nn.Module, side: str) -> list[tuple[str, int]]:
        """Name and dimension of the parameters with an entry for each unit: where they are put out, or taken in."""
        if side == "in":
            return [(_DOWN, self.in_dim)]
        found = [(name, self.out_dim) for name in (_FUSED, _GATES, _VALUES)]
        found += [(f"{name}_bias", 1) for name in (_FUSED, _GATES, _VALUES)]
        return [(name, dim) for name, dim in found if module._parameters.get(name) is not None]

    def axis_size(self, module: nn.Module, side: str) -> int:
        """Entries of all experts along one side."""
        name, dim = self.cut_parameters(module, side)[0]
        return axis_size(module.get_parameter(name), dim, num_stacked=1)

    def positions(self, module: nn.Module, side: str) -> dict[int, list[int]]:
        """Entries along one side by unit, of all experts one after the other."""
        total = self.num_experts * self.num_units
        each = self.axis_size(module, side) // total
        found: dict[int, list[int]] = {}
        for unit in range(total):
            expert, inside = divmod(unit, self.num_units)
            first = expert * self.num_units * each
            offsets = (
                [inside * each + part for part in range(each)]
                if self.is_interleaved
                else [part * self.num_units + inside for part in range(each)]
            )
            found[unit] = [first + offset for offset in offsets]
        return found


def stacks(module: nn.Module) -> Iterator[Stack]:
    """The ways in which a module may hold its experts, the likeliest first; none where it holds no experts."""
    weights = stacked_weights(module)
    if len(weights) < 2 or weights[0] is not module._parameters.get(_DOWN) or len({len(w) for w in weights}) > 1:
        return
    said, (down, *ups) = vars(module).get("is_transposed"), weights
    for is_transposed in (said,) if isinstance(said, bool) else (False, True):
        found = Stack(len(down), down.shape[1 if is_transposed else 2], is_transposed)
        if all(up.shape[found.in_dim] == down.shape[found.out_dim] for up in ups):  # whatever both cut so far
            is_interleaved = vars(module).get("is_concatenated") is False
            yield replace(found, is_interleaved=is_interleaved)
            yield replace(found, is_interleaved=not is_interleaved)
            return


def stacked_weights(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that may hold the matrices of a module's experts, "down" first."""
    named = (module._parameters.get(name) for name in (_DOWN, _FUSED, _GATES, _VALUES))
    return [weight for weight in named if weight is not None and weight.dim() == 3]


def stack_of(module: nn.Module) -> Stack | None:
    """The likeliest way in which a module holds its experts; None where it holds none."""
    return next(stacks(module), None)


def axis_size(tensor: Tensor, dim: int, *, num_stacked: int = 0) -> int:
    """Entries along a dimension, of all stacked layers together."""
    return math.prod(tensor.shape[:num_stacked]) * tensor.shape[dim] if dim >= num_stacked else tensor.shape[dim]


def select(tensor: Tensor, dim: int, index: Tensor, *, num_stacked: int = 0) -> Tensor:
    """The entries of these numbers along a dimension, numbered through all stacked layers, each of which keeps as many.

    The numbers of a layer come before those of the next.
    """
    if dim < num_stacked or num_stacked == 0:
        return tensor.index_select(dim, index)
    stacked = tensor.shape[:num_stacked]
    flat = tensor.movedim(dim, num_stacked).flatten(0, num_stacked).index_select(0, index)
    return flat.unflatten(0, (*stacked, -1)).movedim(num_stacked, dim).contiguous()
