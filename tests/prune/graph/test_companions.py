import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch_pruning.pruner.function import BasePruningFunc
from torch_pruning.utils.op_counter import MODULES_MAPPING

import bayesprune as bp
from bayesprune import to_variational
from bayesprune.gates import InclusionImportance
from bayesprune.layers import VariationalLayer, variational_layers
from bayesprune.prune.graph import companions as follow
from bayesprune.prune.scores import EvidenceImportance, SNRImportance, UnitSNRImportance
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
    follow.follow_stds()
    net = to_variational(case.net())
    tie_means_to_stds(net)
    before = sum(parameter.numel() for parameter in net.parameters())
    prune_with_torch_pruning(net, case.input(), tp.importance.MagnitudeImportance())
    assert sum(parameter.numel() for parameter in net.parameters()) < before
    assert_stds_follow(net)


def test_stds_follow_pruning_functions_called_by_hand():
    follow.follow_stds()
    layer = to_variational(nn.Linear(5, 4))
    tie_means_to_stds(layer)
    tp.prune_linear_out_channels(layer, [0, 2])
    tp.prune_linear_in_channels(layer, [4])
    assert layer.weight.shape == layer.weight_log_std.shape == layer.weight_mask.shape == (2, 4)
    assert_stds_follow(layer)


def test_cut_parameters_stay_frozen():
    follow.follow_stds()
    layer = nn.Linear(5, 4)
    layer.weight.requires_grad_(False)
    tp.prune_linear_out_channels(layer, [0])
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad


def test_torch_pruning_counts_variational_layers():
    follow.follow_stds()
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)), torch.randn(1, 3, 5, 5)
    macs, _ = tp.utils.count_ops_and_params(net, x)
    assert macs > 0
    assert tp.utils.count_ops_and_params(to_variational(net), x)[0] == macs


def test_following_twice_wraps_once():
    assert follow.follow_stds()
    once = BasePruningFunc._prune_parameter_and_grad
    assert follow.follow_stds()
    assert BasePruningFunc._prune_parameter_and_grad is once


@pytest.fixture
def stock(monkeypatch):
    """torch-pruning as it comes; yields what tells whether it still is."""
    function = BasePruningFunc._prune_parameter_and_grad
    function = getattr(function, "__wrapped__", function)
    counted = {kind: count for kind, count in MODULES_MAPPING.items() if not issubclass(kind, VariationalLayer)}
    monkeypatch.setattr(BasePruningFunc, "_prune_parameter_and_grad", function)
    monkeypatch.setattr("torch_pruning.utils.op_counter.MODULES_MAPPING", dict(counted))
    return lambda: (
        BasePruningFunc._prune_parameter_and_grad is function
        and tp.utils.op_counter.MODULES_MAPPING.keys() == counted.keys()
    )


def criteria(net: nn.Module, x: torch.Tensor) -> list:
    loss = lambda model: float(model(x).square().mean())  # noqa: E731
    return [
        SNRImportance(),
        EvidenceImportance(),
        InclusionImportance(),
        UnitSNRImportance(net, bp.laplace.fit_kronecker(net, [x])),
        bp.prune.MeasuredImportance(net, x, loss),
    ]


def test_making_a_criterion_and_cutting_channels_leave_torch_pruning_as_it_is(stock):
    net, x = to_variational(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))), torch.randn(9, 4)
    tie_means_to_stds(net)
    made = criteria(net, x)
    assert stock()
    for importance in made:
        if not isinstance(importance, InclusionImportance):  # the model has no gates
            assert bp.prune_channels(net, x, "macs=0.5", importance=importance, dry_run=True).removed
    bp.prune_channels(net, x, "macs=0.5")
    assert net[0].weight.shape == net[0].weight_mask.shape != (8, 4)
    assert_stds_follow(net)
    assert stock()


@pytest.mark.parametrize("number", range(5))
def test_stds_follow_from_the_first_score_that_a_pruner_asks_for(stock, number):
    net, x = to_variational(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))), torch.randn(9, 4)
    tie_means_to_stds(net)
    importance = criteria(net, x)[number]
    assert stock()
    prune_with_torch_pruning(net, x, importance)
    assert not stock()
    assert (net[0].out_features < 8) is not isinstance(importance, InclusionImportance)  # it has no gates
    assert_stds_follow(net)


def another_signature(self, weight, keep_idxs):
    raise NotImplementedError


def another_result(self, weight, keep_idxs, pruning_dim):
    return nn.Parameter(weight.data.index_select(pruning_dim, torch.as_tensor(keep_idxs).flip(0)))


@pytest.mark.parametrize("function", [another_signature, another_result])
def test_warns_where_torch_pruning_is_not_as_expected(monkeypatch, function):
    monkeypatch.setattr(BasePruningFunc, "_prune_parameter_and_grad", function)
    with pytest.warns(UserWarning, match="do not follow their means"):
        assert not follow.follow_stds()
    assert BasePruningFunc._prune_parameter_and_grad is function


def test_warns_where_the_function_is_gone(monkeypatch):
    monkeypatch.delattr(BasePruningFunc, "_prune_parameter_and_grad")
    with pytest.warns(UserWarning, match="has no _prune_parameter_and_grad"):
        assert not follow.follow_stds()


def test_the_self_test_does_not_look_at_what_memory_holds(monkeypatch):
    def filled_with_nan(kind, *args):
        layer = kind(*args)
        for parameter in layer.parameters():
            nn.init.constant_(parameter, float("nan"))
        return layer

    monkeypatch.setattr(follow, "skip_init", filled_with_nan)
    monkeypatch.setattr(follow, "_PROBLEMS", {})
    with follow.following() as does_follow:
        assert does_follow
