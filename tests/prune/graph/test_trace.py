"""What a trace has to see: buffers by channel, outputs in objects, maps of one channel, stopped gradients."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
import torch_pruning as tp
import torchvision
from torch import nn

from bayesprune.prune.channels.prune import prune_channels
from bayesprune.prune.graph.find import find_groups
from tests.prune.nets import assert_removing_is_silencing, units

IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
MAGNITUDE = tp.importance.MagnitudeImportance(normalizer=None)


class FrozenNorm(nn.Module):
    """A batch norm whose numbers are buffers, in shapes of its own."""

    def __init__(self, channels: int, *shape: int):
        super().__init__()
        for name in ("scale", "shift", "mean"):
            self.register_buffer(name, torch.rand(shape or channels) + 0.5)
        self.view = shape or (1, channels, 1, 1)

    def forward(self, x):
        scale, shift, mean = (b.view(1, -1, 1, 1) for b in (self.scale, self.shift, self.mean))
        return (x - mean) * scale.sqrt() + shift


class Sinusoids(nn.Module):
    """Tokens with positions that are a buffer, longer than needed."""

    def __init__(self):
        super().__init__()
        self.register_buffer("positions", torch.randn(1, 9, 10))
        self.stem, self.fc1, self.fc2, self.head = (nn.Linear(*s) for s in ((4, 10), (10, 14), (14, 10), (10, 3)))

    def forward(self, x):
        x = self.stem(x) + self.positions[:, : x.shape[1]]
        return self.head(x + self.fc2(torch.relu(self.fc1(x))))


def frozen(norm) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 10, 1), norm(10), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 3)),
    )
    for buffer in net.buffers():
        buffer.uniform_(0.5, 1.5)
    return net


@pytest.mark.parametrize(
    "norm",
    [torchvision.ops.FrozenBatchNorm2d, FrozenNorm, lambda c: FrozenNorm(c, 1, c, 1, 1), lambda c: FrozenNorm(c, c, 1)],
    ids=["torchvision", "flat", "four dimensions", "three dimensions"],
)
def test_buffers_by_channel_leave_with_their_channels(norm):
    net = frozen(norm)
    buffers = dict(net.named_buffers())
    assert units(net, IMAGE) == {"0": 8, "3": 10}
    assert all(value is buffers[name] for name, value in net.named_buffers()), "nothing of the trace stays"
    assert_removing_is_silencing(net, IMAGE)
    prune_channels(net, IMAGE, target="macs=0.5", importance=MAGNITUDE)
    assert {b.numel() for b in net[1].buffers()} == {net[0].out_channels} != {8}
    assert not any(isinstance(buffer, nn.Parameter) for buffer in net.buffers())


def test_a_table_of_positions_that_is_a_buffer_leaves_with_the_width():
    net, x = Sinusoids(), torch.randn(2, 5, 4)
    assert units(net, x) == {"fc1": 14, "fc2": 10} or units(net, x) == {"fc1": 14, "stem": 10}
    assert_removing_is_silencing(net, x)


def test_buffers_of_another_use_tie_nothing():
    class Blurred(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kernel", torch.rand(1, 1, 3, 3))
            self.register_buffer("window", torch.rand(6, 6))
            self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1), nn.Conv2d(5, 2, 1)

        def blur(self, x):
            kernel = self.kernel.expand(x.shape[1], -1, -1, -1)
            return nn.functional.conv2d(x * self.window, kernel, padding=1, groups=x.shape[1])

        def forward(self, x):
            return self.c(self.blur(torch.relu(self.b(self.blur(torch.relu(self.a(x)))))))

    torch.manual_seed(0)
    assert units(Blurred(), IMAGE) == {"a": 8, "b": 5}
    assert_removing_is_silencing(Blurred(), IMAGE)


class ChannelAttention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        pooled = (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True))
        return x * sum(self.fc2(torch.relu(self.fc1(p))) for p in pooled).sigmoid()


class SpatialAttention(nn.Module):
    """Of CBAM: a map of one channel, made of mean and maximum over the channels."""

    def __init__(self, largest=lambda x: x.amax(1, keepdim=True)):
        super().__init__()
        self.conv, self.largest = nn.Conv2d(2, 1, 3, padding=1), largest

    def forward(self, x):
        return x * self.conv(torch.cat([x.mean(1, keepdim=True), self.largest(x)], 1)).sigmoid()


class MapOfOne(nn.Module):
    """Spatial attention by a convolution to one channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1)

    def forward(self, x):
        return x * self.conv(x).sigmoid()


