"""Targets that say how many channels each group keeps, as the report of another cut does."""

import copy

import pytest
import timm
import torch
import torch_pruning as tp
from torch import nn

import bayesprune as bp
from bayesprune import gates
from bayesprune.errors import InfeasibleTargetError
from bayesprune.gates import InclusionImportance
from bayesprune.gates.gate import named_gates
from bayesprune.prune import prune_channels

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
MAGNITUDE = tp.importance.MagnitudeImportance()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)]
    return bp.to_variational(nn.Sequential(*layers))


def test_a_control_removes_as_many_of_each_group_and_its_own_lowest():
    report = prune_channels(mlp(), X[:1], "macs=0.5", data=[X])
    own = prune_channels(mlp(), X[:1], "macs=0.5", importance=MAGNITUDE)
    assert own.sizes != report.sizes
    found = prune_channels(mlp(), X[:1], report.sizes, importance=MAGNITUDE)
    assert (found.sizes, found.target) == (report.sizes, "the sizes of 2 groups")
    assert "as many kept of every group as were given" in found.how
    for layer, removed in found.removed.items():
        both = set(removed), set(own.removed.get(layer, ()))
        assert both[0] <= both[1] or both[1] <= both[0], "the lowest of one ranking"


def test_what_is_left_out_stays_whole_and_there_is_no_floor():
    model = mlp()
    report = prune_channels(model, X[:1], {"0": 2})
    assert report.sizes == {"0": 2, "2": 12}
    assert model(X).shape == (64, 3)
    assert prune_channels(model, X[:1], report.sizes).removed == {}


def test_data_rank_and_compensate_and_nothing_is_searched():
    model, plain = mlp().eval(), mlp().eval()
    report = prune_channels(model, X[:1], {"0": 10, "2": 8}, data=[X])
    prune_channels(plain, X[:1], report.sizes, importance=MAGNITUDE)
    assert report.how.startswith("channels ranked by UnitSNRImportance; as many kept of every group as were given")
    dense = mlp().eval()(X)
    assert (model(X) - dense).norm() < 0.5 * (plain(X) - dense).norm()


def test_gates_say_how_many_of_the_network_that_they_began_with():
    gated, dense = mlp(), mlp()
    gates.add_channel_gates(gated, X[:1])
    closed = {"0": 5, "2": 2}
    for name, gate in named_gates(gated):
        gate.logits.data[: closed[name]] = -4.0
    report = prune_channels(gated, X[:1], "inclusion=0.5", dry_run=True)
    assert report.sizes == {"0": 11, "2": 10}
    prune_channels(dense, X[:1], report.sizes, data=[X])
    assert [dense[0].out_features, dense[2].out_features] == [11, 10]
    found = prune_channels(gated, X[:1], report.sizes, importance=InclusionImportance())
    assert found.removed == {"0": tuple(range(5)), "2": (0, 1)}


def test_heads_are_counted_in_the_channels_of_their_keys():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 4}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes).eval()
    x = torch.randn(2, 3, 32, 32)
    report = prune_channels(vit, x, {"blocks.0.attn": 12, "blocks.1.mlp.fc1": 40}, importance=MAGNITUDE)
    kept = {row.layer: (row.kept, row.kept_heads) for row in report.rows if row.kept < row.channels}
    assert kept == {"blocks.0.attn": (12, 2), "blocks.1.mlp.fc1": (40, 0)}
    with pytest.raises(
        InfeasibleTargetError, match=r"keep 11 of its 24 channels; expected at most that, in multiples of"
    ):
        prune_channels(vit, x, {"blocks.1.attn": 11}, importance=MAGNITUDE)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"0": 17}, InfeasibleTargetError, "keep 17 of its 16 channels"),
        ({"1": 4}, ValueError, "the sizes name '1', which is the root layer of no group of channels; expected some"),
        ({"4": 2}, InfeasibleTargetError, "keep 2 channels, and it cannot lose any: it is an output of the model"),
        ({"0": 0.5}, ValueError, "is to keep 0.5 channels of '0'; expected a number of 1 or more"),
        ({"0": 0}, ValueError, "is to keep 0 channels of '0'"),
    ],
)
def test_sizes_that_cannot_be_say_so_and_change_nothing(sizes, error, message):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        prune_channels(model, X[:1], sizes)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("options", [{"uniform": True}, {"round_to": 4}])
def test_sizes_take_no_rule_for_sizes(options):
    with pytest.raises(ValueError, match="got sizes; they take no uniform=True and no round_to"):
        prune_channels(mlp(), X[:1], {"0": 4}, **options)
