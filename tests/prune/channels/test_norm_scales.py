"""Norms with a posterior over their scale leave with their channels: scores, cuts, and scales that groups share."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch_pruning as tp
from torch import nn

import bayesprune as bp
from bayesprune.layers import variational_layers
from bayesprune.prune import dependency_groups
from bayesprune.prune.graph.companions import TAG
from bayesprune.prune.graph.find import find_groups
from bayesprune.prune.scores.channels import SNRImportance, weight_scores
from bayesprune.train.kl import bind_prior
from tests.prune.nets import NETS, NetCase, assert_stds_follow, tie_means_to_stds

CASES = [
    *(case for case in NETS if case.name != "linear"),
    NetCase(
        "layer_and_group_norm",
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
        ),
        (2, 3, 8, 8),
        {},
    ),
]
nets = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def variational(case: NetCase) -> nn.Module:
    return bp.to_variational(case.net(), norm_scales=True)


def num_norms(model: nn.Module) -> int:
    return sum(layer.is_norm for _, layer in variational_layers(model))


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )


def train(model: nn.Module, x: torch.Tensor, prior: bp.priors.Prior | None = None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attachment = bp.attach(optimizer, model, num_data=100, prior=prior)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
    attachment.detach()


@nets
def test_the_score_has_gamma_in_it(case):
    """It is the sum over what torch-pruning removes, as every weight has a value of its own."""
    net, x = variational(case).double(), case.input().double()  # float32 has the same number twice
    worth = {}
    for _, layer in variational_layers(net):
        nn.init.normal_(layer.weight)
        worth.update(zip(layer.weight.flatten().tolist(), weight_scores(layer, 1.0).flatten().tolist(), strict=True))
    for group in find_groups(net, x).groups:
        scores = SNRImportance()(group.group)
        cut = copy.deepcopy(net)
        graph = tp.DependencyGraph().build_dependency(cut, x, verbose=False)
        layer, unit = cut.get_submodule(group.name), group.units[1]
        graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, list(unit)).prune()
        left = {value for _, layer in variational_layers(cut) for value in layer.weight.flatten().tolist()}
        expected = sum(worth[value] for value in worth.keys() - left)
        torch.testing.assert_close(float(scores[list(unit)].sum()), expected, rtol=1e-4, atol=0)


@nets
def test_prune_channels_cuts_gammas_stds(case):
    net = variational(case)
    assert num_norms(net) > 0
    tie_means_to_stds(net)
    sizes = {name: len(layer.weight) for name, layer in variational_layers(net) if layer.is_norm}
    bp.prune_channels(net, case.input(), target={"params": 0.5})
    assert_stds_follow(net)
    assert any(len(net.get_submodule(name).weight) < size for name, size in sizes.items())
    train(net, case.input())
    assert not any(hasattr(parameter, TAG) for parameter in net.parameters())
    assert not any("log_std" in name for name in bp.to_deterministic(net).state_dict())


@nets
def test_a_pruner_of_ones_own_cuts_gammas_stds(case):
    net = variational(case)
    tie_means_to_stds(net)
    last = [layer for layer in net if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
    importance = SNRImportance()
    tp.pruner.BasePruner(net, case.input(), importance, pruning_ratio=0.5, ignored_layers=[last]).step()
    assert_stds_follow(net)
    train(net, case.input())


def test_operations_are_counted_as_before():
    x = torch.randn(1, 1, 6, 6)
    stock = tp.utils.count_ops_and_params(small_net(), x)[0]
    SNRImportance()
    assert tp.utils.count_ops_and_params(bp.to_variational(small_net(), norm_scales=True), x)[0] == stock


def test_the_groups_are_those_of_the_stock_net():
    x = torch.randn(1, 1, 6, 6)
    groups = dependency_groups(bp.to_variational(small_net(), norm_scales=True), x)
    assert groups == dependency_groups(small_net(), x)
    assert "1.weight" in {member.parameter for member in groups[0].members}


def test_the_scale_of_a_group_is_the_best_for_gamma_too():
    """z^2 = mean of e / s_layer^2 over the filter, gamma, and the column that reads the channel."""
    model = bp.to_variational(small_net().double(), norm_scales=True)
    nn.init.normal_(model[1].weight)
    prior = bp.priors.ARD(dependency_groups(model, torch.randn(1, 1, 6, 6, dtype=torch.float64)))
    bound = {posterior.name: (posterior, its) for posterior, its in bind_prior(model, prior).items()}
    total, count = torch.zeros(4, dtype=torch.float64), 0
    for name, channels_first in (("0.weight", True), ("1.weight", True), ("5.weight", False)):
        posterior, _ = bound[name]
        mean = posterior.mean.detach()
        e = (mean.square() + (2 * posterior.log_std.detach()).exp()) / mean.square().mean()
        rows = (e if channels_first else e.T).reshape(4, -1)
        total, count = total + rows.sum(1), count + rows.shape[1]
    posterior, its = bound["1.weight"]
    found = its.variance(posterior.mean, posterior.log_std) / posterior.mean.square().mean()
    torch.testing.assert_close(found.detach().double(), total / count, rtol=1e-6, atol=0)
    assert count == 9 + 1 + 2
    train(model, torch.randn(2, 1, 6, 6, dtype=torch.float64), prior)


def test_every_gamma_has_the_prior_of_its_group():
    case = CASES[-1]
    net = variational(case)
    for prior in (bp.priors.ARD, bp.priors.Horseshoe):
        bound = bind_prior(net, prior(dependency_groups(net, case.input())))
        kinds = {posterior.name: type(its).__name__ for posterior, its in bound.items()}
        assert {kinds[f"{norm}.weight"] for norm in (1, 4, 9)} == {"BoundDependency"}


def test_other_importances():
    case = CASES[0]
    net = variational(case)
    (group, *_) = find_groups(net, case.input()).groups
    with_gamma = bp.prune.EvidenceImportance()(group.group)
    without = bp.prune.EvidenceImportance()(find_groups(bp.to_variational(case.net()), case.input()).groups[0].group)
    torch.testing.assert_close(with_gamma - without, -bp.evidence(net)["1.weight"], rtol=1e-3, atol=1e-3)
    bp.gates.add_channel_gates(net, case.input(), initial_inclusion=0.6)
    assert bp.kl_divergence(net).isfinite()
    bp.prune_channels(net, case.input(), target={"inclusion": 0.5})
    bp.gates.close(net)


def test_channels_go_without_the_hook_into_torch_pruning(monkeypatch):
    monkeypatch.setattr("bayesprune.prune.graph.removal.following", lambda: nullcontext(False))
    case = CASES[-1]
    net = variational(case)
    tie_means_to_stds(net)
    bp.prune_channels(net, case.input(), target={"params": 0.6})
    assert_stds_follow(net)
