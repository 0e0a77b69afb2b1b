"""transformers: a Trainer callback, the layers of its models, and reloading by its own `from_pretrained`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bayesprune.hosts.transformers.reload import follow_saves

if TYPE_CHECKING:
    from bayesprune.hosts.transformers.callback import BayesPruneCallback
    from bayesprune.hosts.transformers.distillation import DistillationCallback
    from bayesprune.hosts.transformers.hub import model_card, push_to_hub, save_with_card
    from bayesprune.hosts.transformers.tolerance import Tolerance
    from bayesprune.prune.weights.schedule import PruneSchedule

__all__ = [
    "BayesPruneCallback",
    "DistillationCallback",
    "PruneSchedule",
    "Tolerance",
    "follow_saves",
    "model_card",
    "push_to_hub",
    "save_with_card",
]

# The Trainer, and torch-pruning behind the reports, take long to import: they are when they are asked for.
_LAZY = {
    "BayesPruneCallback": "bayesprune.hosts.transformers.callback",
    "DistillationCallback": "bayesprune.hosts.transformers.distillation",
    "PruneSchedule": "bayesprune.prune.weights.schedule",
    "Tolerance": "bayesprune.hosts.transformers.tolerance",
    **dict.fromkeys(("model_card", "push_to_hub", "save_with_card"), "bayesprune.hosts.transformers.hub"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
