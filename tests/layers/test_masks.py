"""Removed weights stay zero, whatever trains the layer."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.layers import masks

OPTIMIZERS = {
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam_foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def net() -> nn.Module:
    return bp.to_variational(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    def closure():
        optimizer.zero_grad()
        loss = (model(torch.randn(5, 6)) - 1).square().mean()
        loss.backward()
        return loss

    for _ in range(count):
        optimizer.step(closure)


def assert_zeros_stay(model: nn.Module, sparsity: float = 0.5) -> None:
    for layer in (model[0], model[2]):
        mask = layer.weight_mask
        assert layer.weight[~mask].abs().max() == 0
        assert (layer.weight[mask] != 0).all()
    removed = sum(int((~layer.weight_mask).sum()) for layer in (model[0], model[2]))
    assert removed == round(sparsity * 72)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zeros_with_momentum_from_before(name):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer)
    bp.prune_weights(model, sparsity=0.5)
    assert_zeros_stay(model)
    before = model[0].weight.detach().clone()
    step(model, optimizer)
    assert not torch.equal(model[0].weight, before)
    assert_zeros_stay(model)


@pytest.mark.parametrize("name", ["sgd_momentum", "adamw", "adamw_fused"])
@pytest.mark.parametrize("attached", ["before", "after"])
def test_zeros_stay_zeros_when_attached(name, attached):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    if attached == "before":
        bp.attach(optimizer, model, num_data=50)
        step(model, optimizer)
        bp.prune_weights(model, sparsity=0.5)
    else:
        step(model, optimizer)
        bp.prune_weights(model, sparsity=0.5)
        bp.attach(optimizer, model, num_data=50)
    step(model, optimizer)
    assert_zeros_stay(model)


def test_zeros_stay_zeros_with_updates_by_hand():
    model = net()
    bp.prune_weights(model, sparsity=0.5)
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * (parameter.grad + 0.01 * parameter)
    assert_zeros_stay(model)


@pytest.mark.parametrize("estimator", ["auto", "mean", "weight_sampling", "flipout", "local_reparameterization"])
def test_removed_weights_have_no_gradient(estimator):
    model = net()
    bp.prune_weights(model, sparsity=0.5)
    with bp.sampling(model, estimator):
        model(torch.randn(5, 6)).square().sum().backward()
    for layer in (model[0], model[2]):
        assert layer.weight.grad[~layer.weight_mask].abs().max() == 0
        assert (layer.weight.grad[layer.weight_mask] != 0).any()
        if estimator != "mean":
            assert layer.weight_log_std.grad[~layer.weight_mask].abs().max() == 0


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_their_zeros(again):
    model = net()
    bp.prune_weights(model, sparsity=0.5)
    other = again(model)
    del model
    optimizer = OPTIMIZERS["sgd_momentum"](other.parameters())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    step(other, optimizer)
    assert_zeros_stay(other)


@pytest.mark.parametrize("assign", [False, True])
def test_a_reloaded_state_keeps_its_zeros(assign):
    model, other = net(), net()
    bp.prune_weights(model, sparsity=0.5)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    optimizer = OPTIMIZERS["adamw"](other.parameters())
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.ones_like(parameter),
            "exp_avg_sq": torch.ones_like(parameter),
        }
    step(other, optimizer)
    assert_zeros_stay(other)
    assert torch.equal(other[0].weight_mask, model[0].weight_mask)


def test_training_goes_on_after_the_stock_classes_are_back():
    model = net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    step(model, optimizer)
    bp.prune_weights(model, sparsity=0.5)
    step(model, optimizer)
    zeros = model[0].weight == 0
    bp.to_deterministic(model)
    assert torch.equal(model[0].weight == 0, zeros)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not torch.equal(model[0].weight == 0, zeros), "nothing keeps the zeros of a stock layer"


def test_a_second_mask_replaces_the_first():
    layer = bp.to_variational(nn.Linear(3, 2))
    layer.set_mask("weight", torch.tensor([[True, True, False], [True, True, True]]))
    layer.set_mask("weight", torch.tensor([[False, True, False], [True, True, True]]))
    assert (layer.weight == 0).tolist() == [[True, False, True], [False, False, False]]
    assert layer.masked_names() == ["weight"]
    assert [name for name, _ in layer.named_buffers()] == ["weight_mask"]


def test_layers_are_not_kept_alive():
    layer = bp.to_variational(nn.Linear(3, 2))
    layer.set_mask("weight", torch.ones(2, 3, dtype=torch.bool))
    gone = weakref.ref(layer)
    assert layer in masks._masked
    del layer
    gc.collect()
    assert gone() is None
