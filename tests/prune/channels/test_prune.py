import copy
import warnings
from itertools import pairwise

import pytest
import timm
import torch
import torch_pruning as tp
from torch import nn

import bayesprune as bp
from bayesprune.errors import BayespruneError, InfeasibleTargetError, UnsupportedModelError
from bayesprune.foundation.macs import macs_by_module
from bayesprune.layers import VariationalLayer, variational_layers
from bayesprune.prune.batch_norm import recalibrate_batch_norm, recalibrate_if_better
from bayesprune.prune.channels.calibrated import Calibration
from bayesprune.prune.channels.prune import prune_channels
from bayesprune.prune.scores.channels import SNRImportance
from tests.cases import structures
from tests.prune.nets import NETS, assert_stds_follow, nets, tie_means_to_stds

MAGNITUDE = tp.importance.MagnitudeImportance(normalizer=None)


def mlp(*widths: int) -> nn.Module:
    layers = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def total_macs(model, x) -> int:
    return sum(macs_by_module(model, x).values())


def stock_parameters(model) -> int:
    return sum(p.numel() for p in bp.to_deterministic(copy.deepcopy(model)).parameters())


def state(model) -> dict:
    """Everything that must not change where nothing is to be changed."""
    return {
        "parameters": {n: (id(p), p.requires_grad, p._version) for n, p in model.named_parameters()},
        "values": {n: t.clone() for n, t in model.state_dict().items()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "attributes": {n: m.extra_repr() for n, m in model.named_modules()},
    }


def assert_same_state(one: dict, other: dict) -> None:
    for key in ("parameters", "modes", "attributes"):
        assert one[key] == other[key]
    assert one["values"].keys() == other["values"].keys()
    assert all(torch.equal(value, other["values"][name]) for name, value in one["values"].items())


@nets
@structures
def test_stds_and_masks_follow(case, std):
    net = bp.to_variational(case.net(), std=std)
    tie_means_to_stds(net)
    report = prune_channels(net, case.input(), target="params=0.6")
    assert report.achieved["params"] <= 0.6
    assert_stds_follow(net)
    net.train()
    net(case.input()).sum().backward()
    assert all(p.grad.shape == p.shape for p in net.parameters())


@nets
@pytest.mark.filterwarnings("ignore:torch-pruning .* is not as bayesprune expects")
def test_stds_and_masks_follow_where_torch_pruning_cannot_be_wrapped(case, monkeypatch):
    function = tp.pruner.function.BasePruningFunc._prune_parameter_and_grad
    stock = getattr(function, "__wrapped__", function)

    def private_by_another_name(self, weight, keep_idxs, dim):
        return stock(self, weight, keep_idxs, dim)

    monkeypatch.setattr("bayesprune.prune.graph.companions._WRAPPED", "_gone")
    monkeypatch.setattr(tp.pruner.function.BasePruningFunc, "_prune_parameter_and_grad", private_by_another_name)
    net = bp.to_variational(case.net())
    tie_means_to_stds(net)
    frozen = net[0].bias.requires_grad_(False)
    prune_channels(net, case.input(), target="params=0.5", uniform=True)
    assert net[0].bias.shape != frozen.shape
    assert not net[0].bias.requires_grad
    assert_stds_follow(net)


@nets
def test_the_cut_net_computes_what_the_dense_one_does_without_these_channels(case):
    net, x = bp.to_variational(case.net()).eval(), case.input()
    dense = copy.deepcopy(net)
    report = prune_channels(net, x, target="macs=0.5")
    assert len(report.removed) > 0
    for root, channels in report.removed.items():
        for gate in case.gates[root]:

            def close(module, args, output, channels=channels):
                keep = torch.ones(output.shape[1])
                keep[list(channels)] = 0
                return output * keep.reshape(-1, *[1] * (output.dim() - 2))

            dense.get_submodule(gate).register_forward_hook(close)
    assert net(x).abs().max() > 0
    torch.testing.assert_close(net(x), dense(x), rtol=1e-4, atol=1e-5)


@nets
@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize("uniform", [False, True])
def test_cost_is_exact_and_meets_the_target(case, what, uniform, caplog):
    net, x = bp.to_variational(case.net()), case.input()
    dense = {"macs": total_macs(net, x), "params": stock_parameters(net)}
    with caplog.at_level("INFO", logger="bayesprune.prune.channels.prune"):
        report = prune_channels(net, x, target=f"{what}=0.55", uniform=uniform)
    assert not caplog.records, "the MACs counted after the cut are those that were planned"
    assert (report.macs_before, report.params_before) == (dense["macs"], dense["params"])
    assert (report.macs_after, report.params_after) == (total_macs(net, x), stock_parameters(net))
    assert report.achieved[what] == getattr(report, f"{what}_after") / dense[what] <= 0.55


def test_no_more_is_removed_than_needed():
    net, x = bp.to_variational(mlp(8, 30, 20, 4)), torch.randn(1, 8)
    report = prune_channels(net, x, target="macs=0.5")
    channel = max(8 + 20, 30 + 4)
    assert 0.5 * report.macs_before - channel < report.macs_after <= 0.5 * report.macs_before


def test_lowest_scores_go_first():
    net, x = mlp(8, 12, 4), torch.randn(1, 8)
    net[0].weight.data = torch.ones(12, 8) * (1 + torch.tensor([5, 3, 9, 0, 7, 11, 1, 10, 2, 8, 4, 6]))[:, None]
    net[2].weight.data.fill_(1.0)
    report = prune_channels(net, x, target="macs=0.67", importance=MAGNITUDE)
    assert report.removed == {"0": (1, 3, 6, 8)}
    assert net[0].weight[:, 0].tolist() == [6, 10, 8, 12, 11, 9, 5, 7]


def test_global_ranking_looks_across_layers_and_uniform_inside_them():
    net, x = mlp(8, 20, 20, 4), torch.randn(1, 8)
    net[0].weight.data *= 100
    whole, uniform = copy.deepcopy(net), copy.deepcopy(net)
    kept = {row.layer: row.kept for row in prune_channels(whole, x, target="macs=0.7", importance=MAGNITUDE).rows}
    assert kept["0"] == 20 > kept["2"]
    report = prune_channels(uniform, x, target="macs=0.5", importance=MAGNITUDE, uniform=True)
    assert len({row.kept for row in report.rows}) == 1


def test_every_group_keeps_a_tenth():
    net, x = bp.to_variational(mlp(8, 30, 30, 4)), torch.randn(1, 8)
    for parameter in net[2].parameters():
        parameter.data *= 1e-6
    report = prune_channels(net, x, target="macs=0.036")
    assert {row.kept for row in report.rows} == {3}


@pytest.mark.parametrize("uniform", [False, True])
def test_kept_channels_are_multiples(uniform):
    net, x = bp.to_variational(mlp(8, 32, 30, 6, 4)), torch.randn(1, 8)
    report = prune_channels(net, x, target="macs=0.5", round_to=8, uniform=uniform)
    kept = {row.layer: row.kept for row in report.rows}
    assert kept["0"] % 8 == 0
    assert kept["2"] % 8 == 0
    assert kept["4"] == 6, "smaller than a multiple, so it stays whole"
    assert kept["0"] + kept["2"] < 62


def test_a_size_that_is_no_multiple_is_left_or_made_one():
    net, x = bp.to_variational(mlp(8, 30, 4)), torch.randn(1, 8)
    report = prune_channels(net, x, target="macs=0.99", round_to=8)
    assert report.rows[0].kept == 24


def test_grouped_convolutions_keep_equal_groups():
    case = next(case for case in NETS if case.name == "grouped")
    net = bp.to_variational(case.net())
    report = prune_channels(net, case.input(), target="macs=0.5", round_to=2)
    assert net[3].in_channels % 3 == net[3].out_channels % 3 == 0
    assert all(row.kept % 6 == 0 for row in report.rows if row.layer in ("0", "3"))


def test_snr_target_removes_what_is_below():
    net, x = bp.to_variational(mlp(8, 20, 4)), torch.randn(1, 8)
    for part in net[0].log_std_parts("weight"):
        part.data[5:] += 4
    net[2].weight_log_std.data[:, 5:] += 4
    dense = copy.deepcopy(net)
    snr = torch.cat([(m.weight / m.weight_log_std.exp()).detach() for m in (net[0], net[2])[:1]], 1)
    last = (net[2].weight / net[2].weight_log_std.exp()).detach().T
    rms = torch.cat([snr, last], 1).square().mean(1).sqrt()
    below = tuple((rms < 1.0).nonzero().flatten().tolist())
    assert 0 < len(below) < 18
    report = prune_channels(net, x, target="snr=1")
    assert report.removed == {"0": below}
    assert torch.equal(net[0].weight, dense[0].weight[rms >= 1.0])
    assert prune_channels(net, x, target="snr=1e-09").removed == {}


def test_infeasible_target_says_how_far_it_goes_and_changes_nothing():
    net, x = bp.to_variational(mlp(8, 30, 30, 4)), torch.randn(1, 8)
    before = state(net)
    smallest = (8 * 3 + 3 * 3 + 3 * 4) / (8 * 30 + 30 * 30 + 30 * 4)
    with pytest.raises(InfeasibleTargetError, match=rf"at least {smallest:.4f} of the macs stay") as error:
        prune_channels(net, x, target="macs=0.01")
    assert "it is an output of the model" in str(error.value)
    assert isinstance(error.value, BayespruneError)
    assert_same_state(before, state(net))


def test_dry_run_reports_the_same_and_changes_nothing():
    case = NETS[0]
    net = bp.to_variational(case.net())
    net[0].bias.requires_grad_(False)
    net[1].eval()
    before = state(net)
    dry = prune_channels(net, case.input(), target="macs=0.5", dry_run=True, data=[case.input()])
    assert_same_state(before, state(net))
    done = prune_channels(net, case.input(), target="macs=0.5", data=[case.input()])
    assert dry.dry_run
    assert not done.dry_run
    for name in ("rows", "macs_after", "params_after", "left_whole", "removed"):
        assert getattr(dry, name) == getattr(done, name)


def test_modes_and_frozen_parameters_stay():
    case = NETS[0]
    net = bp.to_variational(case.net())
    for parameter in (net[0].bias, *net[1].parameters(), *net[4].parameters()):
        parameter.requires_grad_(False)
    net[1].eval()
    modes = {name: module.training for name, module in net.named_modules()}
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    report = prune_channels(net, case.input(), target="macs=0.4", uniform=True)
    assert report.removed.keys() == {"0", "3"}
    assert {name: module.training for name, module in net.named_modules()} == modes
    assert {name for name, parameter in net.named_parameters() if not parameter.requires_grad} == frozen
    assert len(frozen) == 5


def test_gradients_are_cut_with_their_weights():
    net, x = bp.to_variational(mlp(8, 12, 4)), torch.randn(1, 8)
    net(x).sum().backward()
    dense = net[0].weight.grad.clone()
    report = prune_channels(net, x, target="macs=0.5")
    kept = [channel for channel in range(12) if channel not in report.removed["0"]]
    assert torch.equal(net[0].weight.grad, dense[kept])


def test_tags_do_not_stay():
    net = mlp(8, 12, 4)
    prune_channels(net, torch.randn(1, 8), target="macs=0.5", importance=MAGNITUDE)
    assert not any(hasattr(parameter, "_bayesprune_kept") for parameter in net.parameters())


class Tied(nn.Module):
    """Embedding and output share their weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.fc2(torch.relu(self.fc1(x))))


def test_tied_weights_stay_tied():
    net, ids = Tied(), torch.arange(5)[None]
    report = prune_channels(net, ids, target="macs=0.3", importance=MAGNITUDE, uniform=True)
    assert net.head.weight is net.embed.weight
    assert net.embed.weight.shape == (11, net.fc1.in_features)
    assert net.fc1.in_features == net.embed.embedding_dim < 8
    assert report.params_after == sum(parameter.numel() for parameter in net.parameters())
    assert net(ids).shape == (1, 5, 11)


def test_weights_that_would_come_apart_are_left_whole():
    net = mlp(8, 8, 8, 4)
    net[2].weight = net[0].weight
    with pytest.raises(InfeasibleTargetError, match="are tied and would be cut differently"):
        prune_channels(net, torch.randn(1, 8), target="macs=0.5", importance=MAGNITUDE)


class Residual(nn.Module):
    """Two layers of one weight on a stream, which are cut alike."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(5, 10), nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        x = self.stem(x)
        x = x + torch.relu(self.a(x))
        return self.head(x + torch.relu(self.b(x)))


@structures
def test_tied_stds_stay_tied(std):
    net, x = bp.to_variational(Residual(), std=std), torch.randn(2, 5)
    report = prune_channels(net, x, target="macs=0.5")
    assert report.macs_after == total_macs(net, x)
    assert net.b.weight is net.a.weight
    assert net.a.weight.shape[0] == net.a.weight.shape[1] < 10
    for one, other in zip(net.a.log_std_parts("weight"), net.b.log_std_parts("weight"), strict=True):
        assert one is other
    assert report.params_after == stock_parameters(net)


MODELS = {
    "resnet18": 32,
    "mobilenetv2_100": 32,
    "resnext50_32x4d": 32,
    "convnext_atto": 32,
    "vit_tiny_patch16_224": 32,
}


@pytest.mark.parametrize("name", MODELS)
def test_timm_models_train_on_after_the_cut(name):
    options = {"img_size": 32} if name.startswith("vit") else {}
    net = timm.create_model(name, num_classes=7, **options)
    bp.to_variational(net, std="rank_one")
    x = torch.randn(2, 3, MODELS[name], MODELS[name])
    report = prune_channels(net, x, target="macs=0.5", uniform=True)
    assert 0.45 < report.achieved["macs"] <= 0.5
    assert all(row.kept < row.channels for row in report.rows)
    outputs = {layer for layer, reason in report.left_whole.items() if reason == "it is an output of the model"}
    assert len(outputs) == 1
    assert net(x).shape == (2, 7)
    net.train()
    net(x).square().sum().backward()
    for _, layer in variational_layers(net):
        assert layer.weight.grad.shape == layer.weight.shape
        assert all(part.grad is not None for part in layer.log_std_parts("weight"))


def test_attention_keeps_its_heads_while_the_width_goes():
    net = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32, depth=2)
    x = torch.randn(1, 3, 32, 32)
    granularity = ("mlp", "width")
    report = prune_channels(net, x, target="macs=0.5", importance=MAGNITUDE, uniform=True, granularity=granularity)
    qkv = net.blocks[0].attn.qkv
    assert qkv.out_features == 3 * 192
    assert qkv.in_features == net.pos_embed.shape[-1] == net.cls_token.shape[-1] == net.norm.normalized_shape[0] < 192
    assert report.left_whole["blocks.0.attn.qkv"].startswith("its outputs are dimensions of attention heads")
    assert "blocks.0.attn.qkv" in str(report)


