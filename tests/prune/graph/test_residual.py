"""Heads and sizes on modules that leave with the width of a residual stream."""

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

import bayesprune as bp
from bayesprune.foundation.macs import macs_by_module
from bayesprune.prune.channels.prune import prune_channels
from bayesprune.prune.graph.find import find_groups
from tests.prune.nets import assert_removing_is_silencing, assert_stds_follow, tie_means_to_stds, units

TOKENS = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
MAGNITUDE = tp.importance.MagnitudeImportance(normalizer=None)


class Attention(nn.Module):
    """Heads of the width over their number, side by side as in DaViT, or interleaved as in NesT."""

    def __init__(self, width: int, heads: int, *, interleaved: bool = False, fixed: bool = False):
        super().__init__()
        self.num_heads, self.interleaved, self.used = heads, interleaved, [heads] if fixed else None
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        n, t, width = x.shape
        heads = self.used[0] if self.used else self.num_heads
        q, k, v = self.qkv(x).reshape(n, t, 3, heads, width // heads).permute(2, 0, 3, 1, 4).unbind(0)
        found = F.scaled_dot_product_attention(q, k, v)
        found = found.permute(0, 2, 3, 1) if self.interleaved else found.transpose(1, 2)
        return self.proj(found.reshape(n, t, width))


class Shifted(Attention):
    """Tokens in rows and columns, rolled meanwhile, and layers that are not called, as the Swin of torchvision."""

    def forward(self, x):
        n, t, width = x.shape
        x = torch.roll(x.view(n, 2, t // 2, width), (-1, -1), (1, 2)).view(n, t, width)
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias)
        q, k, v = qkv.reshape(n, t, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width)
        found = F.linear(found, self.proj.weight, self.proj.bias)
        return torch.roll(found.view(n, 2, t // 2, width), (1, 1), (1, 2)).view(n, t, width)[:, :t].contiguous()


class Reduced(nn.Module):
    """Keys and values of fewer tokens, whose convolution keeps the width as in Twins."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.sr, self.norm = nn.Conv2d(width, width, 2, 2), nn.BatchNorm1d(width)

    def forward(self, x):
        n, t, width = x.shape
        size = width // self.num_heads
        fewer = self.sr(x.transpose(1, 2).reshape(n, width, 2, -1)).reshape(n, width, -1)
        q = self.q(x).reshape(n, t, self.num_heads, size).transpose(1, 2)
        k, v = self.kv(self.norm(fewer).transpose(1, 2)).reshape(n, -1, 2, self.num_heads, size).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width))


class Blocks(nn.Module):
    def __init__(self, width: int, *attention: nn.Module, norm: bool = False):
        super().__init__()
        self.stem, self.attention = nn.Linear(5, width), nn.ModuleList(attention)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.fc1, self.fc2, self.head = nn.Linear(width, 11), nn.Linear(11, width), nn.Linear(width, 2)

    def forward(self, x):
        x = self.stem(x)
        for attention in self.attention:
            x = x + attention(self.norm(x))
        return self.head((x + self.fc2(torch.relu(self.fc1(x)))).mean(1))


CASES = {
    "side by side": lambda norm: Blocks(24, Attention(24, 4), Attention(24, 4), norm=norm),
    "interleaved": lambda norm: Blocks(24, Attention(24, 4, interleaved=True), norm=norm),
    "shifted": lambda norm: Blocks(24, Shifted(24, 4), norm=norm),
    "reduced": lambda norm: Blocks(24, Reduced(24, 4), Attention(24, 4), norm=norm),
}


@pytest.mark.parametrize("case", CASES)
def test_a_head_leaves_with_its_share_of_the_width(case):
    torch.manual_seed(0)
    net = CASES[case](False)
    found = find_groups(net, TOKENS)
    assert {len(group.units): group.unit_size for group in found.groups} == {4: 6, 11: 1}
    assert found.left_whole.keys() == {"head"}
    assert_removing_is_silencing(net, TOKENS)


class Squared(nn.Module):
    """A gate of itself, which grows without bounds where nothing normalises its input."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 11), nn.Linear(11, width)

    def forward(self, x):
        return self.fc2(4 * self.fc1(self.norm(x)).square())


def test_heads_of_a_deep_net_that_needs_its_norms_leave_too():
    torch.manual_seed(0)
    net = Blocks(24, *(layer for _ in range(6) for layer in (Attention(24, 4), Squared(24))), norm=True)
    assert [len(group.units) for group in find_groups(net, TOKENS).groups if group.attention] == [4]


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_the_cut_net_costs(case):
    torch.manual_seed(0)
    net = CASES[case](True)
    report = prune_channels(net, TOKENS[:1], target="macs=0.5", importance=MAGNITUDE)
    assert report.macs_after == sum(macs_by_module(net, TOKENS[:1]).values()) <= 0.5 * report.macs_before
    heads = net.attention[0].num_heads
    assert net.head.in_features == 6 * heads < 24
    row = next(row for row in report.rows if row.heads)
    assert (row.heads, row.kept_heads, row.channels, row.kept) == (4, heads, 24, 6 * heads)
    assert len(report.removed[row.layer]) == 24 - 6 * heads
    assert report.removed_heads["attention.0"]


def test_stds_follow_and_training_goes_on():
    torch.manual_seed(0)
    net = bp.to_variational(CASES["reduced"](True), std="per_channel")
    tie_means_to_stds(net)
    prune_channels(net, TOKENS[:1], target="macs=0.5", importance=MAGNITUDE)
    assert_stds_follow(net)
    net.train()(TOKENS).square().mean().backward()


def test_heads_whose_number_does_not_follow_stay_whole():
    """The net would run without a head: a width of 24 falls into 4 heads too, others than before."""
    net = Blocks(32, Attention(32, 4, fixed=True))
    found = find_groups(net, TOKENS)
    assert not any(group.attention for group in found.groups)
    report = prune_channels(net, TOKENS, target="macs=0.9", importance=MAGNITUDE)
    assert net.attention[0].proj.in_features == net.head.in_features == 32
    assert "heads stay whole" in report.left_whole["attention.0.qkv"]
    assert "does not follow" in report.left_whole["stem"]


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


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
