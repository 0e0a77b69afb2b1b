"""Where posteriors train and the hook does not run, or runs for a part of them, a warning says so, once."""

import gc
import weakref

import pytest
import torch

import bayesprune as bp
from tests.train.reference import NUM_DATA, batches, losses, net, others_of
from tests.train.test_optimizers import split


def loop(model, step, *, clear=None, count=18, accumulation=1):
    clear = model.zero_grad if clear is None else clear
    for _ in range(count):
        clear()
        for loss in losses(model, batches(1)[0], accumulation):
            loss.backward()
        step()


MISSED = r"gradients came and went, and the SGD that attach was given took no step"


@pytest.mark.parametrize("holds", ["means", "all"])
def test_an_optimizer_that_was_replaced_is_noticed(holds):
    model = net()
    bp.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, num_data=NUM_DATA)
    gc.collect()  # nobody holds that optimizer
    held = others_of(model).values() if holds == "means" else model.parameters()
    other = torch.optim.AdamW(held, lr=1e-3, weight_decay=0.0, fused=True)
    with pytest.warns(UserWarning, match=MISSED) as caught:
        loop(model, other.step, clear=other.zero_grad, count=20)
    assert len(caught) == 1


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_loop_that_moves_weights_by_itself_is_noticed(accumulation):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bp.attach(optimizer, model, num_data=NUM_DATA)

    def by_hand():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * parameter.grad

    with pytest.warns(UserWarning, match=MISSED):
        loop(model, by_hand, accumulation=accumulation)


def test_steps_during_backward_are_noticed():
    """An optimizer for every parameter, stepped as soon as its gradient is there."""
    model = net()
    every = {p: torch.optim.SGD([p], lr=1e-3) for p in model.parameters()}
    bp.attach(torch.optim.SGD(model.parameters(), lr=1e-3), model, num_data=NUM_DATA)

    def step(parameter):
        every[parameter].step()
        every[parameter].zero_grad()

    for parameter in every:
        parameter.register_post_accumulate_grad_hook(step)
    with pytest.warns(UserWarning, match=MISSED):
        loop(model, lambda: None, clear=lambda: None)


def test_a_second_optimizer_without_an_attachment_is_noticed():
    model = net()
    matrices, rest = split(model, torch.optim.SGD)
    bp.attach(matrices, model, num_data=NUM_DATA)

    def step():
        matrices.step()
        rest.step()

    with pytest.warns(UserWarning, match="bias: the SGD that attach was given does not hold it, and some") as caught:
        loop(model, step)
    assert {str(warning.message).partition(":")[0] for warning in caught} == {"4.bias", "5.bias"}


def test_what_is_right_is_not_warned_of():
    """Accumulation over many batches, overflows, means that nobody moves, an optimizer that another follows."""
    model = net()
    optimizer = torch.optim.SGD([*model[5].parameters()], lr=0.01)
    attachment = bp.attach(optimizer, model, num_data=NUM_DATA)
    loop(model, lambda: None, clear=lambda: None, count=20)
    optimizer.step()
    loop(model, lambda: None, count=10)
    loop(model, optimizer.step, count=20)
    assert attachment.step == 21
    bp.prune_weights(model, "weights=0.5")
    bp.attach(torch.optim.SGD(model.parameters(), lr=0.01), model, num_data=NUM_DATA)
    del optimizer, attachment
    gc.collect()
    last = torch.optim.SGD(model.parameters(), lr=0.01)
    bp.attach(last, model, num_data=NUM_DATA)
    loop(model, last.step, count=20)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_means_that_nobody_moves_may_be_loaded(is_frozen):
    """Frozen layers of a model that was made without its weights; or others, once a saved attachment is loaded."""
    model, source = net(), net()
    with torch.no_grad():
        source[0].weight *= 2
    optimizer = torch.optim.SGD(model[5].parameters(), lr=0.01)
    attachment = bp.attach(optimizer, model, num_data=NUM_DATA)
    model[0].requires_grad_(not is_frozen)
    model.load_state_dict(source.state_dict())
    if not is_frozen:
        attachment.load_state_dict(attachment.state_dict())
    loop(model, optimizer.step, count=12)
    assert attachment.step == 12


def test_a_model_is_not_kept_alive():
    model = net()
    bp.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, num_data=NUM_DATA)
    loop(model, lambda: None, count=2)
    gone = weakref.ref(model[5])
    del model
    gc.collect()
    assert gone() is None
