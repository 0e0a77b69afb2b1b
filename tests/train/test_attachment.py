"""The life of an attachment: detached, saved and restored, what it warns of and what it refuses."""

import copy

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.errors import UnsupportedModelError
from bayesprune.priors import ARD, Gaussian, LogUniform
from bayesprune.prune import PruneSchedule
from tests.train.reference import (
    NUM_DATA,
    OPTIMIZERS,
    batches,
    net,
    optimizers,
    others_of,
    stock_net,
    train,
)


def test_weight_decay_elsewhere_is_no_warning():
    model = net()
    norm = [*model[1].parameters()]
    rest = [parameter for parameter in model.parameters() if all(parameter is not n for n in norm)]
    groups = [{"params": rest, "weight_decay": 0.0}, {"params": norm, "weight_decay": 0.1}]
    bp.attach(torch.optim.AdamW(groups, lr=0.1), model, num_data=NUM_DATA)


@pytest.mark.parametrize("made", ["before", "after"])
def test_detach(made):
    model = stock_net() if made == "before" else net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    groups = [list(group["params"]) for group in optimizer.param_groups]
    bp.to_variational(model, relative_std=0.2).double()
    attachment = bp.attach(optimizer, model, num_data=NUM_DATA)
    train(model, optimizer)
    attachment.detach()
    assert all(
        [id(p) for p in group["params"]] == [id(p) for p in before]
        for group, before in zip(optimizer.param_groups, groups, strict=True)
    )
    expected = copy.deepcopy(model)
    held = others_of(expected) if made == "before" else dict(expected.named_parameters())
    plain = torch.optim.SGD(held.values(), lr=0.05)
    train(model, optimizer)
    train(expected, plain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert attachment.step == 4


@pytest.mark.parametrize("prior", [None, Gaussian(0.3, centered=True), ARD()], ids=repr)
@optimizers
def test_a_restored_run_continues_bit_for_bit(name, prior, tmp_path):
    """Model, optimizer and attachment from files, without pickled classes; the prior's constants are the old ones."""

    def build():
        model = net("rank_one")
        optimizer = OPTIMIZERS[name](model.parameters())
        return model, optimizer, bp.attach(optimizer, model, num_data=NUM_DATA, prior=prior, num_steps=8, warmup=0.75)

    run = build()
    train(run[0], run[1])
    torch.save([part.state_dict() for part in run], tmp_path / "run.pt")
    other = build()
    other[0].load_state_dict(torch.load(tmp_path / "run.pt", weights_only=True)[0])
    other = other[0], OPTIMIZERS[name](other[0].parameters())
    other = *other, bp.attach(other[1], other[0], num_data=NUM_DATA, prior=prior, num_steps=8, warmup=0.75)
    for part, state in zip(other, torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    for model, optimizer, _ in (run, other):
        train(model, optimizer)
    assert run[2].step == other[2].step == 8
    for (key, value), restored in zip(run[0].state_dict().items(), other[0].state_dict().values(), strict=True):
        assert torch.equal(value, restored), key


def test_a_state_of_another_model_is_refused():
    attachments = []
    for model in (net(), bp.to_variational(nn.Linear(4, 3))):
        attachments.append(bp.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, num_data=1))
    with pytest.raises(ValueError, match=r"state has 2 posteriors, the model 5; differing: \['0.weight', '4.b"):
        attachments[0].load_state_dict(attachments[1].state_dict())


def test_a_state_of_stds_of_another_structure_is_refused():
    states = []
    for std in ("per_weight", "per_channel"):
        model = net(std)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attachment = bp.attach(optimizer, model, num_data=NUM_DATA)
        train(model, optimizer)
        states.append(attachment.state_dict())
    with pytest.raises(ValueError, match=r"std of shape \(.*where the model has one of shape \(.*the same std="):
        attachment.load_state_dict(states[0])
    attachment.load_state_dict(states[1])


def test_kl_divergence_is_from_the_attached_prior():
    model = net()
    attachment = bp.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, num_data=1)
    assert torch.equal(attachment.kl_divergence(), bp.kl_divergence(model))
    with torch.no_grad():
        for parameter in others_of(model).values():
            parameter *= 3
    assert attachment.kl_divergence() > 2 * bp.kl_divergence(model), "the scale stays that of the start"


