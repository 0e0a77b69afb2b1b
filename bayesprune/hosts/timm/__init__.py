"""timm: models that load by `timm.create_model("local-dir:...")`, and a task for its training scripts."""

from bayesprune.hosts.timm.reload import bayesprune_pruned, timm_base
from bayesprune.hosts.timm.task import BayesPruneTask

__all__ = ["BayesPruneTask", "bayesprune_pruned", "timm_base"]
