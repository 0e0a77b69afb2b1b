"""transformers: a Trainer callback, the layers of its models, and reloading by its own `from_pretrained`."""

from typing import TYPE_CHECKING, Any

from bayesprune.hosts.transformers.model_card import model_card, push_to_hub, save_with_card
from bayesprune.hosts.transformers.reload import follow_saves

if TYPE_CHECKING:
    from bayesprune.hosts.transformers.callback import BayesPruneCallback
    from bayesprune.hosts.transformers.distillation import DistillationCallback
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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bayesprune.hosts.transformers import callback, distillation  # the Trainer takes seconds to import

    return getattr(distillation if name == "DistillationCallback" else callback, name)
