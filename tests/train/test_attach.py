"""A step with the hook is a step on the ELBO, whatever the loop does."""

import copy

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.priors import ARD, Gaussian, LogUniform
from tests.cases import structures
from tests.train.reference import (
    NUM_DATA,
    OPTIMIZERS,
    assert_same_parameters,
    batches,
    losses,
    net,
    optimizers,
    stds_of,
    stock_net,
    train,
    train_on_elbo,
)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@structures
@optimizers
def test_the_hook_is_the_elbo(name, std, accumulation):
    model = net(std)
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    bp.attach(optimizer, model, num_data=NUM_DATA)
    train(model, optimizer, accumulation=accumulation)
    train_on_elbo(expected, OPTIMIZERS[name], accumulation=accumulation)
    assert_same_parameters(model, expected, start)


@pytest.mark.parametrize(
    "prior",
    [Gaussian(0.1), Gaussian(0.3, centered=True), ARD(), ARD("weight"), ARD("layer"), LogUniform()],
    ids=repr,
)
@structures
def test_with_every_prior(std, prior):
    model = net(std)
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    bp.attach(optimizer, model, num_data=NUM_DATA, prior=prior, temperature=1.0)
    train(model, optimizer)
    train_on_elbo(expected, OPTIMIZERS["sgd"], prior=prior, temperature=1.0)
    assert_same_parameters(model, expected, start)


@optimizers
def test_an_optimizer_made_before_conversion(name):
    model = stock_net()
    optimizer = OPTIMIZERS[name](model.parameters())
    bp.to_variational(model, relative_std=0.2).double()
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    bp.attach(optimizer, model, num_data=NUM_DATA)
    train(model, optimizer)
    train_on_elbo(expected, OPTIMIZERS[name])
    assert_same_parameters(model, expected, start)


def test_temperature_and_warmup():
    model = net()
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    options = {"temperature": 0.7, "warmup": 0.75, "std_lr": 0.03}
    attachment = bp.attach(optimizer, model, num_data=NUM_DATA, num_steps=4, **options)
    weights = [attachment.kl_weight]
    train(model, optimizer, after_step=lambda: weights.append(attachment.kl_weight))
    assert weights == pytest.approx([0.7 / NUM_DATA * ramp for ramp in (1 / 3, 2 / 3, 1, 1, 1)])
    assert attachment.step == 4
    train_on_elbo(expected, OPTIMIZERS["sgd"], **options)
    assert_same_parameters(model, expected, start)


def test_the_temperature_may_change_on_the_way():
    model, other = net(), net()
    for one, temperature in ((model, 0.1), (other, 0.4)):
        optimizer = OPTIMIZERS["sgd"](one.parameters())
        attachment = bp.attach(optimizer, one, num_data=NUM_DATA, temperature=temperature)
        attachment.temperature = 0.4
        train(one, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("made", ["before", "after"])
def test_schedule_and_weight_decay_do_not_touch_the_stds(made):
    """A scheduler that was built before `attach` goes on; decay and rate act on the means alone."""

    def make(parameters):
        return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.3)

    def schedule(step):
        return 1 / (1 + step)

    model = stock_net() if made == "before" else net()
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model = bp.to_variational(model, relative_std=0.2).double()
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"AdamW has weight_decay=0\.3 on posterior means, a second Gaussian prior"):
        bp.attach(optimizer, model, num_data=NUM_DATA)
    train(model, optimizer, after_step=scheduler.step)
    train_on_elbo(expected, make, schedule=schedule)
    assert_same_parameters(model, expected, start)
    assert not any(part in optimizer.state for part in stds_of(model).values())


def test_a_rate_of_zero_still_moves_the_stds():
    model = net()
    start = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    bp.attach(optimizer, model, num_data=NUM_DATA)
    train(model, optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start.get_parameter(name)) == (not name.endswith("log_std")), name


