"""What `prune_channels` refuses before it looks at anything."""

from collections.abc import Collection
from typing import Any

from torch import nn

from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.target import Target
from bayesprune.layers import VariationalLayer
from bayesprune.prune.graph.group import GRANULARITY
from bayesprune.prune.graph.prunable_layers import is_frozen, is_root
from bayesprune.prune.scores.evidence import EvidenceImportance
from bayesprune.prune.scores.inclusion import InclusionImportance, has_channel_gates

KINDS = ("macs", "params", "latency", "snr", "evidence", "inclusion")


def checked_target(
    target: str | Target, importance: Any, granularity: Collection[str], uniform: bool, round_to: int
) -> Target:
    """The target of `prune_channels`.

    Raises:
        ValueError: an option is none of those that there are.
    """
    if isinstance(granularity, str) or not granularity or not set(granularity) <= set(GRANULARITY):
        raise ValueError(f"granularity is {granularity!r}; expected some of {GRANULARITY}, in a tuple.")
    found = Target.parse(target, KINDS, "prune_channels")
    if found.kind == "snr" and not found.value:
        raise ValueError('prune_channels got the target "snr=0"; expected a positive number, usually 1.')
    own = {"snr": (), "evidence": EvidenceImportance, "inclusion": InclusionImportance}
    if found.kind in own and (uniform or not (importance is None or isinstance(importance, own[found.kind]))):
        but = {
            "evidence": " but an EvidenceImportance, with the prior that the model was trained with,",
            "inclusion": " but InclusionImportance()",
        }
        raise ValueError(
            f'the target "{found}" is a criterion of its own; it takes no importance{but.get(found.kind, "")} and no '
            "uniform=True."
        )
    if round_to < 1:
        raise ValueError(f"round_to is {round_to!r}; expected 1 or more.")
    return found


def check_model(model: nn.Module, importance: Any, what: str) -> None:
    """Refuses what cannot be cut or ranked.

    Raises:
        UnsupportedModelError: the model is compiled or wrapped, or has no posterior while no importance is given, or
            no gates that say what is included.
        ValueError: every layer is frozen.
    """
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise UnsupportedModelError("prune_channels got a compiled model; cut the model first, then compile it.")
    if hasattr(model, "_orig_mod") or type(model).__module__.startswith(("torch.nn.parallel", "torch.distributed")):
        raise UnsupportedModelError(
            f"prune_channels got a model wrapped in {type(model).__name__}; pass the model inside it, and wrap it "
            "again afterwards."
        )
    roots = [module for module in model.modules() if is_root(module)]
    if roots and all(map(is_frozen, roots)):
        raise ValueError(
            "prune_channels leaves frozen layers whole, and all layers of this model are frozen (requires_grad=False). "
            "Call model.requires_grad_(True) first if it was frozen for evaluation alone."
        )
    if what == "inclusion" or isinstance(importance, InclusionImportance):
        if not has_channel_gates(model):
            raise UnsupportedModelError(
                "prune_channels was asked for inclusion probabilities, and no gates decide on this model's channels: "
                "call gates.add_channel_gates, attach, and train first."
            )
        return
    if importance is None and not any(isinstance(module, VariationalLayer) for module in model.modules()):
        raise UnsupportedModelError(
            "prune_channels ranks by the posterior, and this model has no variational layer: call to_variational and "
            "train, or pass a torch-pruning importance, such as torch_pruning.importance.MagnitudeImportance()."
        )