def test_batch_norm_is_recalibrated_where_that_helps_and_nothing_else():
    case = NETS[0]
    data = [(torch.randn(case.shape), torch.zeros(2)) for _ in range(8)]
    dense = bp.to_variational(case.net())
    recalibrate_batch_norm(dense, data)
    cut, recalibrated = copy.deepcopy(dense), copy.deepcopy(dense)
    options = {"target": "macs=0.3", "importance": bp.SNRImportance(), "before_cut": None}
    prune_channels(cut, case.input(), **options)
    prune_channels(recalibrated, case.input(), data=iter(data), **options)
    calibration = Calibration(dense, data)
    assert calibration.divergence(recalibrated) < calibration.divergence(cut)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    changed = [n for n, tensor in recalibrated.state_dict().items() if not torch.equal(tensor, cut.state_dict()[n])]
    assert changed
    assert all(name.endswith(statistics) for name in changed)
    before = copy.deepcopy(dense.state_dict())
    assert not recalibrate_if_better(dense, data[:4], Calibration(dense, data[:4]).divergence)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


def test_failing_data_leaves_the_model_as_it_was():
    net = bp.to_variational(NETS[0].net())
    before = state(net)
    with pytest.raises(ValueError, match="data has no batch"):
        prune_channels(net, NETS[0].input(), target="macs=0.5", data=[])
    assert_same_state(before, state(net))


