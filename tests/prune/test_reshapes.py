"""What a reshape or a transposition does to channels: paths side by side, a token made of one pixel."""

import pytest
import torch
import torch_pruning as tp
from torch import nn

from bayesprune.prune.channels import prune_channels
from bayesprune.prune.groups import find_groups
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
    prune_channels(net, IMAGE, target={"macs": 0.5}, importance=MAGNITUDE)
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