def test_a_collapsed_layer_is_said_once():
    model = net()
    model[5].weight_log_std.data.fill_(3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attachment = bp.attach(optimizer, model, num_data=NUM_DATA, prior=LogUniform(), std_lr=0.0)
    attachment.step = 98
    train(model, optimizer, data=batches(1))
    with pytest.warns(UserWarning, match=r"^5\.weight: every weight has an SNR below 1 \(largest 0\.\d+\) at step 100"):
        train(model, optimizer, data=batches(1))
    attachment.step = 199
    train(model, optimizer, data=batches(1))


def test_a_removed_layer_has_not_collapsed():
    model = net()
    model[5].set_mask("weight", torch.zeros(3, 3, dtype=torch.bool))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attachment = bp.attach(optimizer, model, num_data=NUM_DATA)
    attachment.step = 99
    train(model, optimizer, data=batches(1))


@pytest.mark.parametrize("how", ["raw weight", "eval"])
def test_a_weight_without_noise_is_said(how):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    bp.attach(optimizer, model, num_data=NUM_DATA)
    x = torch.randn(4, 3).double()
    if how == "eval":
        model[5].eval()
    output = model[5](x) if how == "eval" else nn.functional.linear(x, model[5].weight)
    output.square().mean().backward()
    with pytest.warns(UserWarning, match=r"5\.(weight|bias): its gradient does not come from a draw"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_data": 0}, "num_data is 0; expected the number of training examples, above 0"),
        ({"num_data": -5}, "num_data is -5"),
        ({"num_data": float("nan")}, "num_data is nan"),
        ({"num_data": 1, "temperature": -0.1}, 'temperature is -0.1; expected a number of 0 or more, or "auto"'),
        ({"num_data": 1, "temperature": "warm"}, "temperature is 'warm'"),
        ({"num_data": 1, "warmup": 100}, "warmup is 100; expected a share of the training, 0 to 1, not a number of st"),
        ({"num_data": 1, "warmup": 0.1}, "warmup=0.1 .* go by shares of the training, .*; pass num_steps"),
        ({"num_data": 1, "prune": PruneSchedule("weights=0.5")}, r"prune=PruneSchedule\(.* pass num_steps"),
        ({"num_data": 1, "num_steps": 0}, "num_steps is 0; expected the optimizer steps of the whole training"),
        ({"num_data": 1, "std_lr": -1.0}, r"std_lr is -1\.0"),
    ],
)
def test_numbers_are_checked(options, message):
    model = net()
    with pytest.raises(ValueError, match=message):
        bp.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)


def test_wrong_optimizers_are_refused():
    model = net()
    with pytest.raises(ValueError, match=r"SGD holds none of the model's 5 posterior means"):
        bp.attach(torch.optim.SGD(net().parameters(), lr=0.1), model, num_data=1)
    with pytest.raises(ValueError, match="SGD holds none"):
        bp.attach(torch.optim.SGD(model[1].parameters(), lr=0.1), model, num_data=1)
    with pytest.raises(ValueError, match="no variational layer"):
        bp.attach(torch.optim.SGD(model[1].parameters(), lr=0.1), model[1], num_data=1)
    with pytest.raises(ValueError, match="SGD has maximize=True, and would raise the KL"):
        bp.attach(torch.optim.SGD(model.parameters(), lr=0.1, maximize=True), model, num_data=1)
    with pytest.raises(UnsupportedModelError, match="attach got LBFGS"):
        bp.attach(torch.optim.LBFGS(model.parameters()), model, num_data=1)

    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(UnsupportedModelError, match="attach got FullyShardedDataParallel"):
        bp.attach(torch.optim.SGD(model.parameters(), lr=0.1), FullyShardedDataParallel(), num_data=1)


def test_attaching_twice_is_refused():
    """A notebook cell run twice would count the KL twice."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = bp.attach(optimizer, model, num_data=1)
    with pytest.raises(ValueError, match=r"has an attachment to this model already; call its detach\(\) first"):
        bp.attach(optimizer, model, num_data=1)
    first.detach()
    bp.attach(optimizer, model, num_data=1)
    other = nn.ModuleList([bp.to_variational(nn.Linear(2, 2))])
    optimizer.add_param_group({"params": list(other.parameters())})
    bp.attach(optimizer, other, num_data=1)


def test_a_state_with_another_prior_is_refused():
    attachments = []
    for prior in (ARD(), Gaussian()):
        model = net()
        attachments.append(bp.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, num_data=1, prior=prior))
    with pytest.raises(ValueError, match=r"prior with no constants for 0.weight, the one attached has \['scale'\]"):
        attachments[1].load_state_dict(attachments[0].state_dict())
    assert attachments[1].step == 0


@pytest.mark.parametrize("change", ["deterministic", "resized"])
def test_a_model_that_changed_under_the_attachment_is_said(change):
    """Its stds would silently stand still."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = bp.attach(optimizer, model, num_data=1)
    if change == "deterministic":
        bp.to_deterministic(model)
    else:
        model[5].cut("weight", 0, [0, 2], 3)
        model[5].cut("bias", 0, [0, 2], 3)
        for name in ("weight", "bias"):
            setattr(model[5], name, nn.Parameter(getattr(model[5], name).detach()[[0, 2]]))
    x, _ = batches(1)[0]
    model(x).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"was resized or made deterministic after attach.*call detach\(\) first"):
        optimizer.step()
    attachment.detach()
    optimizer.step()