def test_ignored_layers_stay_whole():
    net, x = bp.to_variational(mlp(8, 30, 30, 4)), torch.randn(1, 8)
    report = prune_channels(net, x, target="macs=0.6", ignored_layers=[net[0]])
    assert net[0].out_features == 30 > net[2].out_features
    assert report.left_whole["0"] == "ignored_layers"


def test_layers_without_a_posterior_are_ranked_with_no_one():
    net, x = mlp(8, 30, 4), torch.randn(1, 8)
    deep = nn.Sequential(net, mlp(4, 20, 3))
    bp.to_variational(deep, filter_fn=lambda module, name: name.startswith("0"))
    report = prune_channels(deep, x, target="macs=0.7")
    assert report.left_whole["1.0"].startswith("nothing in its group has a score")
    assert deep[1][0].out_features == 20


class HeadsInPlainSight(nn.Module):
    """A reshape of fixed sizes that the graph does not see through."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 12), nn.Linear(12, 16), nn.Linear(16, 2)

    def forward(self, x):
        x = self.fc1(x).reshape(-1, 3, 4).flip(1).flip(1).reshape(-1, 12)
        return self.fc3(torch.relu(self.fc2(x)))


def test_what_does_not_run_without_its_channels_is_left_whole():
    net, x = bp.to_variational(HeadsInPlainSight()), torch.randn(2, 6)
    report = prune_channels(net, x, target="macs=0.6")
    assert net.fc1.out_features == 12 > 12 - 1
    assert "does not run without" in report.left_whole["fc1"]
    assert net.fc2.out_features < 16
    assert net(x).shape == (2, 2)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ({}, {}, "got no sizes"),
        ("macs=0.5,params=0.5", {}, "expected a text like"),
        ({"flops": 0.5}, {}, "flops"),
        ("macs=1", {}, "between 0 and 1"),
        ("params=0", {}, "between 0 and 1"),
        ("snr=0", {}, "positive number"),
        ("snr=1", {"uniform": True}, "takes no importance"),
        ("macs=0.5", {"round_to": 0}, "round_to is 0"),
        ("macs=0.5", {"granularity": ("heads", "layers")}, "granularity is"),
        ("macs=0.5", {"granularity": "heads"}, "in a tuple"),
        ("macs=0.5", {"granularity": ()}, "expected some of"),
    ],
)
def test_refuses_unknown_options(target, options, message):
    with pytest.raises(ValueError, match=message):
        prune_channels(bp.to_variational(mlp(4, 8, 2)), torch.randn(1, 4), target=target, **options)


def test_refuses_models_that_it_cannot_rank_or_cut():
    x = torch.randn(1, 4)
    with pytest.raises(UnsupportedModelError, match="no variational layer"):
        prune_channels(mlp(4, 8, 2), x, target="macs=0.5")
    compiled = bp.to_variational(mlp(4, 8, 2))
    compiled[0].compile()
    with pytest.raises(UnsupportedModelError, match="compiled model"):
        prune_channels(compiled, x, target="macs=0.5")
    with pytest.raises(UnsupportedModelError, match="wrapped in OptimizedModule"):
        prune_channels(torch.compile(bp.to_variational(mlp(4, 8, 2))), x, target="macs=0.5")
    with pytest.raises(UnsupportedModelError, match="wrapped in DataParallel"):
        prune_channels(nn.DataParallel(bp.to_variational(mlp(4, 8, 2))), x, target="macs=0.5")


def test_refuses_scores_that_cannot_be_ranked():
    net, x = mlp(4, 8, 2), torch.randn(1, 4)
    with pytest.raises(ValueError, match=r"shape \(3,\) for 0"):
        prune_channels(net, x, target="macs=0.5", importance=lambda group: torch.zeros(3))
    with pytest.raises(ValueError, match="NaN for channels of 0"):
        prune_channels(net, x, target="macs=0.5", importance=lambda group: torch.full((8,), torch.nan))


def test_a_wrong_dependency_graph_cuts_nothing():
    """torch-pruning knows nothing of the reversal."""

    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc1, self.fc2 = nn.Conv2d(3, 6, 1), nn.Linear(24, 20), nn.Linear(20, 2)

        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(torch.relu(self.conv(x)).flip(1).flatten(1))))

    net = bp.to_variational(Reversed())
    report = prune_channels(net, torch.randn(2, 3, 2, 2), target="macs=0.5")
    assert net.conv.out_channels == 6
    assert report.removed.keys() == {"fc1"}
    assert "the dependency graph is wrong about it" in report.left_whole["conv"]


def test_a_forward_that_does_more_after_the_cut_is_warned_of(caplog):
    class Boxes(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.box, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.head(sum(torch.relu(self.box(x)) for _ in range(1 if x.shape[1] == 8 else 5)))

    options = {"importance": MAGNITUDE, "ignored_layers": ["box"]}
    report = prune_channels(Boxes(), torch.randn(2, 4), target="macs=0.6", **options)
    assert "it does more than before" in caplog.text
    assert report.achieved["macs"] > 0.6


def test_report_prints():
    net, x = bp.to_variational(mlp(4, 8, 8, 2)), torch.randn(1, 4)
    text = str(prune_channels(net, x, target="macs=0.5"))
    assert "torch.utils.flop_counter" in text
    assert "left whole: 4: it is an output of the model" in text


def test_user_pruner_and_prune_channels_score_alike():
    net, x = bp.to_variational(mlp(8, 20, 4)), torch.randn(1, 8)
    other = copy.deepcopy(net)
    report = prune_channels(net, x, target="params=0.52", importance=SNRImportance())
    ratio = 1 - report.rows[0].kept / 20
    tp.pruner.BasePruner(other, x, SNRImportance(), pruning_ratio=ratio, ignored_layers=[other[2]]).step()
    assert torch.equal(net[0].weight, other[0].weight)


def test_no_warnings_reach_the_user():
    net = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, depth=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_channels(net, torch.randn(1, 3, 32, 32), target="macs=0.8", importance=MAGNITUDE)
    assert not any(isinstance(module, VariationalLayer) for module in net.modules())


def test_no_more_leaves_than_the_target_asks_for():
    """The last channel to leave may save far more than was missing; what it pays for stays."""

    class Interleaved(tp.importance.Importance):
        def __call__(self, group):
            return torch.arange(len(group[0].idxs)) / len(group[0].idxs)

    def macs(first: int, second: int) -> int:
        return 4 * first + first * second + 2 * second

    net = mlp(4, 40, 200, 2)
    for keep in (0.37, 0.41, 0.46, 0.5):
        report = prune_channels(net, torch.randn(1, 4), f"macs={keep}", importance=Interleaved(), dry_run=True)
        first, second = (row.kept for row in report.rows)
        assert macs(first, second) == report.macs_after <= keep * macs(40, 200)
        assert min(macs(first + 1, second), macs(first, second + 1)) > keep * macs(40, 200)


def test_an_error_before_the_cut_leaves_buffers_as_they_were():
    torch.manual_seed(4)
    model, x = bp.to_variational(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))), torch.randn(8, 4)
    before = state(model)

    def measure_and_fail(_: dict) -> None:
        recalibrate_batch_norm(model, [x])
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        prune_channels(model, x, "macs=0.7", before_cut=measure_and_fail)
    assert_same_state(state(model), before)


def test_a_last_batch_of_one_example_is_no_obstacle():
    torch.manual_seed(4)
    model, x = bp.to_variational(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))), torch.randn(65, 4)
    assert prune_channels(model, x[:4], "macs=0.7", data=x.split(32)).achieved["macs"] <= 0.7
