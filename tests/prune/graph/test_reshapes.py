"""What reshapes and slices do to channels: paths side by side, a token made of one pixel, rows that are taken apart."""

import pytest
import torch
import torch_pruning as tp
from torch import nn

from bayesprune.prune.channels.prune import prune_channels
from bayesprune.prune.graph.find import find_groups
from bayesprune.prune.graph.group import side
from bayesprune.prune.graph.observe import Observed
from bayesprune.prune.graph.walk import largest_axis, walk
from tests.prune.nets import assert_removing_is_silencing, units

IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
MAGNITUDE = tp.importance.MagnitudeImportance(normalizer=None)


class Kernels(nn.Module):
    """Paths side by side, each with an attention of its own: selective kernels, or the splits of ResNeSt."""

    def __init__(self, *, grouped: bool):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        kernels = [(6, 20, 3, 1, 1, 1, 2)] if grouped else [(6, 10, 1), (6, 10, 3, 1, 1)]
        self.paths = nn.ModuleList(nn.Conv2d(*kernel) for kernel in kernels)
        self.reduce, self.select, self.head = nn.Conv2d(10, 4, 1), nn.Conv2d(4, 20, 1), nn.Conv2d(10, 2, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        found = [torch.relu(path(x)) for path in self.paths]
        x = torch.stack(found, 1) if len(found) == 2 else found[0].reshape(len(x), 2, -1, *x.shape[2:])
        attention = self.select(torch.relu(self.reduce(x.sum(1).mean((2, 3), keepdim=True))))
        attention = attention.view(len(x), 2, attention.shape[1] // 2, 1, 1).softmax(1)
        return self.head((x * attention).sum(1))


@pytest.mark.parametrize("grouped", [False, True])
def test_a_channel_leaves_all_paths_that_are_weighed_against_each_other(grouped):
    torch.manual_seed(0)
    net = Kernels(grouped=grouped)
    found = find_groups(net, IMAGE)
    assert {len(group.units) for group in found.groups} == {6 - 3 * grouped, 4, 10}
    assert found.left_whole.keys() == {"head"}
    assert_removing_is_silencing(net, IMAGE)
    prune_channels(net, IMAGE, target="macs=0.5", importance=MAGNITUDE)
    assert net.select.out_channels == 2 * net.head.in_channels == 2 * net.reduce.in_channels < 20


def test_a_map_of_one_pixel_is_turned_into_a_token():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fc, self.head = nn.Conv2d(3, 8, 6), nn.Linear(8, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(torch.relu(self.fc(self.stem(x).flatten(2).transpose(1, 2)))[:, 0])

    assert units(Token(), IMAGE) == {"stem": 8, "fc": 5}
    assert_removing_is_silencing(Token(), IMAGE)


class Merged(nn.Module):
    """Every second row and column side by side, with the channels last, as in the Swin of torchvision."""

    def __init__(self, *, halves: bool):
        super().__init__()
        self.stem, self.reduce, self.head = nn.Linear(3, 8), nn.Linear(16 if halves else 32, 6), nn.Linear(6, 2)
        self.halves = halves

    def forward(self, x):
        x = torch.relu(self.stem(x.permute(0, 2, 3, 1)))
        parts = [x[:, row::2, column::2, :] for row in (0, 1) for column in (0, 1)]
        if self.halves:
            half = x.shape[-1] // 2
            parts = [
                part[..., start:end] for part, start, end in zip(parts, (0, -half) * 2, (half, None) * 2, strict=True)
            ]
        return self.head(torch.relu(self.reduce(torch.cat(parts, -1))).mean((1, 2)))


@pytest.mark.parametrize("halves", [False, True])
def test_slices_of_rows_take_no_channels_away(halves):
    torch.manual_seed(0)
    net = Merged(halves=halves)
    graph = Observed(net, IMAGE).trace.graph
    places = {side(item.dep): item for item in walk(graph, net.stem, bound=largest_axis(graph)).group}["in"]
    expected = [[c, c + 8] if halves else [c, c + 8, c + 16, c + 24] for c in range(8)]
    for channel, positions in enumerate(expected):
        found = [p for p, root in zip(places.idxs, places.root_idxs, strict=True) if root == channel]
        assert sorted(found) == positions
    if not halves:
        assert_removing_is_silencing(net, IMAGE)


class Patches(nn.Module):
    """Two by two positions side by side, as in timm's Swin, and a map that is flattened with its channels last."""

    def __init__(self):
        super().__init__()
        self.stem, self.reduce, self.head = nn.Linear(3, 8), nn.Linear(32, 5), nn.Linear(45, 2)

    def forward(self, x):
        x = torch.relu(self.stem(x.permute(0, 2, 3, 1)))
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.head(torch.relu(self.reduce(x)).flatten(1))


def test_a_channel_leaves_every_position_that_is_put_beside_others():
    torch.manual_seed(0)
    assert units(Patches(), IMAGE) == {"stem": 8, "reduce": 5}
    assert_removing_is_silencing(Patches(), IMAGE)


def test_an_activation_that_writes_into_what_a_layer_put_out_hides_nothing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 7), nn.ReLU(inplace=True), nn.Linear(7, 2))
    assert units(net, IMAGE) == {"0": 8, "2": 7}
    assert_removing_is_silencing(net, IMAGE)
    assert net[1].inplace
