"""Scaled gradients and skipped steps: the hook sees them before a fused optimizer has unscaled them."""

import copy

import pytest
import torch

import bayesprune as bp
from tests.train.reference import (
    NUM_DATA,
    OPTIMIZERS,
    assert_same_parameters,
    batches,
    losses,
    net,
    optimizers,
    others_of,
    stock_net,
    train_on_elbo,
)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("made", ["before", "after"])
@optimizers
def test_gradient_scaler(name, made, unscale):
    """Scaled losses, one of them overflowing: the same run as without a scaler and without that step."""
    model = stock_net() if made == "before" else net()
    optimizer = OPTIMIZERS[name](model.parameters())
    model = bp.to_variational(model, relative_std=0.2).double()
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    attachment = bp.attach(optimizer, model, num_data=NUM_DATA)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    data = batches()
    steps = []
    torch.manual_seed(2)
    for number, batch in enumerate([data[0], data[1], None, data[2], data[3]]):
        optimizer.zero_grad()
        state = torch.get_rng_state()
        (loss,) = losses(model, data[0] if batch is None else batch, 1)
        scaler.scale(loss * float("inf") if batch is None else loss).backward()
        before = {key: value.clone() for key, value in model.named_parameters()}
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if batch is None:
            torch.set_rng_state(state)
            assert all(torch.equal(value, before[key]) for key, value in model.named_parameters()), number
        steps.append(attachment.step)
    assert steps == [1, 2, 2, 3, 4]
    train_on_elbo(expected, OPTIMIZERS[name])
    assert_same_parameters(model, expected, start)


def test_a_single_overflowing_std_skips_the_step_of_all():
    model = net()
    optimizer = OPTIMIZERS["adamw_fused"](others_of(model).values())
    attachment = bp.attach(optimizer, model, num_data=NUM_DATA)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    (loss,) = losses(model, batches()[0], 1)
    scaler.scale(loss).backward()
    model[0].weight_log_std.grad[0, 0, 0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert attachment.step == 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("unscale", [False, True])
def test_while_the_kl_warms_up_skipped_steps_do_not_count(unscale):
    """Nobody asks for the number of steps in between, so that the weight of the KL is known on the device alone."""
    found = []
    for is_scaled in (True, False):
        torch.manual_seed(0)
        model = net()
        optimizer = OPTIMIZERS["adamw_fused"](others_of(model).values())
        attachment = bp.attach(optimizer, model, num_data=NUM_DATA, num_steps=8, warmup=1.0, temperature=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, enabled=is_scaled)
        torch.manual_seed(2)
        for number, batch in enumerate([batches()[0], None, *batches()[1:]] if is_scaled else batches()):
            optimizer.zero_grad()
            state = torch.get_rng_state()
            (loss,) = losses(model, batches()[0] if batch is None else batch, 1)
            scaler.scale(loss * float("inf") if batch is None else loss).backward()
            if batch is None:
                torch.set_rng_state(state)
            if unscale:
                scaler.unscale_(optimizer)
            before = attachment._steps._num_unasked
            scaler.step(optimizer)
            scaler.update()
            assert not is_scaled or attachment._steps._num_unasked == before + 1, number
        assert attachment.step == len(batches())
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
