"""The check of the dependency graph sees a wrong index in any branch, and does not call a right graph wrong."""

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

from bayesprune.errors import InfeasibleTargetError
from bayesprune.prune.channels.prune import prune_channels
from bayesprune.prune.graph.find import find_groups

MAGNITUDE = tp.importance.MagnitudeImportance(normalizer=None)


class Reversed(nn.Module):
    """Puts the channels in reverse, of which torch-pruning knows nothing; `end` makes the output."""

    def __init__(self, end=lambda y: y):
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 16, 1), nn.Linear(64, 20), nn.Linear(20, 2)
        self.end = end

    def features(self, x):
        return self.fc2(torch.relu(self.fc1(torch.relu(self.conv(x)).flip(1).flatten(1))))

    def forward(self, x):
        return self.end(self.features(x))


class SmallBranch(Reversed):
    """The reversal stands in a branch that adds next to nothing to the stream."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(12, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.stem(x.flatten(1)) + 1e-4 * self.features(x))


class DeadBranch(Reversed):
    """No channel that is reversed is ever above zero."""

    def __init__(self):
        super().__init__()
        nn.init.constant_(self.conv.bias, -100.0)


IMAGE = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def left_whole(net, x, *, target=0.9, **options) -> dict[str, str]:
    torch.manual_seed(1)
    return prune_channels(net, x, target=f"macs={target}", importance=MAGNITUDE, dry_run=True, **options).left_whole


@pytest.mark.parametrize(
    "build",
    [
        lambda: Reversed(lambda y: y * 0),
        lambda: Reversed(lambda y: y[:0]),
        lambda: Reversed(lambda y: y / 0),
        lambda: Reversed(lambda y: {"class": y.argmax(1), "one": y.softmax(1).sum()}),
        lambda: Reversed(lambda y: y + 1e5),
        lambda: Reversed().bfloat16(),
        SmallBranch,
        DeadBranch,
    ],
    ids=["zero", "empty", "infinite", "classes", "far from zero", "bfloat16", "small branch", "dead branch"],
)
def test_a_wrong_index_is_seen_whatever_the_outputs_are(build):
    torch.manual_seed(0)
    net = build()
    reasons = left_whole(net, IMAGE.to(net.conv.weight.dtype))
    assert "fc1 does not read the same" in reasons["conv"]
    assert "fc1" not in reasons


class Swapped(nn.Module):
    """Two layers side by side, which `roll` puts in each other's place; the graph takes it for elementwise."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.a, self.b, self.fc, self.head = (nn.Linear(*s) for s in ((4, size), (4, size), (2 * size, 8), (8, 2)))

    def forward(self, x):
        joined = torch.cat([self.a(x), self.b(x)], 1)
        return self.head(torch.relu(self.fc(torch.relu(joined.roll(self.size, 1)))))


@pytest.mark.parametrize("size", [2, 3, 12])
def test_two_groups_of_one_size_in_each_others_place_are_seen(size):
    torch.manual_seed(0)
    reasons = left_whole(Swapped(size), torch.randn(5, 4))
    assert {"a", "b"} <= reasons.keys()
    assert "fc does not read the same" in reasons["a"]
    assert "fc" not in reasons


