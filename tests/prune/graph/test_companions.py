import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch_pruning.pruner.function import BasePruningFunc

from bayesprune import to_variational
from bayesprune.layers import variational_layers
from bayesprune.prune.graph import companions as follow
from bayesprune.prune.scores.channels import SNRImportance
from tests.cases import structures
from tests.prune.nets import assert_stds_follow, nets, tie_means_to_stds


def prune_with_torch_pruning(net: nn.Module, x: torch.Tensor, importance) -> None:
    output = list(net.children())[-1]
    pruner = tp.pruner.BasePruner(
        net,
        x,
        importance,
        pruning_ratio=0.4,
        ignored_layers=[output],
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()


@nets
@structures
def test_stds_follow_through_a_pruner_of_ones_own(case, std):
    net = to_variational(case.net(), std=std)
    tie_means_to_stds(net)
    before = sum(parameter.numel() for parameter in net.parameters())
    prune_with_torch_pruning(net, case.input(), SNRImportance())
    assert sum(parameter.numel() for parameter in net.parameters()) < before
    assert_stds_follow(net)
    net.train()
    net(case.input()).sum().backward()
    stds = [part for _, layer in variational_layers(net) for part in layer.log_std_parts("weight")]
    assert all(part.grad is not None for part in stds)


@nets
def test_stds_follow_a_criterion_of_torch_pruning(case):
    """Its criteria compare pruning functions by identity, so nothing must stand in for those functions."""
    follow.install()
    net = to_variational(case.net())
    tie_means_to_stds(net)
    before = sum(parameter.numel() for parameter in net.parameters())
    prune_with_torch_pruning(net, case.input(), tp.importance.MagnitudeImportance())
    assert sum(parameter.numel() for parameter in net.parameters()) < before
    assert_stds_follow(net)


def test_stds_follow_pruning_functions_called_by_hand():
    follow.install()
    layer = to_variational(nn.Linear(5, 4))
    tie_means_to_stds(layer)
    tp.prune_linear_out_channels(layer, [0, 2])
    tp.prune_linear_in_channels(layer, [4])
    assert layer.weight.shape == layer.weight_log_std.shape == layer.weight_mask.shape == (2, 4)
    assert_stds_follow(layer)


def test_cut_parameters_stay_frozen():
    follow.install()
    layer = nn.Linear(5, 4)
    layer.weight.requires_grad_(False)
    tp.prune_linear_out_channels(layer, [0])
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad


def test_torch_pruning_counts_variational_layers():
    follow.install()
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)), torch.randn(1, 3, 5, 5)
    macs, _ = tp.utils.count_ops_and_params(net, x)
    assert macs > 0
    assert tp.utils.count_ops_and_params(to_variational(net), x)[0] == macs


def test_installing_twice_wraps_once():
    assert follow.install()
    once = BasePruningFunc._prune_parameter_and_grad
    assert follow.install()
    SNRImportance()
    assert BasePruningFunc._prune_parameter_and_grad is once


def another_signature(self, weight, keep_idxs):
    raise NotImplementedError


def another_result(self, weight, keep_idxs, pruning_dim):
    return nn.Parameter(weight.data.index_select(pruning_dim, torch.as_tensor(keep_idxs).flip(0)))


@pytest.mark.parametrize("function", [another_signature, another_result])
def test_warns_where_torch_pruning_is_not_as_expected(monkeypatch, function):
    monkeypatch.setattr(BasePruningFunc, "_prune_parameter_and_grad", function)
    with pytest.warns(UserWarning, match="do not follow their means"):
        assert not follow.install()
    assert BasePruningFunc._prune_parameter_and_grad is function


def test_warns_where_the_function_is_gone(monkeypatch):
    monkeypatch.delattr(BasePruningFunc, "_prune_parameter_and_grad")
    with pytest.warns(UserWarning, match="has no _prune_parameter_and_grad"):
        assert not follow.install()