@structures
def test_tied_weights(std):
    """Gradients of both uses and one KL."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 3)).double()
    model[3].weight = model[1].weight
    bp.to_variational(model, std=std, relative_std=0.2).double()
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    bp.attach(optimizer, model, num_data=NUM_DATA)
    train(model, optimizer)
    train_on_elbo(expected, OPTIMIZERS["adamw"])
    assert_same_parameters(model, expected, start)


@optimizers
def test_after_pruning(name):
    """Removed weights stay zero and count in neither gradient; the others move as the ELBO says."""
    model = net()
    bp.prune_weights(model, "weights=0.5")
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    bp.attach(optimizer, model, num_data=NUM_DATA)
    train(model, optimizer)
    train_on_elbo(expected, OPTIMIZERS[name])
    assert_same_parameters(model, expected, start)
    for layer in (model[0], model[4], model[5]):
        assert layer.weight[~layer.weight_mask].abs().max() == 0


@pytest.mark.parametrize("as_keyword", [True, False])
@optimizers
def test_closures(name, as_keyword):
    """Lightning computes the gradients inside the step."""
    model = net()
    expected = copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    bp.attach(optimizer, model, num_data=NUM_DATA)
    torch.manual_seed(2)
    for batch in batches():

        def closure(batch=batch):
            optimizer.zero_grad()
            (loss,) = losses(model, batch, 1)
            loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        assert loss.item() > 0
    other = OPTIMIZERS[name](expected.parameters())
    bp.attach(other, expected, num_data=NUM_DATA)
    train(expected, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_a_model_in_half_precision():
    model = bp.to_variational(stock_net().to(torch.bfloat16), relative_std=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    bp.attach(optimizer, model, num_data=NUM_DATA)
    start = copy.deepcopy(model)
    train(model, optimizer, data=[(x.bfloat16(), y) for x, y in batches()])
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("log_std") else torch.bfloat16)
        assert parameter.isfinite().all()
        assert not torch.equal(parameter, start.get_parameter(name)), name


@structures
def test_stds_are_at_most_the_priors(std):
    model = net(std)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attachment = bp.attach(optimizer, model, num_data=NUM_DATA, prior=Gaussian(0.03), std_lr=0.0)
    for part in stds_of(model).values():
        part.data += torch.randn_like(part)
    before.load_state_dict(model.state_dict())
    train(model, optimizer, data=batches(1))
    for posterior, prior in attachment._bound.items():
        old = before.get_submodule(posterior.name.rpartition(".")[0]).log_std(posterior.parameter)
        now, largest = posterior.log_std, prior.max_log_std
        assert (old > largest).any()
        assert now.max() <= largest + 1e-12
        if std == "rank_one" and posterior.is_weight:  # a whole row gives way
            excess = (old - largest).flatten(1).amax(1).clamp_min(0)
            torch.testing.assert_close(now, old - excess.view(-1, *[1] * (old.dim() - 1)), rtol=0, atol=1e-12)
        else:
            assert torch.equal(now, old.clamp_max(largest))


@structures
def test_stds_have_a_floor(std):
    """Far below the resolution of float32, so that a std never underflows to zero."""
    model = net(std)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    bp.attach(optimizer, model, num_data=NUM_DATA, std_lr=0.0)
    for part in stds_of(model).values():
        part.data.fill_(-100.0)
    train(model, optimizer, data=batches(1))
    assert all((part == -20).all() for part in stds_of(model).values())


def test_frozen_layers_neither_move_nor_count():
    model = net()
    model[0].requires_grad_(False)
    start = copy.deepcopy(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    bp.attach(optimizer, model, num_data=NUM_DATA)
    train(model, optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start.get_parameter(name)) == name.startswith("0."), name


def test_a_model_that_is_frozen_so_far():
    """Gradual unfreezing: what is thawed later trains like the rest."""
    model = net()
    for index in (0, 4, 5):
        model[index].requires_grad_(False)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    bp.attach(optimizer, model, num_data=NUM_DATA)
    train(model, optimizer)
    model.requires_grad_(True)
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    train(model, optimizer)
    other = OPTIMIZERS["sgd"](expected.parameters())
    bp.attach(other, expected, num_data=NUM_DATA)
    train(expected, other)
    assert_same_parameters(model, expected, start)


def test_what_a_step_does_not_use_stays():
    """torch's weight decay leaves parameters without a gradient alone, too."""
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})
    bp.to_variational(model)
    start = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bp.attach(optimizer, model, num_data=1, temperature=1.0)
    model["used"](torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start.get_parameter(name)) == name.startswith("unused"), name


def test_wrappers():
    """A compiled model and a wrapper in the manner of accelerate's give the run of what they wrap."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        param_groups = property(lambda self: self.optimizer.param_groups)

        def step(self, closure=None):
            self.optimizer.step(closure)

    model, expected = net(), net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    bp.attach(Wrapper(optimizer), torch.compile(model, backend="eager"), num_data=NUM_DATA)
    train(model, optimizer)
    other = OPTIMIZERS["adamw"](expected.parameters())
    bp.attach(other, expected, num_data=NUM_DATA)
    train(expected, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("name", ["lookahead_adamw", "lamb", "adafactor", "muon", "nadamw"])
def test_timms_optimizers(name):
    """Hooks of torch's optimizers run in timm's as well: stds move and removed weights stay zero."""
    optim = pytest.importorskip("timm.optim")
    model = bp.to_variational(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    try:
        optimizer = optim.create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.0)
    except ValueError as error:
        pytest.skip(str(error))
    attachment = bp.attach(optimizer, model, num_data=NUM_DATA)
    start = copy.deepcopy(model)
    for number in range(6):
        if number == 3:
            bp.prune_weights(model, "weights=0.5")
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
    assert attachment.step == 6
    for part, before in zip(stds_of(model).values(), stds_of(start).values(), strict=True):
        assert not torch.equal(part, before)
    assert all(layer.weight[~layer.weight_mask].abs().max() == 0 for layer in (model[0], model[2]))
