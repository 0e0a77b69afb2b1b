"""Tells the channels inside a residual block from the stream that blocks read from and add to."""

import math
from collections.abc import Iterable
from typing import Any

import torch_pruning as tp
from torch_pruning.dependency import Node

from bayesprune.prune.graph.cuts import is_depthwise
from bayesprune.prune.graph.internals import ElementwiseOperation
from bayesprune.prune.graph.roots import is_root
from bayesprune.prune.graph.structure import ChannelGroup


class Streams:
    """The streams of one graph; what it asks of the graph as a whole it asks once."""

    def __init__(self, graph: tp.DependencyGraph) -> None:
        self.nodes: dict[Any, Node] = graph.module2node
        self._place = _order(self.nodes.values())
        self._before_sums: set[Node] = set()
        pending = [node for node in self.nodes.values() if _is_sum(node)]
        while pending:
            for before in pending.pop().inputs:
                if before not in self._before_sums:
                    self._before_sums.add(before)
                    pending.append(before)

    def is_width(self, group: ChannelGroup) -> bool:
        """Whether a group is hidden width: a stream that what reads it writes to again, or no part of a block."""
        writers = {m.layer for m in group.members if m.axis[1] == "out" and is_root(m.layer)}
        writers = {layer for layer in writers if not is_depthwise(layer)}
        readers = [self.nodes[m.layer] for m in group.members if m.axis[1] == "in"]
        if len(writers) > 1 and self._reach(readers, writers):
            return True
        return self._before_sums.isdisjoint(readers)

    def _reach(self, readers: Iterable[Node], writers: set[Any]) -> bool:
        """Whether what is computed from the readers gets to a writer; nothing behind the last writer is looked at."""
        last = max(self._place.get(self.nodes[layer], math.inf) for layer in writers)
        pending, seen = list(readers), set()
        while pending:
            for node in pending.pop().outputs:
                if node.module in writers:
                    return True
                if node not in seen and self._place.get(node, 0) <= last:
                    seen.add(node)
                    pending.append(node)
        return False


def _is_sum(node: Node) -> bool:
    is_sum = isinstance(node.module, ElementwiseOperation) and "Add" in str(node.module._grad_fn)
    return is_sum and len(node.inputs) > 1


def _order(nodes: Iterable[Node]) -> dict[Node, int]:
    """Numbers such that inputs come before outputs; modules called in a circle, and what follows them, have none."""
    missing = {node: len(node.inputs) for node in nodes}
    ready = [node for node, count in missing.items() if not count]
    place: dict[Node, int] = {}
    while ready:
        node = ready.pop()
        place[node] = len(place)
        for behind in node.outputs:
            missing[behind] -= 1
            if not missing[behind]:
                ready.append(behind)
    return place