class Noisy(nn.Module):
    """A variational autoencoder whose dropout stays on: no two forwards give the same."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw
        self.encoder, self.mean, self.scale = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.decoder, self.out = nn.Linear(8, 16), nn.Linear(16, 6)

    def forward(self, x):
        hidden = F.dropout(torch.relu(self.encoder(x)), 0.5, training=True)
        latent = self.draw(self.mean(hidden), self.scale(hidden).exp())
        return self.out(torch.relu(self.decoder(latent)))


@pytest.mark.parametrize(
    "draw",
    [
        lambda mean, std: mean + std * torch.randn_like(mean),
        torch.normal,
        lambda mean, std: torch.distributions.Normal(mean, std).rsample(),
        lambda mean, std: F.gumbel_softmax(mean + std),
        lambda mean, std: mean + std * torch.bernoulli(torch.full_like(mean, 0.5)),
    ],
    ids=["reparametrised", "normal", "distribution", "gumbel", "bernoulli"],
)
def test_noise_in_a_forward_makes_no_graph_wrong(draw):
    torch.manual_seed(0)
    net, x = Noisy(draw), torch.randn(4, 6)
    state = torch.get_rng_state()
    structure = find_groups(net, x)
    assert {group.name: len(group.units) for group in structure.groups} == {"encoder": 16, "mean": 8, "decoder": 16}
    assert structure.left_whole.keys() == {"out"}
    assert not torch.equal(net(x), net(x)), "the noise is the model's own again"
    torch.set_rng_state(state)


def test_a_wrong_index_is_seen_in_spite_of_noise():
    torch.manual_seed(0)
    reasons = left_whole(Reversed(lambda y: F.dropout(y, 0.5, training=True)), IMAGE)
    assert "fc1 does not read the same" in reasons["conv"]


def test_a_right_graph_behind_dead_units_is_not_suspected():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 2))
    nn.init.constant_(net[0].bias, -100.0)
    nn.init.zeros_(net[2].weight)
    before = {name: (id(value), value.clone()) for name, value in net.state_dict().items()}
    structure = find_groups(net, torch.randn(3, 4))
    assert [group.name for group in structure.groups] == ["0", "2"]
    assert all(torch.equal(value, before[name][1]) for name, value in net.state_dict().items())


def test_what_cannot_be_checked_is_left_whole_and_named():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    with pytest.raises(InfeasibleTargetError, match="cannot be checked: on these example_inputs"):
        left_whole(net, torch.full((3, 4), torch.nan))


class ReadByOperations(nn.Module):
    """What two layers make is read by a product alone."""

    def __init__(self, *, in_order: bool):
        super().__init__()
        self.one, self.other, self.head = nn.Linear(4, 16), nn.Linear(4, 16), nn.Linear(1, 2)
        self.in_order = in_order

    def forward(self, x):
        one, other = self.one(x), self.other(x)
        return self.head((one * (other if self.in_order else other.roll(1, 1))).sum(1, keepdim=True))


def test_channels_that_no_layer_reads_are_judged_by_what_is_behind_them():
    x = torch.randn(3, 4)
    assert left_whole(ReadByOperations(in_order=True), x).keys() == {"head"}
    with pytest.raises(InfeasibleTargetError, match="head does not read the same"):
        left_whole(ReadByOperations(in_order=False), x)


@pytest.mark.parametrize("depth", [4, 12])
def test_a_wrong_group_among_many_takes_few_forwards(depth):
    class Deep(Reversed):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 12)) for _ in range(depth)
            )
            self.forwards = 0

        def forward(self, x):
            self.forwards += 1
            stream = x.flatten(1)
            for block in self.blocks:
                stream = stream + block(stream)
            return self.features(stream.view(x.shape))

    torch.manual_seed(0)
    net = Deep()
    structure = find_groups(net, IMAGE, granularity=("mlp", "width"))
    assert "fc1 does not read the same" in structure.left_whole["conv"]
    assert len(structure.groups) == depth + 1
    assert net.forwards <= 5 + 2 * depth.bit_length()


def test_a_layer_that_sees_one_vector_without_a_batch_is_checked():
    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(torch.relu(self.b(torch.relu(self.a(x[0])))))

    torch.manual_seed(0)
    structure = find_groups(Vector(), torch.randn(1, 4))
    assert [group.name for group in structure.groups] == ["a", "b"]


def test_a_convolution_that_takes_its_channels_last_is_checked():
    class ChannelsLast(nn.Conv1d):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), ChannelsLast(8, 6, 1), nn.ReLU(), ChannelsLast(6, 2, 1))
    report = prune_channels(
        net, torch.randn(2, 5, 4), target="macs=0.6", importance=tp.importance.MagnitudeImportance()
    )
    assert report.achieved["macs"] <= 0.6
    assert net(torch.randn(2, 5, 4)).shape == (2, 5, 2)