def attended(*attention: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), *attention, nn.Conv2d(12, 7, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 3)),
    )


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: attended(MapOfOne(12)), [12, 7]),
        (lambda: attended(SpatialAttention()), [12, 7]),
        (lambda: attended(SpatialAttention(lambda x: x.max(1, keepdim=True)[0])), [12, 7]),
        (lambda: attended(SpatialAttention(lambda x: x.norm(dim=1, keepdim=True))), [12, 7]),
        (lambda: attended(ChannelAttention(12), SpatialAttention()), [4, 12, 7]),
    ],
    ids=["map of one channel", "mean and amax", "max", "norm", "CBAM"],
)
def test_maps_of_one_channel_do_not_tie_the_channels_they_multiply(build, expected):
    net = build().eval()
    assert sorted(units(net, IMAGE).values()) == sorted(expected)
    report = prune_channels(net, IMAGE, target="macs=0.6", importance=MAGNITUDE)
    assert report.achieved["macs"] <= 0.6
    assert net(IMAGE).shape == (2, 3)


def test_a_gate_of_one_number_on_tokens_ties_nothing():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.gate, self.head = nn.Linear(4, 10), nn.Linear(10, 1), nn.Linear(10, 3)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.head((x * self.gate(x).softmax(1)).sum(1))

    torch.manual_seed(0)
    net, x = Gated(), torch.randn(2, 5, 4)
    assert units(net, x) == {"stem": 10}
    assert_removing_is_silencing(net, x)


@dataclass
class Found:
    features: torch.Tensor
    more: Any = None


class Boxes:
    def __init__(self, logits):
        self.logits, self.itself = logits, self


@pytest.mark.parametrize(
    "wrap",
    [
        lambda hidden, logits: Found(hidden, logits),
        lambda hidden, logits: Found(hidden, Boxes(logits)),
        lambda hidden, logits: [Boxes(logits), {"all": [Found(hidden)]}],
    ],
    ids=["dataclass", "object in a dataclass", "nested"],
)
def test_outputs_in_dataclasses_and_objects_are_outputs(wrap):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x):
            hidden = torch.relu(self.b(torch.relu(self.a(x))))
            return wrap(hidden, self.head(hidden))

    structure = find_groups(Net(), torch.randn(3, 4))
    assert [group.name for group in structure.groups] == ["a"]
    assert structure.left_whole.keys() == {"b", "head"}
    assert all("an output of the model" in reason for reason in structure.left_whole.values())


class Stopped(nn.Module):
    """Three layers, whose middle is run by another function."""

    def __init__(self, run):
        super().__init__()
        self.a, self.b, self.head, self.run = nn.Linear(4, 12), nn.Linear(12, 10), nn.Linear(10, 2), run

    def forward(self, x):
        return self.head(torch.relu(self.run(self.b, torch.relu(self.a(x)))))


def without_gradients(layer, x):
    with torch.no_grad():
        return layer(x)


class Reversible(torch.autograd.Function):
    """As the blocks of Reformer and RevNets: layers run inside, and run again in the backward."""

    @staticmethod
    def forward(ctx, x, layers):
        ctx.layers = layers
        ctx.save_for_backward(x)
        return layers[0](x)


class Newer(torch.autograd.Function):
    """The same in torch's later form."""

    @staticmethod
    def forward(layer, x):
        return layer(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:])


class Rounded(torch.autograd.Function):
    """A function of tensors alone."""

    @staticmethod
    def forward(ctx, x):
        return x.round(decimals=2)


