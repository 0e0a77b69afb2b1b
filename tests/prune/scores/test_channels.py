import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from bayesprune import to_variational
from bayesprune.layers import variational_layers
from bayesprune.prune.graph.find import find_groups
from bayesprune.prune.scores.channels import SNRImportance, weight_scores
from tests.prune.nets import nets


def variational(net: nn.Module, **options) -> nn.Module:
    """With stds that differ from weight to weight."""
    generator = torch.Generator().manual_seed(6)
    for _, layer in variational_layers(to_variational(net, **options)):
        for name in layer.active_names():
            for part in layer.log_std_parts(name):
                part.data += torch.randn(part.shape, generator=generator)
    return net


def group_of(net: nn.Module, layer: nn.Module, x: torch.Tensor, channels: list[int] | None = None):
    graph = tp.DependencyGraph().build_dependency(net, x, verbose=False)
    pruner = graph.get_pruner_of_module(layer)
    channels = list(range(pruner.get_out_channels(layer))) if channels is None else channels
    return graph.get_pruning_group(layer, pruner.prune_out_channels, channels)


@nets
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_score_is_the_sum_over_what_torch_pruning_removes(case, power):
    net = variational(case.net())
    worth = {}  # every weight has a value of its own, so a value says which weight it was
    for _, layer in variational_layers(net):
        worth.update(zip(layer.weight.flatten().tolist(), weight_scores(layer, power).flatten().tolist(), strict=True))
    for group in find_groups(net, case.input()).groups:
        scores = SNRImportance(power)(group.group)
        for unit in group.units[:3]:
            cut = copy.deepcopy(net)
            group_of(cut, cut.get_submodule(group.name), case.input(), list(unit)).prune()
            left = {value for _, layer in variational_layers(cut) for value in layer.weight.flatten().tolist()}
            removed = worth.keys() - left
            assert len(removed) == len(worth) - len(left) > 0
            expected = sum(worth[value] for value in removed)
            torch.testing.assert_close(float(scores[list(unit)].sum()), expected, rtol=1e-4, atol=0)


def test_score_of_a_weight_is_the_formula():
    layer = variational(nn.Linear(4, 3))
    mean, std = layer.weight.detach().double(), layer.log_std("weight").detach().double().exp()
    rms = mean.square().mean().sqrt()
    for power, scale in ((0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (1.5, 0.5), (2.0, 0.0)):
        expected = mean.square() / (rms.pow(scale) * std.pow(power))
        torch.testing.assert_close(weight_scores(layer, power), expected.float())


def test_mean_of_power_two_is_the_mean_squared_snr():
    net = variational(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    first, last = ((layer.weight / layer.log_std("weight").exp()).detach() for layer in (net[0], net[2]))
    expected = torch.cat([first, last.T], dim=1).square().mean(1)
    score = SNRImportance(2.0, reduction="mean")(group_of(net, net[0], torch.randn(1, 4)))
    torch.testing.assert_close(score, expected)


@pytest.mark.parametrize("std", ["per_weight", "rank_one", "per_channel"])
def test_scores_permute_with_the_channels(std):
    net = variational(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)), std=std)
    x, order = torch.randn(1, 3, 5, 5), torch.randperm(8)
    before = SNRImportance()(group_of(net, net[0], x))
    for name, parameter in net[0].named_parameters():
        parameter.data = parameter.data[order] if parameter.shape[0] > 1 else parameter.data
        assert name
    for name in ("weight", "weight_log_std", "weight_column_log_std"):
        parameter = net[3]._parameters.get(name)
        if parameter is not None and parameter.shape[1] > 1:
            parameter.data = parameter.data[:, order]
    torch.testing.assert_close(SNRImportance()(group_of(net, net[0], x)), before[order])
    assert not torch.equal(before, before[order])


def test_deterministic_layers_contribute_nothing():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(1, 4)
    assert SNRImportance()(group_of(net, net[0], x)) is None
    variational(net, filter_fn=lambda module, name: name == "2")
    expected = weight_scores(net[2], 1.0).sum(0)
    torch.testing.assert_close(SNRImportance()(group_of(net, net[0], x)), expected)


def test_length_is_that_of_the_root_behind_a_flatten():
    """torch-pruning's own reduction takes the length of the first scored layer, here 36 positions for 4 channels."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    variational(net, filter_fn=lambda module, name: name == "3")
    scores = SNRImportance()(group_of(net, net[0], torch.randn(1, 1, 5, 5)))
    torch.testing.assert_close(scores, weight_scores(net[3], 1.0).sum(0).reshape(4, 9).sum(1))


def test_scores_of_some_channels_are_those_of_all():
    net = variational(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    every = SNRImportance()(group_of(net, net[0], torch.randn(1, 4)))
    torch.testing.assert_close(SNRImportance()(group_of(net, net[0], torch.randn(1, 4), [5, 1])), every[[5, 1]])


def test_removed_weights_count_for_nothing():
    net = variational(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    keep = torch.ones(6, 4, dtype=torch.bool)
    keep[2], keep[3, 1:] = False, False
    net[0].set_mask("weight", keep)
    net[2].set_mask("weight", torch.tensor([True, True, False, False, True, True]).repeat(2, 1))
    group = group_of(net, net[0], torch.randn(1, 4))
    scores = SNRImportance()(group)
    assert scores[2] == 0
    assert scores.isfinite().all()
    mean = SNRImportance(reduction="mean")(group)
    torch.testing.assert_close(mean[3], weight_scores(net[0], 1.0)[3, 0])
    assert mean[2] == 0


def test_half_precision_scores_like_full():
    net = variational(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    full = SNRImportance()(group_of(net, net[0], torch.randn(1, 4)))
    half = SNRImportance()(group_of(net.bfloat16(), net[0], torch.randn(1, 4).bfloat16()))
    torch.testing.assert_close(half, full, rtol=0.05, atol=0)
    assert half.dtype == torch.float32


@pytest.mark.parametrize(("options", "message"), [({"power": -1}, "power is -1"), ({"reduction": "max"}, "'max'")])
def test_refuses_unknown_options(options, message):
    with pytest.raises(ValueError, match=message):
        SNRImportance(**options)
