"""Stds that follow the gradients of ordinary training."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bayesprune as bp
from bayesprune.laplace import RunningLaplace
from bayesprune.prune import SNRScore
from bayesprune.prune.scores.weights import magnitude, snr


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
