"""Inclusion probabilities as scores: of channels by their gates, and of single weights by all gates on their way."""

from typing import ClassVar

import torch
from torch import Tensor
from torch_pruning.dependency import Group

from bayesprune.gates.gate import GatedSide, weight_gate
from bayesprune.layers import Posterior
from bayesprune.prune.scores.channels import Criterion


class InclusionImportance(Criterion):
    """A torch-pruning importance: the posterior probability that a channel is there, by its gate.

    `prune_channels(model, x, "inclusion=0.5")` removes the channels that are more likely not there; as a
    ranking it serves any other target. A group without gates gets None. A pruner of your own cuts no gates: run
    `gates.close` first, or leave the cut to `prune_channels`.
    """

    target_kind: ClassVar[str | None] = "inclusion"

    @torch.no_grad()
    def scores(self, group: Group) -> Tensor | None:
        """Probabilities (C,) of the root channels of a dependency group; None where it has no gates."""
        roots = {channel: index for index, channel in enumerate(group[0].root_idxs)}
        for item in group:
            root_idxs = item.root_idxs
            if item.dep.handler.__name__ != "prune_in_channels" or root_idxs is None or None in root_idxs:
                continue
            for side in _gated_inputs(item.dep.layer):
                by_position = side.gate.by_position(side.gate.probabilities, side.units)
                if not (side.units[list(item.idxs)] < len(side.gate.logits)).all():
                    continue  # the gate of another group whose channels this layer reads as well
                scores = by_position.new_ones(len(roots))
                targets = torch.tensor([roots[root] for root in root_idxs], device=scores.device)
                scores[targets] = by_position[list(item.idxs)]
                return scores
        return None


@torch.no_grad()
def inclusion(posterior: Posterior) -> Tensor:
    """Inclusion probability of each weight by its own gate, a score for `prune_weights`; 1 where it has none."""
    gate = weight_gate(posterior.layer, posterior.parameter)
    return torch.ones_like(posterior.mean, dtype=torch.float32) if gate is None else gate.probabilities.detach()


def _gated_inputs(layer: object) -> list[GatedSide]:
    hooks = getattr(layer, "_forward_pre_hooks", {}).values()
    return [hook for hook in hooks if isinstance(hook, GatedSide)]
