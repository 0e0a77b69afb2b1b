"""Stds that follow the gradients of ordinary training, or are read from an IVON optimizer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bayesprune as bp
from bayesprune.laplace import RunningLaplace, ivon_posterior
from bayesprune.prune import SNRScore
from bayesprune.prune.scores.weights import magnitude, snr
from tests.cases import structures


def classifier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    return bp.to_variational(model.double(), estimator="mean")


def batches(number):
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        yield (
            torch.randn(8, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, (8,), generator=generator),
        )


def train(model, optimizer, number, posterior=None, sparsity=None):
    for inputs, labels in batches(number):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        if sparsity is not None:
            posterior.update()
            bp.prune_weights(model, f"weights={1 - sparsity}", score=SNRScore(0.5))


def test_it_agrees_with_adams_moments_and_leaves_the_training_alone():
    model = classifier()
    plain = copy.deepcopy(model)
    optimizer, other = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain))
    prior = bp.priors.Gaussian(2.0)
    running = RunningLaplace(optimizer, model, num_data=100, batch_size=8, decay=0.999, prior=prior)
    train(model, optimizer, 7)
    train(plain, other, 7)
    running.update()
    for posterior, expected in zip(*map(bp.layers.named_posteriors, (model, plain)), strict=True):
        assert torch.equal(posterior.mean, expected.mean)
        moments = other.state[expected.mean]
        precision = 100 * 8 * moments["exp_avg_sq"] / (1 - 0.999 ** moments["step"]) + 1 / 2.0**2
        log_std = sum(posterior.log_std_parts)
        torch.testing.assert_close(log_std.exp(), precision.rsqrt(), rtol=1e-5, atol=0, check_dtype=False)


def test_gradients_that_a_closure_computes_count():
    states = []
    for is_inside in (False, True):
        model = classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        running = RunningLaplace(optimizer, model, num_data=100, batch_size=8)
        for inputs, labels in batches(2):

            def closure(model=model, optimizer=optimizer, inputs=inputs, labels=labels):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs), labels)
                loss.backward()
                return loss

            if is_inside:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        states.append(running.state_dict())
    assert states[0]["steps"] == states[1]["steps"] == dict.fromkeys(states[0]["steps"], 2)
    assert all(torch.equal(average, states[1]["averages"][name]) for name, average in states[0]["averages"].items())


def test_a_resumed_run_goes_on_to_the_last_bit():
    def run(stop):
        model = classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        posterior = RunningLaplace(optimizer, model, num_data=100, batch_size=8)
        train(model, optimizer, stop)
        state = copy.deepcopy(posterior.state_dict())
        posterior.detach()
        posterior = RunningLaplace(optimizer, model, num_data=100, batch_size=8, prior=bp.priors.Gaussian())
        posterior.load_state_dict(state)
        train(model, optimizer, 4)
        return posterior.state_dict()["averages"]

    whole = run(3)
    for name, average in run(3).items():
        assert torch.equal(average, whole[name])
    assert not torch.equal(run(2)["0.weight"], whole["0.weight"])


def test_removed_weights_stay_removed_while_it_follows():
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    posterior = RunningLaplace(optimizer, model, num_data=100, batch_size=8)
    train(model, optimizer, 5, posterior, sparsity=0.5)
    assert sum(int((layer.weight == 0).sum()) for layer in (model[0], model[2])) == 21


def test_what_it_cannot_do_is_said():
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="decay=1"):
        RunningLaplace(optimizer, model, num_data=10, batch_size=2, decay=1.0)
    posterior = RunningLaplace(optimizer, model, num_data=10, batch_size=2)
    with pytest.raises(RuntimeError, match="no step"):
        posterior.update()
    with pytest.raises(ValueError, match="nowhere"):
        posterior.load_state_dict({"averages": {"nowhere": torch.zeros(2)}, "steps": {"nowhere": 1}})


def test_the_score_lies_between_magnitude_and_snr():
    model = classifier()
    posterior = next(iter(bp.layers.named_posteriors(model)))
    with torch.no_grad():
        posterior.log_std_parts[0].normal_(-2, 1)
    torch.testing.assert_close(SNRScore(2.0)(posterior), snr(posterior))
    torch.testing.assert_close(SNRScore(0.0)(posterior), magnitude(posterior))
    torch.testing.assert_close(SNRScore(1.0)(posterior).square(), snr(posterior) * magnitude(posterior))
    with pytest.raises(ValueError, match=r"power is 2\.5"):
        SNRScore(2.5)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))


class IVON(torch.optim.Optimizer):
    """What `ivon.IVON` shows of itself: a flat `hess` in each group, no state by parameter."""

    def __init__(self, params, *, ess, hess_init=1.0, weight_decay=1e-4):
        super().__init__(params, {"ess": ess, "hess_init": hess_init, "weight_decay": weight_decay})
        for group in self.param_groups:
            group["hess"] = torch.full((sum(p.numel() for p in group["params"]),), hess_init)


@structures
def test_stds_are_those_of_the_optimizer_by_group(std):
    model = net()
    conv, norm, linear = list(model[0].parameters()), list(model[1].parameters()), [model[3].bias, model[3].weight]
    optimizer = IVON([{"params": conv + norm}, {"params": linear, "weight_decay": 0.5}], ess=1000)
    for group in optimizer.param_groups:
        group["hess"] = torch.rand(len(group["hess"]))
    curvatures = {
        model[0].weight: optimizer.param_groups[0]["hess"][:12].view(3, 1, 2, 2) + 1e-4,
        model[0].bias: optimizer.param_groups[0]["hess"][12:15] + 1e-4,
        model[3].bias: optimizer.param_groups[1]["hess"][:2] + 0.5,
        model[3].weight: optimizer.param_groups[1]["hess"][2:].view(2, 12) + 0.5,
    }
    means = copy.deepcopy(dict(model.named_parameters()))
    assert ivon_posterior(bp.to_variational(model, std=std), optimizer) is model
    for layer in (model[0], model[3]):
        for name in ("weight", "bias"):
            scaled = (2 * layer.log_std(name)).exp() * 1000 * curvatures[getattr(layer, name)]
            if std == "per_weight" or name == "bias":
                torch.testing.assert_close(scaled, torch.ones_like(scaled), rtol=1e-5, atol=0)
            else:
                torch.testing.assert_close(scaled.flatten(1).mean(1), torch.ones(len(scaled)), rtol=1e-4, atol=0)
    assert all(torch.equal(p, means[name]) for name, p in model.named_parameters() if name in means)


def test_what_does_not_fit_is_refused():
    model = net()
    with pytest.raises(ValueError, match="no variational layer"):
        ivon_posterior(model, IVON(model.parameters(), ess=10))
    bp.to_variational(model)
    with pytest.raises(TypeError, match="SGD has no hess, ess.*expected ivon.IVON"):
        ivon_posterior(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"no step on, 0.weight, 0.bias, 3.weight.* \(4 of the model's 4"):
        ivon_posterior(model, IVON(model.parameters(), ess=10))
    ivon = IVON([model[3].weight, model[3].bias], ess=10)
    ivon.param_groups[0]["hess"] = torch.rand(26)
    with pytest.raises(ValueError, match=r"does not hold.* 0.weight, 0.bias \(2 of the model's 4"):
        ivon_posterior(model, ivon)
    model[3].weight.data = model[3].weight.data[:, :6]
    with pytest.raises(ValueError, match=r"hess of shape \(26,\) for 2 parameters of 14 entries"):
        ivon_posterior(model, ivon)
