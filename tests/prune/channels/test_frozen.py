"""Frozen weights stay: they get no posterior, and nothing that removes anything touches them."""

import pytest
import torch
import torch_pruning as tp
from torch import nn

import bayesprune as bp
from bayesprune.prune import layer_shares
from bayesprune.prune.graph.find import find_groups
from bayesprune.prune.scores.weights import magnitude
from tests.prune.attention_nets import BY_NAME

FROZEN = "it is frozen (requires_grad=False)"
MAGNITUDE = tp.importance.MagnitudeImportance(normalizer=None)
X = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def edges() -> nn.Module:
    """Two fixed edge filters in front of a net that trains."""
    torch.manual_seed(1)
    sobel = nn.Conv2d(1, 2, 3, padding=1, bias=False)
    sobel.weight.data[0, 0] = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    sobel.weight.data[1, 0] = sobel.weight.data[0, 0].t()
    sobel.requires_grad_(False)
    return nn.Sequential(
        *(sobel, nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    )


def test_a_fixed_filter_gets_no_posterior_and_keeps_its_weights():
    net = edges()
    sobel = net[0].weight.detach().clone()
    rows = {row.name: row for row in bp.conversion_table(net)}
    assert (rows["0"].status, rows["0"].reason) == ("left", FROZEN)
    bp.to_variational(net)
    assert type(net[0]) is nn.Conv2d
    report = bp.prune_weights(net, "weights=0.1")
    assert torch.equal(net[0].weight, sobel)
    assert [(row.name, row.total, row.kept, row.note) for row in report.untouched] == [("0.weight", 18, 18, FROZEN)]
    assert report.removable.kept == 744 - round(0.9 * 744)
    assert (report.total, report.kept) == (762, 18 + report.removable.kept)
    assert f"untouched: 0.weight (18 weights): {FROZEN}" in str(report)


@pytest.mark.parametrize("importance", [None, MAGNITUDE], ids=["posterior", "magnitude"])
def test_channels_of_a_frozen_layer_stay_on_both_sides(importance):
    net = edges()
    net[4].requires_grad_(False)  # it would lose inputs with the layer before it
    before = [net[index].weight.detach().clone() for index in (0, 4)]
    net.insert(8, nn.Linear(8, 8))
    if importance is None:
        bp.to_variational(net)
    report = bp.prune_channels(net, X, target="params=0.97", importance=importance)
    assert torch.equal(net[0].weight, before[0])
    assert torch.equal(net[4].weight, before[1])
    assert report.left_whole["0"] == report.left_whole["4"] == FROZEN
    assert report.left_whole["1"] == "4, which would lose channels too, is frozen (requires_grad=False)"
    assert list(report.removed) == ["8"]


def test_frozen_norms_and_biases_hold_no_channels_back():
    net = edges()
    for parameter in (net[1].bias, *net[2].parameters()):
        parameter.requires_grad_(False)
    bp.to_variational(net)
    report = bp.prune_channels(net, X, target="macs=0.5")
    assert "1" in report.removed
    assert net[2].weight.shape == net[1].bias.shape == net[1].weight.shape[:1]


def test_what_is_frozen_after_training_keeps_its_posterior_and_its_weights():
    net = bp.to_variational(edges())
    net[4].requires_grad_(False)
    (row,) = (row for row in bp.conversion_table(net) if row.name == "4")
    assert (row.status, row.reason) == ("converted", f"{FROZEN} since: nothing of it is removed")
    before = net[4].weight.detach().clone()
    report = bp.prune_weights(net, "snr=1e+09")
    assert torch.equal(net[4].weight, before)
    assert {row.name: row.note for row in report.untouched} == {"0.weight": FROZEN, "4.weight": FROZEN}
    assert [row.kept for row in report.rows] == [1, 1]
    assert bp.prune_channels(net, X, target="snr=1e+09").left_whole["4"] == FROZEN


def test_zeros_of_a_layer_that_was_frozen_later_count():
    net = bp.to_variational(edges())
    bp.prune_weights(net, "weights=0.5")
    net[4].requires_grad_(False)
    report = bp.prune_weights(net, "weights=0.5", scope="layer")
    assert report.kept == sum(int((layer.weight != 0).sum()) for layer in (net[1], net[4], net[8])) + 18


def test_laplace_measures_a_layer_that_was_frozen_since_and_nothing_removes_it():
    net = bp.to_variational(edges())
    net[1].requires_grad_(False)
    start, before = net[1].weight_log_std.detach().clone(), net[1].weight.detach().clone()
    bp.laplace.fit_laplace(net, [(X, torch.tensor([0, 1]))])
    assert not torch.equal(net[1].weight_log_std, start)
    bp.prune_weights(net, "weights=0.5")
    assert torch.equal(net[1].weight, before)


def test_a_model_that_is_frozen_all_over_says_what_to_do():
    net = edges().requires_grad_(False)
    again = r"model\.requires_grad_\(True\) first"
    with pytest.raises(ValueError, match=rf"no layer: .*frozen \(requires_grad=False\)\. Call {again}"):
        bp.to_variational(net)
    with pytest.raises(ValueError, match=rf"all layers of this model are frozen .*{again}"):
        bp.prune_channels(net, X, target="macs=0.5", importance=MAGNITUDE)
    bp.to_variational(net.requires_grad_(True)).requires_grad_(False)
    with pytest.raises(ValueError, match=rf"all 4 weight tensors with a posterior are frozen .*{again}"):
        bp.prune_weights(net, "weights=0.5")
    with pytest.raises(ValueError, match=rf"all layers of this model are frozen .*{again}"):
        bp.prune_channels(net, X, target="macs=0.5")
    assert bp.prune_weights(net.requires_grad_(True), "weights=0.5").sparsity == 0.5


def test_naming_a_frozen_layer_is_refused():
    net = bp.to_variational(edges())
    net[4].requires_grad_(False)
    with pytest.raises(ValueError, match="the target names '4', of which the model has no weights"):
        bp.prune_weights(net, {"1": 0.5, "4": 0.5})


def test_measured_sparsities_are_those_of_layers_that_train():
    net = bp.to_variational(edges())
    net[4].requires_grad_(False)
    found = layer_shares(net, "weights=0.5", lambda model: model(X).square().mean(), score=magnitude, levels=(0.5,))
    assert found.keys() == {"1.weight", "8.weight"}
    assert bp.prune_weights(net, found).removable.sparsity == pytest.approx(0.5, abs=0.01)


def test_compress_measures_the_weights_that_can_go():
    net = bp.to_variational(edges())
    net[4].requires_grad_(False)
    found = bp.prune.smallest_within(net, evaluate=lambda model: 0.0, tolerance=0.0, by="weights", min_step=0.3)
    assert found.trials[0].kept == 1
    assert torch.equal(found.model[4].weight, net[4].weight)


def test_heads_of_a_frozen_projection_stay():
    case = BY_NAME["timm_vit"]
    net, x = case.net(), case.inputs()
    net.blocks[0].attn.proj.requires_grad_(False)
    structure = find_groups(net, x, granularity=("heads",))
    assert [group.name for group in structure.groups] == ["blocks.1.attn"]
    reason = "blocks.0.attn.proj, which would lose channels too, is frozen (requires_grad=False)"
    assert structure.left_whole["blocks.0.attn.qkv"] == reason


def test_a_pruner_of_torch_pruning_gets_no_score_for_frozen_layers():
    net = bp.to_variational(edges())
    net[4].requires_grad_(False)
    graph = tp.DependencyGraph().build_dependency(net.requires_grad_(True), X, verbose=False)
    group = graph.get_pruning_group(net[1], tp.prune_conv_out_channels, list(range(8)))
    for importance in (bp.SNRImportance(), bp.prune.EvidenceImportance()):
        assert importance(group).shape == (8,)
        net[4].requires_grad_(False)
        assert importance(group) is None
        net.requires_grad_(True)


def test_a_saved_posterior_comes_back_into_a_frozen_model(tmp_path):
    net = bp.to_variational(edges())
    bp.save(net, tmp_path)
    loaded = bp.load(tmp_path, model=edges().requires_grad_(False))
    assert torch.equal(loaded[4].weight_log_std, net[4].weight_log_std)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert type(loaded[0]) is nn.Conv2d
