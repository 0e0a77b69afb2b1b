import pytest
import timm
import torch
from torch import nn

from bayesprune.prune.graph.observe import Observed
from bayesprune.prune.graph.prunable_layers import is_root
from bayesprune.prune.graph.trace import quiet
from bayesprune.prune.graph.walk import largest_axis, walk


class Shifted(nn.Module):
    """Adds what it reads to two joined copies of itself, so that torch-pruning's positions grow without an end."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        a, b = x[..., :4], x[..., 4:]
        x = x * 0.5 + torch.cat([-b, a], -1)
        x = torch.cat([x[..., 4:], x[..., :4]], -1) + x
        return self.head(self.mix(x) + x)


def described(group):
    return [(item.dep.target, item.dep.handler.__name__, item.idxs, item.root_idxs) for item in group]


def walked(net, x):
    graph = Observed(net, x).trace.graph
    bound, done = largest_axis(graph), set()
    for root in [module for module in graph.module2node if is_root(module)]:
        if root not in done:
            reached = walk(graph, root, bound=bound)
            done |= {item.dep.layer for item in reached.group}
            yield graph, root, reached


@pytest.mark.parametrize(
    ("name", "side"), [("resnet18", 32), ("resnext50_32x4d", 32), ("mobilenetv3_small_050", 32), ("inception_v3", 96)]
)
def test_groups_are_those_of_torch_pruning(name, side):
    net = timm.create_model(name, num_classes=3).eval()
    for graph, root, reached in walked(net, torch.randn(1, 3, side, side)):
        pruner = graph.get_pruner_of_module(root)
        with quiet():
            theirs = graph.get_pruning_group(root, pruner.prune_out_channels, range(pruner.get_out_channels(root)))
        assert described(reached.group) == described(theirs)
        assert reached.linked == []


def test_what_reaches_one_position_is_linked():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(4, 3)

        def forward(self, x):
            value, gate = self.fc1(x).chunk(2, dim=1)
            return self.fc2(value * gate)

    net = Gated()
    (reached,) = (found for _, root, found in walked(net, torch.randn(2, 6)) if root is net.fc1)
    assert {frozenset(pair) for pair in reached.linked} == {frozenset((i, i + 4)) for i in range(4)}


def test_a_walk_ends_where_torch_pruning_goes_round_in_circles():
    net = Shifted()
    found = {root: reached for _, root, reached in walked(net, torch.randn(2, 3, 4))}
    axes = {(i.dep.layer, i.dep.handler.__name__): i.idxs for reached in found.values() for i in reached.group}
    assert set(axes[net.mix, "prune_in_channels"]) == set(range(8))
