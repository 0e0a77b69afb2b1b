"""Numbers on modules that a forward uses as sizes follow the channels that they count."""

import torch
import torch_pruning as tp
from torch import nn

import bayesprune as bp
from bayesprune.prune.channels.prune import prune_channels
from tests.prune.nets import assert_removing_is_silencing, units

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
MAGNITUDE = tp.importance.MagnitudeImportance(normalizer=None)


class Gated(nn.Module):
    """Values and gates, split by a number of the module's own, as in EfficientViM; other numbers have other uses."""

    def __init__(self, width: int, inner: int, *, scale: int = 10):
        super().__init__()
        self.inner, self.scale = inner, scale
        self.fc1, self.fc2 = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x):
        value, gate = torch.split(self.fc1(x), [self.inner, self.inner], dim=-1)
        return self.fc2(value * torch.sigmoid(gate)) * self.scale


class Fixed(Gated):
    """A gate whose size is nowhere among its attributes."""

    def forward(self, x):
        value, gate = torch.split(self.fc1(x), [10, 10], dim=-1)
        return self.fc2(value * torch.sigmoid(gate))


def net_of(gated: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), gated, nn.ReLU(), nn.Linear(7, 2))


def test_a_size_that_a_forward_splits_by_follows(tmp_path):
    net = net_of(Gated(7, 10, scale=3))
    assert units(net, X) == {"0": 7, "2.fc1": 10, "2.fc2": 7}
    assert_removing_is_silencing(net, X)
    report = prune_channels(net, X, target="macs=0.5", importance=MAGNITUDE)
    assert report.left_whole.keys() == {"4"}
    assert net[2].inner == net[2].fc2.in_features < 10
    assert net[2].scale == 3
    bp.save(net, tmp_path / "cut")
    loaded = bp.load(tmp_path / "cut", model=net_of(Gated(7, 10, scale=3)))
    assert loaded[2].inner == net[2].inner
    assert torch.equal(loaded(X), net(X))


def test_a_number_of_the_same_size_and_another_use_stays():
    net = net_of(Gated(7, 10))
    assert_removing_is_silencing(net, X)
    prune_channels(net, X, target="macs=0.5", importance=MAGNITUDE)
    assert net[2].inner == net[2].fc2.in_features < 10
    assert net[2].scale == 10


def test_a_size_that_is_written_into_the_forward_keeps_the_layer_whole():
    net = net_of(Fixed(7, 10, scale=1))
    report = prune_channels(net, X, target="macs=0.8", importance=MAGNITUDE)
    assert net[2].inner == 10
    assert "does not follow" in report.left_whole["2.fc1"]
