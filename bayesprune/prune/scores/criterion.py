"""What the criteria of this library have in common as importances of torch-pruning."""

import torch_pruning as tp
from torch import Tensor
from torch_pruning.dependency import Group

from bayesprune.prune.graph.companions import follow_stds
from bayesprune.prune.graph.group import ChannelGroup


class Criterion(tp.importance.Importance):
    """An importance of torch-pruning by a posterior.

    Making one changes nothing. When a pruner of torch-pruning calls it, stds and masks follow their means through
    torch-pruning from then on, as after `follow_stds()`.
    """

    def __call__(self, group: Group) -> Tensor | None:  # type: ignore[override]
        """Scores (C,) of the root channels of a dependency group; None where none are known."""
        follow_stds()
        return self.scores(group)

    def of_group(self, group: ChannelGroup) -> Tensor | None:
        """Scores (C,) of the root channels of a group of this library, which cuts stds by itself."""
        return self.scores(group.group)

    def scores(self, group: Group) -> Tensor | None:
        """Scores (C,) of the root channels of a dependency group; None where none are known."""
        raise NotImplementedError
