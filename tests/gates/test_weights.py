"""A gate for every weight."""

import copy

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune import gates
from bayesprune.gates import inclusion
from bayesprune.gates.gate import named_gates
from tests.cases import Tied, structures
from tests.gates.gated_nets import spread


def nets():
    torch.manual_seed(2)
    conv = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    return {"conv": (conv, torch.randn(3, 2, 4, 4)), "attention": (attention, torch.randn(2, 3, 8))}


def output(model, x):
    with torch.no_grad():
        return model.eval()(x)


@structures
@pytest.mark.parametrize("name", ["conv", "attention"])
def test_closed_gates_are_removed_weights(name, std):
    net, x = nets()[name]
    model = bp.to_variational(net.double(), std=std).double()
    x = x.double()
    before = output(model, x)
    gates.add_weight_gates(model)
    torch.testing.assert_close(output(model, x), before, rtol=0, atol=1e-14 if name == "attention" else 0)
    spread(model)
    gated, probabilities = output(model, x), gates.inclusion_probabilities(model)
    assert not torch.allclose(gated, before)
    assert probabilities.keys() == {n for n, p in model.named_parameters() if p.dim() > 1 and "log" not in n}
    gates.close(model)
    torch.testing.assert_close(output(model, x), gated, rtol=0, atol=1e-12)
    assert not list(named_gates(model))
    for parameter, probability in probabilities.items():
        layer, _, key = parameter.rpartition(".")
        assert torch.equal(model.get_submodule(layer).mask(key), probability > 0.5)
    bp.to_deterministic(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in net.modules()]


def test_a_training_forward_is_gate_times_draw():
    layer = bp.to_variational(nn.Linear(3, 2).double(), estimator="weight_sampling").double()
    gates.add_weight_gates(layer)
    spread(layer)
    layer.train()
    torch.manual_seed(4)
    found = layer(torch.eye(3, dtype=torch.float64)) - layer.bias
    torch.manual_seed(4)
    open_gates = layer.weight_gate.draw()
    drawn = layer.weight + layer.weight_log_std.exp() * torch.randn(2, 3, dtype=torch.float64)
    bias = layer.bias_log_std.exp() * torch.randn(2, dtype=torch.float64)
    torch.testing.assert_close(found, (open_gates * drawn).T + bias)
    assert set(open_gates.unique().tolist()) == {0.0, 1.0}


def test_sparsity_by_inclusion_and_copies():
    net, x = nets()["conv"]
    model = gates.add_weight_gates(bp.to_variational(net))
    spread(model)
    copied = copy.deepcopy(model)
    copied[0].weight_gate.logits.data.fill_(-1.0)
    assert not torch.equal(output(model, x), output(copied, x))
    bp.prune_weights(model, "weights=0.5", score=inclusion)
    probabilities, mask = model[0].weight_gate.probabilities, model[0].weight_mask
    assert probabilities[mask].min() >= probabilities[~mask].max()


@pytest.mark.parametrize("score", [inclusion, bp.prune.scores.magnitude])
def test_the_report_of_a_removal_says_what_else_closed_gates_take(score):
    model = gates.add_weight_gates(bp.to_variational(nets()["conv"][0])).train()
    spread(model)
    report = bp.prune_weights(model, "weights=0.8", score=score)
    is_open = {name: gate.is_open for name, gate in named_gates(model)}
    closed = {n: int((~gate & model.get_submodule(n[:1]).mask("weight")).sum()) for n, gate in is_open.items()}
    assert min(closed.values()) > 0
    for row in report.rows:
        assert row.note == f"{closed[row.name]} of the kept are behind closed gates: gates.close removes them"
    assert model[0].training
    gates.close(model)
    for row in bp.prune_weights(model, "weights=1").rows:
        before = next(its for its in report.rows if its.name == row.name)
        assert (row.kept, row.note) == (before.kept - closed[row.name], "")


def test_tied_weights_have_one_gate():
    model = bp.to_variational(Tied(nn.Linear(3, 3), nn.Linear(3, 3)))
    gates.add_weight_gates(model)
    assert model.first.weight_gate is model.second.weight_gate
    spread(model)
    gated = output(model, torch.eye(3))
    gates.close(model)
    torch.testing.assert_close(output(model, torch.eye(3)), gated)


def test_channels_can_go_from_a_net_with_both_kinds():
    torch.manual_seed(6)
    model, x = bp.to_variational(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))), torch.randn(5, 4)
    gates.add_weight_gates(model)
    gates.add_channel_gates(model, x)
    spread(model)
    gated = output(model, x)
    bp.prune_channels(model, x, target="inclusion=0.5")
    torch.testing.assert_close(output(model, x), gated)
    assert model[2].weight_mask.shape == model[2].weight.shape == (2, model[0].out_features)


def test_nothing_is_fitted_to_weights_that_gates_decide_on():
    torch.manual_seed(8)
    model = bp.to_variational(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    gates.add_weight_gates(model)
    spread(model)
    data, before = [torch.randn(64, 8)], copy.deepcopy(model)
    report = bp.prune_one_shot(model, data, "weights=0.5")
    assert {row.note.partition(";")[0] for row in report.rows} == {
        "gates decide on its weights: call gates.close first"
    }
    bp.laplace.compensate(model, data, {"2": [0, 1]})
    assert not model[2].weight[:, :2].any()
    assert torch.equal(model[2].weight[:, 2:], before[2].weight[:, 2:])
    assert torch.equal(model[4].weight, before[4].weight)


def test_refuses():
    with pytest.raises(ValueError, match="without variational layers"):
        gates.add_weight_gates(nn.Linear(2, 2))
    layer = gates.add_weight_gates(bp.to_variational(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="already"):
        gates.add_weight_gates(layer)


def test_only_layers_with_gates_have_a_hook_and_closing_takes_it_away():
    model = bp.to_variational(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    plain = bp.to_variational(nn.Linear(3, 2))
    gates.add_weight_gates(model)
    copied = copy.deepcopy(model)
    assert all(layer.changes_weights() for layer in (model[0], copied[2]))
    assert not plain.eval().changes_weights()
    assert not any("posterior_hook" in vars(module) for module in gates.close(model).modules())


@pytest.mark.parametrize("target", [None, "weights=0.5", "2:4"])
def test_what_is_frozen_has_no_gates(target):
    model = bp.to_variational(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    model[0].requires_grad_(False)
    gates.add_weight_gates(model, target)
    assert [name for name, _ in named_gates(model)] == ["2.weight"]
    with pytest.raises(ValueError, match="frozen weights are not removed"):
        gates.add_weight_gates(gates.close(model).requires_grad_(False), target)
