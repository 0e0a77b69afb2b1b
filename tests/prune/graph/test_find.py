import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import bayesprune as bp
from bayesprune.errors import UnsupportedModelError
from bayesprune.prune.graph.find import find_groups
from bayesprune.prune.graph.removal import remove
from bayesprune.prune.graph.verify import permute
from tests.prune.nets import nets


class Gated(nn.Module):
    """A gated linear unit: channels i and i + 8 leave together."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(8, 3)

    def forward(self, x):
        value, gate = self.fc1(x).chunk(2, dim=1)
        return self.fc2(value * torch.sigmoid(gate))


class Concatenated(nn.Module):
    """Two branches side by side, then one layer on top that adds to both."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.top, self.head = (
            nn.Conv2d(3, 4, 1),
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(10, 8, 1),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x):
        return self.head(F.relu(self.top(F.relu(torch.cat([self.a(x), self.b(x)], 1)))))


class Reversed(nn.Module):
    """Puts the channels in reverse, of which torch-pruning knows nothing."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 4, 1), nn.Linear(36, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = F.relu(self.conv(x)).flip(1).flatten(1)
        return self.fc2(F.relu(self.fc1(x)))


class Heads(nn.Module):
    """Attention of one's own, which names its number of heads in no attribute."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.proj, self.head = nn.Linear(5, 8), nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


def units(structure) -> dict[str, int]:
    return {group.name: len(group.units) for group in structure.groups}


@nets
def test_any_order_of_the_channels_gives_the_same_output(case):
    net, x = case.net().eval(), case.input()
    structure, before = find_groups(net, x), net(x)
    weights = {name: parameter.clone() for name, parameter in net.named_parameters()}
    permute(net, structure.groups)
    changed = [name for name, parameter in net.named_parameters() if not torch.equal(parameter, weights[name])]
    assert len(changed) >= 4
    torch.testing.assert_close(net(x), before)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "vit_tiny_patch16_224"])
def test_groups_of_timm_models_are_right(name):
    options = {"img_size": 32, "depth": 2} if name.startswith("vit") else {}
    net, x = timm.create_model(name, num_classes=5, **options).eval(), torch.randn(1, 3, 32, 32)
    structure = find_groups(net, x)
    assert len(structure.groups) > 2


def test_examining_leaves_the_model_as_it_was():
    net, x = Concatenated(), torch.randn(1, 3, 2, 2)
    net.a.requires_grad_(False)
    net.b.eval()
    before = [(id(p), p.requires_grad, p._version) for p in net.parameters()]
    find_groups(net, x)
    assert [(id(p), p.requires_grad, p._version) for p in net.parameters()] == before
    assert net.training
    assert net.a.training
    assert not net.b.training


def test_groups_of_a_concatenation_cut_their_own_part():
    structure = find_groups(Concatenated(), torch.randn(1, 3, 2, 2))
    assert units(structure) == {"a": 4, "b": 6, "top": 8}
    positions = {
        group.name: [member.positions for member in group.members if member.axis == ("top", "in")]
        for group in structure.groups
    }
    assert positions["a"] == [{i: [i] for i in range(4)}]
    assert positions["b"] == [{i: [i + 4] for i in range(6)}]


def test_the_halves_of_a_gated_unit_leave_together():
    (group,) = find_groups(Gated(), torch.randn(2, 6)).groups
    assert group.units == tuple((i, i + 8) for i in range(8))


def test_blocks_of_grouped_convolutions_and_group_norms_stay_equal():
    net = nn.Sequential(
        *(nn.Conv2d(3, 12, 1), nn.GroupNorm(2, 12), nn.ReLU(), nn.Conv2d(12, 12, 1, groups=3)),
        nn.Conv2d(12, 2, 1),
    )
    by_name = {group.name: group for group in find_groups(net, torch.randn(1, 3, 4, 4)).groups}
    assert {frozenset(unit) for unit in by_name["0"].units} == {frozenset(range(i, 12, 2)) for i in range(2)}
    assert {frozenset(unit) for unit in by_name["3"].units} == {frozenset(range(i, 12, 4)) for i in range(4)}


