import pytest
import torch
from torch import nn

from bayesprune.prune.graph.find import find_groups
from bayesprune.prune.graph.group import side
from bayesprune.prune.graph.observe import Observed
from bayesprune.prune.graph.walk import largest_axis, walk


class Tokens(nn.Module):
    """Gated units behind a class token, which keeps torch-pruning from following the split."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.stem, self.norm = nn.Linear(5, 6), nn.LayerNorm(6)
        self.fc1, self.fc2, self.head = nn.Linear(6, 16), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), self.stem(x)], 1)
        value, gate = self.fc1(self.norm(x)).chunk(2, dim=-1)
        return self.head((x + self.fc2(value * torch.sigmoid(gate)))[:, 0])


class Branches(nn.Module):
    """A split whose last part is read first, and one part twice; a concatenation with the channels last."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        linear = nn.Linear if dim == 3 else lambda one, other: nn.Conv2d(one, other, 1)
        self.stem, self.a, self.b, self.c = linear(3, 9), linear(2, 4), linear(3, 5), linear(4, 4)
        self.head = linear(17, 2)

    def forward(self, x):
        first, second, third = self.stem(x).split([2, 3, 4], dim=self.dim)
        c = torch.relu(self.c(third))
        joined = torch.cat([torch.relu(self.a(first)), torch.relu(self.b(second)), c, third.sigmoid()], dim=self.dim)
        return self.head(joined)


def test_gated_units_behind_a_class_token_may_go():
    net, x = Tokens().eval(), torch.randn(2, 3, 5)
    structure = find_groups(net, x)
    found = {group.name: group for group in structure.groups}
    assert found["fc1"].units == tuple((i, i + 8) for i in range(8))
    assert found.keys() == {"fc1", "fc2"}


@pytest.mark.parametrize("dim", [1, 3])
def test_parts_go_where_the_sizes_say(dim):
    net, x = Branches(dim).eval(), torch.randn(2, *((3, 4, 4) if dim == 1 else (4, 4, 3)))
    graph = Observed(net, x).trace.graph
    places = {}
    for root in (net.stem, net.a, net.c):
        for item in walk(graph, root, bound=largest_axis(graph)).group:
            if side(item.dep) == "in":
                places[root, item.dep.layer] = dict(zip(item.root_idxs, item.idxs, strict=True))
    assert places[net.stem, net.a] == {i: i for i in range(2)}
    assert places[net.stem, net.b] == {i + 2: i for i in range(3)}
    assert places[net.stem, net.c] == {i + 5: i for i in range(4)}
    assert places[net.stem, net.head] == {i + 5: i + 13 for i in range(4)}
    assert places[net.a, net.head] == {i: i for i in range(4)}
    assert places[net.c, net.head] == {i: i + 9 for i in range(4)}
