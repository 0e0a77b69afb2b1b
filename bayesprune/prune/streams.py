"""Tells the channels inside a residual block from the stream that blocks read from and add to."""

from typing import Any

import torch_pruning as tp
from torch_pruning import ops

from bayesprune.prune.cuts import is_depthwise
from bayesprune.prune.roots import is_root
from bayesprune.prune.structure import ChannelGroup


def is_width(group: ChannelGroup, graph: tp.DependencyGraph) -> bool:
    """Whether a group is hidden width: a stream that what reads it writes to again, or no part of a residual block."""
    writers = {m.layer for m in group.members if m.axis[1] == "out" and is_root(m.layer) and not is_depthwise(m.layer)}
    pending = [graph.module2node[m.layer] for m in group.members if m.axis[1] == "in"]
    seen: set[Any] = set()
    is_added = False
    while pending:
        for node in pending.pop().outputs:
            if node in seen:
                continue
            seen.add(node)
            pending.append(node)
            if len(writers) > 1 and node.module in writers:
                return True
            is_sum = isinstance(node.module, ops._ElementWiseOp) and "Add" in str(node.module._grad_fn)
            is_added |= is_sum and len(node.inputs) > 1
    return not is_added
