"""What conversion, pruning and training of a model with gates leave to this room."""

from collections.abc import Collection, Mapping

from torch import nn

from bayesprune.gates.closing import drop_gates, fold_gates
from bayesprune.gates.gate import Gate, has_channel_gates
from bayesprune.gates.inclusion import InclusionImportance
from bayesprune.gates.training import GatedComplexity
from bayesprune.layers import SideRoom


class _Gates(SideRoom):
    def fold(self, model: nn.Module, lost: Mapping[str, Collection[int]]) -> None:
        fold_gates(model, lost)

    def drop(self, model: nn.Module) -> None:
        drop_gates(model)

    def complexity(self, model: nn.Module) -> GatedComplexity:
        return GatedComplexity(model)

    def importance(self, model: nn.Module, kind: str) -> InclusionImportance | None:
        return InclusionImportance() if kind == "inclusion" and has_channel_gates(model) else None


Gate.room = _Gates()
