"""Weights go on the way by the attachment alone, whatever the loop does, and in a resumed run as in the whole one."""

import copy

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.layers import named_posteriors
from bayesprune.prune import PruneSchedule, make_masks
from bayesprune.train import default_temperature
from tests.train.reference import NUM_DATA, OPTIMIZERS, batches, losses, net, optimizers, stock_net, train

SCHEDULE = PruneSchedule("weights=0.5", begin=0.25, end=0.75, num_updates=2)
FRACTIONS = [0.0, 0.5 * 0.875, 0.5, 0.5]  # after each of four steps


def weights(model: nn.Module) -> list:
    return [posterior for posterior in named_posteriors(model) if posterior.is_weight]


def removed(model: nn.Module) -> int:
    return sum(int((~posterior.mask).sum()) for posterior in weights(model))


def counts(model: nn.Module, fractions=FRACTIONS) -> list[int]:
    total = sum(posterior.mean.numel() for posterior in weights(model))
    return [round(fraction * total) for fraction in fractions]


def build(name: str = "adamw"):
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    return model, optimizer, bp.attach(optimizer, model, num_data=NUM_DATA, num_steps=4, prune=SCHEDULE)


@pytest.mark.parametrize("accumulation", [1, 2])
@optimizers
def test_weights_go_at_their_time_and_nothing_remembers_them(name, accumulation):
    """The run in which a loop removes them by hand, and clears the moments, is the same one."""
    model, optimizer, attachment = build(name)
    assert removed(model) == 0, "the masks are made at once"
    found = []
    train(model, optimizer, accumulation=accumulation, after_step=lambda: found.append(removed(model)))
    assert found == counts(model)
    assert attachment.sparsity == 0.5
    for posterior in weights(model):
        assert not posterior.mean[~posterior.mask].any()
        for value in optimizer.state[posterior.mean].values():
            assert value is None or value.dim() == 0 or not value[~posterior.mask].any()

    expected, steps = make_masks(net()), []
    other = OPTIMIZERS[name](expected.parameters())
    bp.attach(other, expected, num_data=NUM_DATA)

    def remove() -> None:
        steps.append(1)
        if (sparsity := SCHEDULE.removal_after(len(steps), 4)) is not None:
            SCHEDULE.remove(expected, sparsity)
            for posterior in weights(expected):
                for value in other.state[posterior.mean].values():
                    if value is not None and value.dim():
                        value.mul_(posterior.mask)

    train(expected, other, accumulation=accumulation, after_step=remove)
    for key, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_closures():
    model, optimizer, _ = build()
    found = []
    for batch in batches():

        def closure(batch=batch):
            optimizer.zero_grad()
            (loss,) = losses(model, batch, 1)
            loss.backward()
            return loss

        optimizer.step(closure)
        found.append(removed(model))
    assert found == counts(model)


@optimizers
def test_steps_that_a_gradient_scaler_skips_do_not_count(name):
    model, optimizer, _ = build(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    found = []
    data = batches()
    for batch in [data[0], None, data[1], None, None, data[2], data[3]]:
        optimizer.zero_grad()
        (loss,) = losses(model, data[0] if batch is None else batch, 1)
        scaler.scale(loss * float("inf") if batch is None else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(removed(model))
    a, b, c, d = counts(model)
    assert found == [a, a, b, b, b, c, d]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_removes_what_the_whole_one_does(stop):
    whole = build()
    first, second = batches()[:stop], batches()[stop:]
    train(whole[0], whole[1], data=first)
    saved = copy.deepcopy([part.state_dict() for part in whole])
    resumed = build()
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    assert resumed[2].sparsity == whole[2].sparsity == FRACTIONS[stop - 1]
    for model, optimizer, _ in (whole, resumed):
        train(model, optimizer, data=second)
    assert removed(resumed[0]) == counts(resumed[0])[-1]
    for key, value in whole[0].state_dict().items():
        assert torch.equal(resumed[0].state_dict()[key], value), key


def test_all_at_once_is_after_the_first_step():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    bp.attach(optimizer, model, num_data=NUM_DATA, num_steps=4, prune=PruneSchedule("weights=0.5", begin=0.0, end=0.0))
    assert removed(model) == 0
    train(model, optimizer, data=batches(1))
    assert [removed(model)] == counts(model, [0.5])


def test_nothing_goes_once_it_is_detached():
    model, optimizer, attachment = build()
    train(model, optimizer, data=batches(1))
    attachment.detach()
    assert not optimizer._optimizer_step_post_hooks
    train(model, optimizer)
    assert removed(model) == 0


def test_a_schedule_of_ones_own():
    class First:
        """The first layer, after half of the training."""

        def sparsity_at(self, progress: float) -> float:
            return float(progress >= 0.5)

        def remove(self, model: nn.Module, sparsity: float) -> None:
            bp.prune_weights(model, {"0": 1 - sparsity}, min_kept=0)

    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    bp.attach(optimizer, model, num_data=NUM_DATA, num_steps=4, prune=First())
    found = []
    train(model, optimizer, after_step=lambda: found.append(removed(model)))
    assert found == [0, 36, 36, 36]
    with pytest.raises(TypeError, match=r"prune is 0\.5; expected a schedule, such as .*PruneSchedule"):
        bp.attach(optimizer, model, num_data=1, num_steps=1, prune=0.5)


def test_the_temperature_by_itself():
    """0.1, or less where there are many weights for each example; given, it stays."""
    model = net()
    for temperature, expected in (("auto", default_temperature(model, 1)), (0.3, 0.3)):
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        attachment = bp.attach(optimizer, model, num_data=1, temperature=temperature)
        assert attachment.temperature == expected
    assert default_temperature(model, 1) < 0.1 == default_temperature(model, NUM_DATA)


def test_masks_before_any_removal():
    """All weights that train have one which keeps all of it, tied ones the same; what was removed stays removed."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    bp.to_variational(model)
    model[3].requires_grad_(False)
    bp.prune_weights(model, {"2": 0.5})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert make_masks(model) is model
    assert model[0].weight_mask is model[1].weight_mask
    assert model[0].weight_mask.all()
    assert model[2].weight_mask.sum() == 4
    assert model[3].masked_names() == model[0].masked_names()[1:] == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in before)
    with pytest.raises(ValueError, match="without variational layers"):
        make_masks(stock_net())
    with pytest.raises(ValueError, match="frozen weights are not removed"):
        make_masks(model.requires_grad_(False))