@pytest.mark.parametrize(
    ("build", "layer", "reason"),
    [
        (Heads, "qkv", "product of activations"),
        (
            lambda: nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 2)),
            "0",
            "1.self_attn (MultiheadAttention) stays whole",
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 8, 2, groups=2)), "0", "grouped transposed"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm([4, 5, 5]), nn.Conv2d(4, 2, 1)),
            "0",
            "more than channels",
        ),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1, groups=4), nn.Conv2d(8, 2, 1)),
            "0",
            "all together",
        ),
    ],
)
def test_what_cannot_be_cut_rightly_is_left_whole(build, layer, reason):
    net = build()
    has_tokens = any(isinstance(module, nn.Linear) for module in net.modules())
    structure = find_groups(net, torch.randn((2, 3, 5) if has_tokens else (1, 3, 5, 5)))
    assert reason in structure.left_whole[layer]
    assert layer not in units(structure)


def test_a_transformer_layer_of_torch_loses_its_hidden_units():
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    structure = find_groups(net, torch.randn(1, 3, 8))
    assert units(structure) == {"0.linear1": 16}
    assert "another module uses its weight" in structure.left_whole["0.self_attn.out_proj"]


def test_a_width_of_own_attention_may_go():
    structure = find_groups(Heads(), torch.randn(2, 3, 5))
    assert list(units(structure).values()) == [8]


def test_outputs_are_found_wherever_they_leave():
    class TwoOutputs(Concatenated):
        def forward(self, x):
            hidden = F.relu(self.top(torch.cat([self.a(x), self.b(x)], 1)))
            return {"features": hidden, "logits": [self.head(hidden).softmax(1)]}

    structure = find_groups(TwoOutputs(), torch.randn(1, 3, 2, 2))
    assert units(structure) == {"a": 4, "b": 6}
    assert structure.left_whole == dict.fromkeys(["top", "head"], "it is an output of the model")


def test_a_wrong_graph_is_found_out():
    net, x = Reversed().eval(), torch.randn(2, 3, 3, 3)
    structure = find_groups(net, x)
    assert units(structure) == {"fc1": 5}
    assert structure.left_whole["conv"].startswith("with its channels in another order fc1 does not read the same")


class Gained(nn.Conv2d):
    """A convolution with one more factor of its weight, as those that standardise it have."""

    def __init__(self, *sizes, gain):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.rand(gain))

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.gain, self.bias)


def test_parameters_that_the_graph_does_not_know_keep_their_layer_whole():
    net = nn.Sequential(Gained(3, 4, 1, gain=(1, 3, 1, 1)), nn.Conv2d(4, 2, 1))
    structure = find_groups(net, torch.randn(1, 3, 2, 2))
    assert structure.left_whole["0"].startswith("torch-pruning does not know 0.gain, a parameter without an entry")


@pytest.mark.parametrize("is_variational", [False, True])
def test_a_gain_by_output_goes_with_it(is_variational):
    net, x = nn.Sequential(Gained(3, 4, 1, gain=(4, 1, 1, 1)), nn.Conv2d(4, 2, 1)).eval(), torch.randn(1, 3, 2, 2)
    if is_variational:
        bp.to_variational(net)
    (group,) = find_groups(net, x).groups
    gain, weight = net[0].gain.detach().clone(), net[0].weight.detach().clone()
    undo = remove(net, [(group, [(1,), (2,)])])
    assert torch.equal(net[0].gain, gain[[0, 3]])
    assert torch.equal(net[0].weight, weight[[0, 3]])
    assert net(x).shape == (1, 2, 2, 2)
    undo()
    assert torch.equal(net[0].gain, gain)


def test_models_that_cannot_be_traced_are_refused():
    class NoGraph(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("not today")

    structure = find_groups(NoGraph(3, 2), torch.randn(1, 3))
    assert structure.groups == ()
    with pytest.raises(UnsupportedModelError, match="cannot trace Broken .*not today"):
        find_groups(Broken(3, 2), torch.randn(1, 3))
