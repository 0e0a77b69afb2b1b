"""What feeds layers that the example forward does not call stays whole, and a warning says so."""

import warnings

import pytest
import torch
import torch_pruning as tp
from torch import nn

from bayesprune.prune.channels.prune import prune_channels
from bayesprune.prune.graph.find import find_groups

MAGNITUDE = tp.importance.MagnitudeImportance(normalizer=None)


def conv(one: int, other: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(one, other, 3, padding=1), nn.BatchNorm2d(other), nn.ReLU())


class Auxiliary(nn.Module):
    """Two stages; a head on the first that only training calls, as GoogLeNet's."""

    def __init__(self):
        super().__init__()
        self.stage1, self.stage2, self.stage3 = conv(3, 12), conv(12, 12), conv(12, 10)
        self.aux = nn.Sequential(conv(12, 7), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(28, 5))
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        first = self.stage1(x)
        last = self.head(self.stage3(self.stage2(first)).mean((2, 3)))
        return (last, self.aux(first)) if self.training else last


class Tasks(nn.Module):
    """One head for each task; the caller says which."""

    def __init__(self):
        super().__init__()
        self.stem, self.body = conv(3, 9), conv(9, 12)
        self.heads = nn.ModuleDict({"a": nn.Linear(12, 5), "b": nn.Linear(12, 3), "c": nn.Linear(12 * 16, 2)})

    def forward(self, x, task="a"):
        x = self.body(self.stem(x))
        return self.heads[task](x.flatten(1) if task == "c" else x.mean((2, 3)))


class Experts(nn.Module):
    """A mixture that sends an example to one of three experts."""

    def __init__(self):
        super().__init__()
        self.stem, self.mid, self.head = nn.Linear(4, 10), nn.Linear(10, 6), nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)) for _ in range(3))

    def forward(self, x, expert=0):
        return self.head(self.experts[expert](self.mid(torch.relu(self.stem(x)))))


IMAGE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def pruned(net, x):
    with pytest.warns(UserWarning, match="example_inputs do not call .* stays whole"):
        return prune_channels(net, x, target="macs=0.7", importance=MAGNITUDE)


def test_what_feeds_an_auxiliary_head_of_training_stays_whole():
    net = Auxiliary().eval()
    statistics = {name: buffer.clone() for name, buffer in net.named_buffers()}
    report = pruned(net, IMAGE)
    assert net.stage1[0].out_channels == 12
    assert "it feeds aux.0.0, which the model calls only in training" in report.left_whole["stage1.0"]
    assert net.stage2[0].out_channels + net.stage3[0].out_channels < 22, "others of its size may go"
    assert torch.equal(net.stage1[1].running_mean, statistics["stage1.1.running_mean"])
    assert not net.training
    loss = sum(output.square().sum() for output in net.train()(IMAGE))
    loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_what_may_feed_the_heads_of_other_tasks_stays_whole():
    net = Tasks()
    report = pruned(net, IMAGE)
    assert "heads.b reads 12 channels, maybe these" in report.left_whole["body.0"]
    assert "delete it from the model if it is not needed" in report.left_whole["heads.c"]
    assert net.stem[0].out_channels < 9
    assert [net(IMAGE, task).shape[1] for task in "abc"] == [5, 3, 2]


def test_a_head_behind_a_flatten_is_thought_of_too():
    net = Tasks()
    del net.heads["b"]
    assert "heads.c reads 192 channels" in pruned(net, IMAGE).left_whole["body.0"]
    assert net(IMAGE, "c").shape == (2, 2)


def test_experts_that_no_example_reaches_keep_what_they_read():
    net, x = Experts(), torch.randn(3, 4)
    report = pruned(net, x)
    assert "experts.1.0 reads 6 channels" in report.left_whole["mid"]
    assert net.stem.out_features < 10
    assert [net(x, expert).shape for expert in range(3)] == [(3, 2)] * 3


def test_a_training_forward_that_fails_is_no_failure():
    class WantsTargets(Tasks):
        def forward(self, x, task="a", targets=None):
            if self.training and targets is None:
                raise ValueError("targets, please")
            return super().forward(x, task)

    net = WantsTargets()
    assert "heads.b reads 12 channels" in pruned(net, IMAGE).left_whole["body.0"]
    assert net.training


def test_what_is_called_or_deleted_costs_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = Auxiliary()
        net.aux = None
        assert net.training
        assert {group.name for group in find_groups(net, IMAGE).groups} == {"stage1.0", "stage2.0", "stage3.0"}


def test_a_layer_whose_weight_another_module_uses_is_not_called_unused():
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_groups(net, torch.randn(1, 3, 8))
