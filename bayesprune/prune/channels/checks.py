"""What `prune_channels` refuses before it looks at anything."""

import math
from collections.abc import Collection, Mapping
from numbers import Integral
from typing import Any

from torch import nn

from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.sharding import check_whole
from bayesprune.foundation.target import Target
from bayesprune.layers import VariationalLayer, rooms_in
from bayesprune.prune.graph.group import GRANULARITY
from bayesprune.prune.graph.prunable_layers import is_frozen, is_root

THRESHOLDS = ("snr", "evidence", "inclusion")
KINDS = ("macs", "params", "latency", *THRESHOLDS)
SIZES = "sizes"
"""The kind of a target that is a mapping."""


def checked_target(
    target: str | Target | Mapping[str, int],
    importance: Any,
    granularity: Collection[str],
    uniform: bool,
    round_to: int,
) -> Target:
    """The target of `prune_channels`; of a mapping the kind alone.

    Raises:
        ValueError: an option is none of those that there are.
    """
    if isinstance(granularity, str) or not granularity or not set(granularity) <= set(GRANULARITY):
        raise ValueError(f"granularity is {granularity!r}; expected some of {GRANULARITY}, in a tuple.")
    if isinstance(target, Mapping):
        if not target:
            raise ValueError("prune_channels got no sizes; expected how many channels some group keeps, by its layer.")
        for name, kept in target.items():
            if not isinstance(kept, int) or kept < 1:
                raise ValueError(
                    f"prune_channels is to keep {kept!r} channels of {name!r}; expected a number of 1 or more, as in "
                    "the sizes of a report."
                )
        if uniform or round_to != 1:
            raise ValueError("prune_channels got sizes; they take no uniform=True and no round_to.")
        return Target(SIZES, math.nan)
    found = Target.parse(target, KINDS, "prune_channels")
    if found.kind == "snr" and not found.value:
        raise ValueError('prune_channels got the target "snr=0"; expected a positive number, usually 1.')
    is_own = importance is None or target_kind(importance) == found.kind
    if found.kind in THRESHOLDS and (uniform or not is_own):
        but = {
            "evidence": " but an EvidenceImportance, with the prior that the model was trained with,",
            "inclusion": " but InclusionImportance()",
        }
        raise ValueError(
            f'the target "{found}" is a criterion of its own; it takes no importance{but.get(found.kind, "")} and no '
            "equal share of every group (uniform)."
        )
    if not isinstance(round_to, Integral) or round_to < 1:
        raise ValueError(f"round_to is {round_to!r}; expected a whole number, 1 or more.")
    return found


def target_kind(importance: Any) -> str | None:
    """The kind of target whose threshold the scores of an importance are compared with, or None."""
    return getattr(importance, "target_kind", None)


def room_importance(model: nn.Module, kind: str) -> Any:
    """What the model's auxiliary modules rank channels by, for a target of this kind; None where they say nothing."""
    found = (room.importance(model, kind) for room in rooms_in(model))
    return next((importance for importance in found if importance is not None), None)


def check_model(model: nn.Module, importance: Any, what: str) -> None:
    """Refuses what cannot be cut or ranked.

    Raises:
        UnsupportedModelError: the model is compiled, wrapped or sharded, or has no posterior while no importance is
            given, or no gates that say what is included.
        ValueError: every layer is frozen.
    """
    check_whole(model, "prune_channels")
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
    if "inclusion" in (what, target_kind(importance)):
        if room_importance(model, "inclusion") is None:
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
