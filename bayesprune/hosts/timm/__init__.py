"""timm: models that load by `timm.create_model("local-dir:...")`, and a task for its training scripts."""

from typing import TYPE_CHECKING

from bayesprune.hosts.timm.reload import bayesprune_pruned, timm_base

if TYPE_CHECKING:
    from bayesprune.hosts.timm.task import BayesPruneTask

__all__ = ["BayesPruneTask", "bayesprune_pruned", "timm_base"]


def __getattr__(name: str) -> object:
    """The task when it is asked for: it needs torch-pruning, which may be what imports timm just now."""
    if name != "BayesPruneTask":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from bayesprune.hosts.timm.task import BayesPruneTask

    return BayesPruneTask