@pytest.mark.parametrize(
    "run",
    [
        lambda layer, x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True),
        lambda layer, x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False),
        lambda layer, x: layer(x.detach()),
        lambda layer, x: layer(x).data,
        lambda layer, x: layer(x) + x.detach().mean(1, keepdim=True),
        without_gradients,
        torch.no_grad()(lambda layer, x: layer(x)),
        lambda layer, x: Reversible.apply(x, nn.ModuleList([layer])),
        lambda layer, x: Reversible.apply(x, [layer]),
        lambda layer, x: Newer.apply(layer, x),
        lambda layer, x: Rounded.apply(layer(x)),
    ],
    ids=[
        *("reentrant", "checkpoint", "detach", "data", "both", "no_grad", "decorator"),
        *("reversible", "list", "newer", "rounded"),
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_stopped_gradients_hide_nothing(run):
    torch.manual_seed(0)
    net, x = Stopped(run), torch.randn(3, 4)
    net.a.bias.requires_grad_(False)
    checkpoint, apply = torch.utils.checkpoint.CheckpointFunction.apply, Rounded.apply
    assert units(net, x) == {"a": 12, "b": 10}
    assert Rounded.apply == apply
    assert torch.utils.checkpoint.CheckpointFunction.apply == checkpoint
    report = prune_channels(net, x, target="macs=0.5", importance=MAGNITUDE)
    assert report.achieved["macs"] <= 0.5
    assert net(x).shape == (3, 2)


def test_a_forward_that_writes_into_its_buffers_is_traced_as_it_is():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))
            self.a, self.head = nn.Linear(4, 12), nn.Linear(12, 2)

        def forward(self, x):
            self.seen += x.detach().abs().mean(0)
            return self.head(torch.relu(self.a(x)))

    net = Counting()
    assert units(net, torch.randn(3, 4)) == {"a": 12}
    assert not isinstance(net.seen, nn.Parameter)


def test_a_forward_that_assigns_its_buffers_keeps_them_buffers():
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(12))
            self.register_buffer("other", torch.randn(2))
            self.a, self.head = nn.Linear(4, 12), nn.Linear(12, 2)

        def forward(self, x):
            self.table = self.table.to(x.device)
            return self.head(torch.relu(self.a(x)) + self.table) + self.other

    net = Moving()
    keys = list(net.state_dict())
    prune_channels(net, torch.randn(3, 4), target="macs=0.5", importance=MAGNITUDE)
    assert list(net.state_dict()) == keys
    assert not isinstance(net.table, nn.Parameter)
    assert len(net.table) == net.a.out_features < 12


class CrossStage(nn.Module):
    """C2f of YOLO: halves of a convolution, the second one also through blocks that add to it, all side by side."""

    def __init__(self):
        super().__init__()
        self.stem, self.cv1, self.cv2 = nn.Conv2d(3, 10, 1), nn.Conv2d(10, 16, 1), nn.Conv2d(32, 6, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 7, 3, padding=1), nn.ReLU(), nn.Conv2d(7, 8, 1)) for _ in range(2)
        )
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        parts = list(torch.relu(self.cv1(torch.relu(self.stem(x)))).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.head(torch.relu(self.cv2(torch.cat(parts, 1))))


def test_halves_stay_halves():
    torch.manual_seed(0)
    net = CrossStage()
    assert units(net, IMAGE) == {"stem": 10, "blocks.1.2": 8, "blocks.0.0": 7, "blocks.1.0": 7, "cv2": 6}
    assert_removing_is_silencing(net, IMAGE)
    report = prune_channels(net, IMAGE, target="macs=0.4", importance=MAGNITUDE)
    assert report.left_whole.keys() == {"head"}
    assert net.cv1.out_channels == 2 * net.blocks[0][0].in_channels < 16


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(8), nn.GroupNorm(1, 8), nn.InstanceNorm2d(8, affine=True)],
    ids=lambda norm: type(norm).__name__,
)
def test_norms_with_a_scale_and_no_bias_lose_channels(norm):
    norm.bias = None
    net = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 1))
    kept = norm.weight.data.copy_(torch.arange(8.0))
    prune_channels(net, IMAGE, target="macs=0.5", importance=MAGNITUDE)
    assert norm.bias is None
    assert len(norm.weight) == 4 == net[0].out_channels
    assert set(norm.weight.tolist()) <= set(kept.tolist())
    net.train()(IMAGE).sum().backward()


def test_a_wide_layer_norm_keeps_the_order_of_its_channels():
    net = nn.Sequential(nn.Linear(6, 40), nn.LayerNorm(40), nn.Linear(40, 3))
    for values in (net[0].bias, net[1].weight, net[1].bias):
        values.data = torch.arange(40.0)
    prune_channels(net, torch.randn(5, 6), target="macs=0.4", importance=MAGNITUDE)
    assert len(net[0].bias) == 16
    assert torch.equal(net[1].weight, net[0].bias)
    assert torch.equal(net[1].bias, net[0].bias)
