"""Every layer that is left whole is left with its own cause, and with what to do about it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from bayesprune.prune.graph.find import find_groups


class Net(nn.Module):
    """Two layers with a function in between, which may use more layers."""

    def __init__(self, between, read=8, **more):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 8), nn.Linear(read, 6), nn.Linear(6, 2)
        self.between = between
        for name, part in more.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.head(torch.relu(self.b(self.between(self, torch.relu(self.a(x))))))


def under_inference_mode(net, x):
    with torch.inference_mode():
        side = net.side(x)
    return x + side.mean().item()


def sorted_by(net, x):
    return x * (net.side(x).argmax(1, keepdim=True) + 1)


class Doubled(nn.Linear):
    """A layer of one's own that is a linear layer."""

    def forward(self, x):
        return 2 * super().forward(x)


CASES = {
    "not called": (Net(lambda net, x: x, side=nn.Linear(5, 8)), "side", "not called with example_inputs", "delete it"),
    "under inference mode": (
        Net(under_inference_mode, side=nn.Linear(8, 3)),
        "side",
        "no history, as under torch.inference_mode",
        "torch.no_grad in the forward hides none",
    ),
    "turned into integers": (
        Net(sorted_by, side=nn.Linear(8, 3)),
        "side",
        "turned into integers",
        "count as outputs of the model",
    ),
    "used by another": (
        Net(lambda net, x: F.linear(x, net.side.weight * 2), side=nn.Linear(8, 8)),
        "side",
        "(Net) or another module uses its weight without calling it",
        "no graph shows its channels",
    ),
}


def reason_for(net: nn.Module, layer: str, x=None) -> str:
    torch.manual_seed(0)
    return find_groups(net, torch.randn(3, 4) if x is None else x).left_whole[layer]


def test_a_layer_of_ones_own_holds_nothing_back():
    """Whether it puts out several tensors is seen by a forward that is no part of the graph."""
    parts = {"mid": nn.Linear(8, 5), "few": nn.Parameter(torch.rand(5)), "own": Doubled(5, 8)}
    net = Net(lambda net, x: net.own(net.mid(x) * net.few) * net.many, **parts, many=nn.Parameter(torch.rand(8)))
    torch.manual_seed(0)
    assert find_groups(net, torch.randn(3, 4)).left_whole == {"head": "it is an output of the model"}


@pytest.mark.parametrize("name", ["not called", "under inference mode", "turned into integers", "used by another"])
@pytest.mark.filterwarnings("ignore:example_inputs do not call side")
def test_a_layer_that_is_not_in_the_graph_says_why(name):
    net, layer, cause, then = CASES[name]
    found = reason_for(net, layer)
    assert cause in found
    assert then in found


@pytest.mark.parametrize(
    ("between", "read", "cause"),
    [
        (lambda net, x: F.pad(x, (1, 2)), 11, "is wrong about it: ConstantPadNd in between"),
        (
            lambda net, x: x.repeat(1, 2),
            16,
            "b does not read the same, so the dependency graph is wrong about it: Repeat",
        ),
        (lambda net, x: x[:, [0, 2, 4]], 3, "b has 3 channels and the graph leads 8 to it: Index in between"),
        (
            lambda net, x: x.unfold(1, 4, 4).amax(2),
            2,
            "b has 2 channels and the graph leads 8 to it: Unfold in between",
        ),
        (lambda net, x: x.view(len(x), 2, 4).sum(1), 4, "is wrong about it: View in between moves or counts channels"),
        (
            lambda net, x: (x.view(-1, 2, 4) * net.table).flatten(1),
            8,
            "table meets its channels and has 4 entries",
        ),
    ],
    ids=["pad", "repeat", "index", "unfold", "view", "parameter"],
)
def test_what_moves_channels_in_between_is_named(between, read, cause):
    assert cause in reason_for(Net(between, read=read, table=nn.Parameter(torch.randn(4))), "a")


@pytest.mark.parametrize(
    ("change", "call"),
    [
        (parametrizations.weight_norm, "remove_parametrizations(0, 'weight')"),
        (parametrizations.spectral_norm, "remove_parametrizations(0, 'weight')"),
        (parametrizations.orthogonal, "remove_parametrizations(0, 'weight')"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "torch.nn.utils.prune.remove(0, 'weight')"),
        (nn.utils.spectral_norm, "torch.nn.utils.remove_spectral_norm(0)"),
    ],
    ids=["weight norm", "spectral norm", "orthogonal", "pruned", "spectral norm by hooks"],
)
def test_a_computed_weight_says_how_it_becomes_a_parameter_again(change, call):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    change(net[0])
    assert call in reason_for(net, "0")
    if parametrize.is_parametrized(net[0]):
        parametrize.remove_parametrizations(net[0], "weight")
        assert [group.name for group in find_groups(net, torch.randn(3, 4)).groups] == ["0", "2"]
