"""What `prune_channels` refuses before it looks at anything."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from bayesprune.errors import UnsupportedModelError
from bayesprune.layers import VariationalLayer
from bayesprune.prune.graph.roots import is_frozen, is_root
from bayesprune.prune.graph.structure import GRANULARITY
from bayesprune.prune.scores.evidence import EvidenceImportance
from bayesprune.prune.scores.inclusion import InclusionImportance, has_channel_gates


def checked_target(
    target: Mapping[str, float] | str, importance: Any, granularity: Collection[str], uniform: bool, round_to: int
) -> tuple[str, float]:
    """The target's name and value.

    Raises:
        ValueError: an option is none of those that there are.
    """
    if isinstance(granularity, str) or not granularity or not set(granularity) <= set(GRANULARITY):
        raise ValueError(f"granularity is {granularity!r}; expected some of {GRANULARITY}, in a tuple.")
    given = as_mapping(target)
    what = next(iter(given), None) if len(given) == 1 else None
    if what not in ("macs", "params", "snr", "evidence", "inclusion"):
        raise ValueError(
            f'target is {target!r}; expected one of {{"macs": f}}, {{"params": f}}, {{"snr": t}}, {{"evidence": t}}, '
            '{"inclusion": p}, such as {"macs": 0.5} or "macs=0.5", which keeps half of the MACs.'
        )
    if isinstance(given[what], str) or not hasattr(given[what], "__float__"):
        raise ValueError(f'target {what} is {given[what]!r}; expected a number, as in {{"{what}": 0.5}}.')
    value = float(given[what])
    if what == "snr":
        if not 0 < value < float("inf"):
            raise ValueError(f"target snr is {value!r}; expected a positive number, 1.0 say.")
        if importance is not None or uniform:
            raise ValueError('target {"snr": t} is a criterion of its own; it takes no importance and no uniform=True.')
    elif what == "evidence":
        if not abs(value) < float("inf"):
            raise ValueError(f"target evidence is {value!r}; expected a number of nats, usually 0.")
        if uniform or not (importance is None or isinstance(importance, EvidenceImportance)):
            raise ValueError(
                'target {"evidence": t} is a criterion of its own; it takes no importance but an EvidenceImportance, '
                "with the prior that the model was trained with, and no uniform=True."
            )
    elif what == "inclusion":
        if not 0 < value < 1:
            raise ValueError(f"target inclusion is {value!r}; expected a probability between 0 and 1, usually 0.5.")
        if uniform or not (importance is None or isinstance(importance, InclusionImportance)):
            raise ValueError(
                'target {"inclusion": p} is a criterion of its own; it takes no importance but InclusionImportance(), '
                "and no uniform=True."
            )
    elif not 0 < value < 1:
        raise ValueError(f"target {what} is {value!r}; expected the fraction to keep, between 0 and 1.")
    if round_to < 1:
        raise ValueError(f"round_to is {round_to!r}; expected 1 or more.")
    return what, value


def as_mapping(target: Any) -> dict[str, Any]:
    """A target as a mapping of its name to its value: of "macs=0.5" too, and empty where it is neither."""
    if isinstance(target, str):
        name, _, value = target.partition("=")
        try:
            return {name.strip(): float(value)}
        except ValueError:
            return {}
    return dict(target) if isinstance(target, Mapping) else {}


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
