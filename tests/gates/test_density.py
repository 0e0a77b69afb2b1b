"""Gates that are held to a target."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import bayesprune as bp
from bayesprune import gates
from bayesprune.foundation.target import Target
from bayesprune.gates.density import REACHED, hold, move
from bayesprune.gates.gate import GateOptions, WeightGate, named_gates

OPTIONS = GateOptions(0.01, 0.99, 0.5, 0.05)


def gate(logits, target, input_dim=-1):
    made = WeightGate(logits, OPTIONS, Target.parse(target, ("weights", "N:M"), "test"), input_dim)
    made.logits.data.copy_(logits)
    return made


def regression(target, num_steps=60):
    """A linear layer of which three inputs of twelve matter, its optimizer and its attachment."""
    torch.manual_seed(0)
    x = torch.randn(64, 12)
    y = x[:, [2, 5, 7]] @ torch.tensor([[1.0, -1.0], [2.0, 0.5], [-1.5, 1.0]])
    model = bp.to_variational(nn.Sequential(nn.Linear(12, 2)))
    gates.add_weight_gates(model, target, lr=0.1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    attachment = bp.attach(optimizer, model, num_data=64, num_steps=num_steps, temperature=0.01)
    return model, optimizer, attachment, x, y


def train(model, optimizer, x, y, num_steps):
    for _ in range(num_steps):
        optimizer.zero_grad()
        mse_loss(model.train()(x), y).backward()
        optimizer.step()
        yield int(sum(gate.is_open.sum() for _, gate in named_gates(model)))


def test_the_share_of_open_gates_falls_to_the_target_and_the_right_ones_stay():
    model, optimizer, _, x, y = regression("weights=0.25", num_steps=200)
    num_open = list(train(model, optimizer, x, y, 200))
    expected = [round(24 * 0.25 ** min(1, step / 200 / REACHED)) for step in range(1, 201)]
    assert num_open == expected
    gated = model.eval()(x)
    gates.close(model)
    torch.testing.assert_close(model(x), gated)
    kept = model[0].mask("weight")
    assert kept.sum() == 6
    assert kept[:, [2, 5, 7]].all()


def test_the_gates_rest_in_the_last_quarter():
    model, optimizer, attachment, x, y = regression("weights=0.25", num_steps=40)
    for _ in train(model, optimizer, x, y, 30):
        pass
    decided, weights = model[0].weight_gate.logits.detach().clone(), model[0].weight.detach().clone()
    for _ in train(model, optimizer, x, y, 10):
        pass
    assert torch.equal(model[0].weight_gate.logits, decided)
    assert not torch.equal(model[0].weight, weights)
    assert attachment.step == 40


@pytest.mark.parametrize("layer", [nn.Linear(8, 3), nn.Conv2d(8, 3, 2), nn.Conv2d(8, 4, 1, groups=2)], ids=repr)
def test_a_pattern_holds_in_every_block(layer):
    torch.manual_seed(1)
    model = bp.to_variational(nn.Sequential(layer))
    gates.add_weight_gates(model, "2:4")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    bp.attach(optimizer, model, num_data=8, num_steps=10)
    x = torch.randn(4, 8) if isinstance(layer, nn.Linear) else torch.randn(4, 8, 3, 3)
    for step in range(10):
        num_open = model[0].weight_gate.is_open.movedim(1, -1).reshape(-1, 4).sum(1)
        assert (num_open == (4 if step < 1 else 2)).all()
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()
    gates.close(model)
    blocks = model[0].mask("weight").movedim(1, -1).reshape(-1, 4)
    assert (blocks.sum(1) == 2).all()


def test_a_tensor_without_whole_blocks_has_no_gates():
    model = bp.to_variational(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
    gates.add_weight_gates(model, "2:4")
    assert [name for name, _ in named_gates(model)] == ["2.weight"]
    with pytest.raises(ValueError, match='no tensor of the model can have the pattern "2:5"'):
        gates.add_weight_gates(bp.to_variational(nn.Linear(6, 8)), "2:5")


def test_the_multiplier_is_exact_where_logits_are_equal():
    equal = gate(torch.full((3, 8), 4.6), "weights=0.25")
    hold([equal], 1.0)
    assert equal.is_open.sum() == 6
    blocks = gate(torch.full((4, 4), -3.0), "2:4", input_dim=0)
    hold([blocks], 1.0)
    assert (blocks.is_open.sum(0) == 2).all()


def test_a_share_is_held_over_all_tensors_together():
    torch.manual_seed(2)
    large, small = gate(torch.randn(4, 10) + 3, "weights=0.2"), gate(torch.randn(2, 5) - 3, "weights=0.2")
    before = torch.cat([large.logits.flatten(), small.logits.flatten()]).detach().clone()
    hold([large, small], 1.0)
    after = torch.cat([large.logits.flatten(), small.logits.flatten()]).detach()
    assert (after > 0).sum() == 10
    assert set((after > 0).nonzero().flatten().tolist()) == set(before.topk(10).indices.tolist())


def test_a_held_gate_decides_in_training_as_in_evaluation_and_has_the_gradient_of_the_relaxation():
    held = gate(torch.tensor([[-2.0, -0.1, 0.3, 4.0]]), "weights=0.5")
    held.train()
    drawn = held.draw()
    assert drawn.detach().tolist() == [[0.0, 0.0, 1.0, 1.0]] == held.eval().draw().tolist()
    drawn.sum().backward()
    soft = (held.logits.detach() / OPTIONS.temperature).sigmoid()
    torch.testing.assert_close(held.logits.grad, soft * (1 - soft) / OPTIONS.temperature)


def test_logits_move_by_what_is_at_stake():
    """One size of gradients for all gates: the logits of a quiet layer move less than those of a loud one."""
    quiet, loud = gate(torch.zeros(2, 4), "weights=0.5"), gate(torch.zeros(1, 4), "weights=0.5")
    gates_, mean_square, small, large = [quiet, loud], torch.zeros(()), torch.full((2, 4), 0.1), torch.full((1, 4), 2.0)
    mean = (8 * 0.01 + 4 * 4.0) / 12

    def step(weight, factor=1.0, found_inf=None):
        quiet.logits.grad, loud.logits.grad = factor * small, factor * large
        move(gates_, mean_square, weight, found_inf)

    step(0.5)
    torch.testing.assert_close(mean_square, torch.tensor(mean))
    torch.testing.assert_close(quiet.logits.detach(), -OPTIONS.lr * small / mean**0.5)
    torch.testing.assert_close(loud.logits.detach(), -OPTIONS.lr * large / mean**0.5)
    before = loud.logits.detach().clone()
    step(0.5, math.inf, torch.ones(()))
    assert torch.equal(loud.logits, before)
    torch.testing.assert_close(mean_square, torch.tensor(mean))
    step(0.25, 2.0, torch.zeros(()))
    torch.testing.assert_close(mean_square, torch.tensor(0.75 * mean + 0.25 * 4 * mean))
    torch.testing.assert_close(loud.logits.detach(), before - OPTIONS.lr * 2 * large / (1.75 * mean) ** 0.5)


def test_logits_stay_where_no_gradient_says_anything():
    silent, absent = gate(torch.ones(2, 2), "weights=0.5"), gate(torch.ones(2, 2), "weights=0.5")
    silent.logits.grad = torch.zeros(2, 2)
    move([silent, absent], torch.zeros(()), 1.0)
    move([absent], torch.zeros(()), 1.0)
    assert (silent.logits == 1).all()
    assert (absent.logits == 1).all()


def test_attach_needs_the_length_of_the_training():
    model = gates.add_weight_gates(bp.to_variational(nn.Linear(4, 4)), "weights=0.5")
    with pytest.raises(ValueError, match='held to "weights=0.5" by shares of the training.*pass num_steps'):
        bp.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, num_data=4)
    for wrong, complaint in (
        ("weights=1", "between 0 and 1"),
        ("macs=0.5", "expected a text like"),
        ("4:2", "0 < N < M"),
    ):
        with pytest.raises(ValueError, match=complaint):
            gates.add_weight_gates(bp.to_variational(nn.Linear(4, 4)), wrong)


def test_gates_alone_can_be_learned():
    """The weights train at their means, without a word about stds that nothing draws with."""
    torch.manual_seed(5)
    model = bp.to_variational(nn.Linear(8, 3), estimator="mean")
    gates.add_weight_gates(model, "weights=0.25")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    bp.attach(optimizer, model, num_data=16, num_steps=5, temperature=0.0)
    stds = model.weight_log_std.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            optimizer.zero_grad()
            first, again = (model.train()(torch.eye(8)) for _ in range(2))
            assert torch.equal(first, again)
            first.square().mean().backward()
            optimizer.step()
    assert torch.equal(model.weight_log_std, stds)
    assert model.weight_gate.is_open.sum() == 6


def test_weights_behind_closed_gates_have_no_kl():
    model, optimizer, attachment, x, y = regression("weights=0.25")
    for _ in train(model, optimizer, x, y, 60):
        pass
    keep = model[0].weight_gate.is_open
    plain = bp.to_variational(nn.Linear(12, 2))
    plain.load_state_dict({name: value for name, value in model[0].state_dict().items() if "gate" not in name})
    plain.set_mask("weight", keep)
    ours = attachment.kl_divergence()
    priors = {posterior.parameter: prior for posterior, prior in attachment._bound.items()}
    expected = sum(
        priors[name].kl(getattr(plain, name), getattr(plain, f"{name}_log_std"), plain.mask(name)) for name in priors
    )
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("target", ["weights=0.25", "1:4", "2:12"])
def test_a_resumed_run_holds_the_gates_as_an_uninterrupted_one(target):
    model, optimizer, attachment, x, y = regression(target)
    torch.manual_seed(3)
    list(train(model, optimizer, x, y, 20))
    resumed, other_optimizer, other, _, _ = regression(target)
    resumed.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(copy.deepcopy(attachment.state_dict()))
    for one, its in ((model, optimizer), (resumed, other_optimizer)):
        torch.manual_seed(4)
        list(train(one, its, x, y, 20))
    for (name, parameter), again in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, again), name
