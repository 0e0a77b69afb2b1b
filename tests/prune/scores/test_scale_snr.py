"""The squared SNR of a factor on what is read of a unit: the cost of what leaves when nothing makes up for it."""

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

import bayesprune as bp
from bayesprune.prune import ScaleSNRImportance
from bayesprune.prune.graph.find import find_groups
from bayesprune.prune.graph.removal import snapshot
from bayesprune.prune.graph.trials import silence
from bayesprune.prune.scores.channels import unit_scores
from tests.mixtures import ARRANGEMENTS, EXPERTS, HIDDEN


def changes_of_logits(model: nn.Module, x: torch.Tensor, name: str, units: list[tuple[int, ...]]) -> list[float]:
    """Half the mean squared change of the logits when each of these units of a group reads as zero."""
    (group,) = (group for group in find_groups(model, x[:1]).groups if group.name == name)
    found = []
    with torch.no_grad():
        logits = model(x)
        for unit in units:
            undo = snapshot(model)
            silence(model, group, [unit])
            found.append(0.5 * float((model(x) - logits).square().sum(1).mean()))
            undo()
    return found


@pytest.mark.parametrize("has_posteriors", [False, True], ids=["stock", "variational"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_score_is_what_silence_changes_of_logits_that_read_the_units(groups, has_posteriors):
    """They are linear in what is read, so that the second order is all; signs are drawn, so nearly."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 2), nn.Tanh(), nn.Conv2d(12, 6, 2, groups=groups), nn.Flatten()).eval()
    if has_posteriors:
        bp.to_variational(net)
    x = torch.randn(512, 3, 3, 3) * torch.rand(512, 1, 1, 1).exp()
    (group,) = find_groups(net, x[:1]).groups
    importance = ScaleSNRImportance(net, x.split(2))
    scored = unit_scores(importance, group)
    assert scored is not None
    expected = changes_of_logits(net, x, group.name, group.units)
    assert scored.scores == pytest.approx(expected, rel=0.4)
    (of_copy,) = find_groups(copy.deepcopy(net), x[:1]).groups
    assert unit_scores(importance, of_copy).scores == scored.scores
    assert sum(scored.scores) == pytest.approx(sum(expected), rel=0.1)


@pytest.mark.parametrize("has_posteriors", [False, True], ids=["stock", "variational"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=str)
def test_units_of_experts_cost_the_sum_of_their_channels(arrangement, has_posteriors):
    torch.manual_seed(0)
    model = arrangement.build()
    if has_posteriors:
        bp.to_variational(model).eval()
    x = torch.randn(256, 4)
    (group,) = (group for group in find_groups(model, x[:1], granularity=("mlp",)).groups if group.num_experts)
    scored = unit_scores(ScaleSNRImportance(model, x.split(1)), group)
    assert scored is not None
    each = changes_of_logits(model, x, group.name, [(channel,) for channel in range(EXPERTS * HIDDEN)])
    expected = [sum(each[channel] for channel in unit) for unit in scored.group.units]
    assert scored.scores == pytest.approx(expected, rel=0.5)
    assert sum(scored.scores) == pytest.approx(sum(expected), rel=0.15)


def test_a_pruner_of_torch_pruning_removes_what_the_data_never_switch_on():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5))
    net[0].weight.data[3] *= 3
    net[0].bias.data[3] = -100
    left = torch.cat([net[0].bias.data[:3], net[0].bias.data[4:]])
    importance = ScaleSNRImportance(net, [torch.randn(64, 8)])
    tp.pruner.BasePruner(net, torch.randn(1, 8), importance, pruning_ratio=1 / 12, ignored_layers=[net[2]]).step()
    torch.testing.assert_close(net[0].bias.data, left)


def test_the_model_and_the_random_state_stay_as_they_are():
    net = bp.to_variational(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))).train()
    before, x, state = copy.deepcopy(net.state_dict()), torch.randn(8, 4), torch.get_rng_state()
    ScaleSNRImportance(net, [x])
    assert net.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_group_with_a_frozen_layer_has_no_score():
    net = bp.to_variational(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    (group,) = find_groups(net, torch.randn(1, 4)).groups
    net[0].requires_grad_(False)
    importance = ScaleSNRImportance(net, [torch.randn(8, 4)])
    assert importance.of_group(group) is None
    assert importance(group.group) is None


def test_a_model_that_was_cut_since_and_data_without_a_batch_are_refused():
    x = torch.randn(8, 4)
    net = bp.to_variational(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    importance = ScaleSNRImportance(net, [x])
    bp.prune_channels(net, x, "macs=0.5", importance=importance)
    with pytest.raises(ValueError, match=r"has a weight of \(3, 4\), and had one of \(3, 8\): the model was cut since"):
        bp.prune_channels(net, x, "macs=0.5", importance=importance)
    with pytest.raises(ValueError, match="data has no batch"):
        ScaleSNRImportance(net, [])
