import math

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.distributions import Normal

import bayesprune as bp
from bayesprune import priors
from bayesprune.prune import dependency_groups
from bayesprune.prune.graph.find import find_groups
from bayesprune.train.kl import bind_prior
from tests.cases import structures


def model(std: str = "per_weight") -> nn.Module:
    torch.manual_seed(7)
    net = bp.to_variational(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), std=std)
    for layer in (net[0], net[2]):
        for part in layer.log_std_parts("weight"):
            part.data += 0.7 * torch.randn_like(part)
    return net


@structures
def test_evidence_is_the_savage_dickey_ratio(std):
    net = model(std)
    found = bp.prune.evidence(net, priors.Gaussian(0.3))
    assert found.keys() == bp.signal_to_noise(net).keys()
    for name, layer in (("0", net[0]), ("2", net[2])):
        mean, std_of_weights = layer.posteriors()["weight"]
        at_zero = torch.zeros_like(mean)
        ratio = Normal(mean, std_of_weights).log_prob(at_zero) - Normal(0.0, 0.3).log_prob(at_zero)
        torch.testing.assert_close(found[f"{name}.weight"], ratio.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", ["channel", "input_channel", "layer"])
def test_a_learned_scale_is_the_prior_that_it_is_at_its_best(group):
    net = model()
    mean, std = (x.detach().double() for x in net[0].posteriors()["weight"])
    squares = mean.square() + std.square()
    scale = squares.mean() if group == "layer" else squares.mean(1 if group == "channel" else 0, keepdim=True)
    expected = 0.5 * (scale / std.square()).log() - 0.5 * (mean / std).square()
    found = bp.prune.evidence(net, priors.ARD(group))["0.weight"]
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    by_default = bp.prune.evidence(net, priors.Horseshoe(group, 1e6))["0.weight"]  # hardly a prior of the scale
    torch.testing.assert_close(by_default, found, rtol=1e-4, atol=1e-4)


def test_weights_are_compared_under_scales_of_dependency_groups_and_channels_are_not():
    """dF of a channel would be that of ARD per weight: it has a scale of its own."""
    net = model()
    prior = priors.ARD(dependency_groups(net, torch.randn(1, 5)))
    its = next(iter(bind_prior(net, prior).values()))
    mean, std = (x.detach() for x in net[0].posteriors()["weight"])
    scale = its.variance(mean, std.log()).sqrt()
    assert scale.shape == (6, 1)
    expected = (scale / std).log() - 0.5 * (mean / std).square()
    torch.testing.assert_close(bp.prune.evidence(net, prior)["0.weight"], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="channels cannot be compared under ARD over dependency groups.*SNRImportance"):
        bp.prune.EvidenceImportance(prior)


def test_evidence_is_the_difference_of_two_models_log_evidence():
    """A linear model with Gaussian noise, where both are known: with the weight free, and with it at zero."""
    torch.manual_seed(8)
    x, noise = torch.randn(40, dtype=torch.float64), 0.5
    y = 0.1 * x + noise * torch.randn(40, dtype=torch.float64)
    eye = noise**2 * torch.eye(40, dtype=torch.float64)

    def log_evidence(covariance):
        return torch.distributions.MultivariateNormal(torch.zeros(40, dtype=torch.float64), covariance).log_prob(y)

    layer = bp.to_variational(nn.Linear(1, 1, bias=False)).double()
    precision = x.square().sum() / noise**2 + 1 / 0.7**2
    layer.weight.data.fill_(x @ y / noise**2 / precision)
    layer.weight_log_std.data = -0.5 * precision.log().reshape(1, 1)
    expected = log_evidence(eye) - log_evidence(eye + 0.7**2 * x.outer(x))
    found = bp.prune.evidence(layer, priors.Gaussian(0.7))["weight"]
    assert float(found) == pytest.approx(float(expected), abs=1e-5)


def test_tiny_stds_keep_their_digits_and_removed_weights_have_none():
    net = bp.to_variational(nn.Linear(2, 1, bias=False))
    net.weight.data, net.weight_log_std.data = torch.tensor([[1e-7, 1.0]]), torch.full((1, 2), math.log(1e-6))
    found = bp.prune.evidence(net, priors.Gaussian(100.0))["weight"]
    assert float(found[0, 0]) == pytest.approx(math.log(1e8) - 0.005, abs=1e-5)
    net.set_mask("weight", torch.tensor([[False, True]]))
    assert float(bp.prune.evidence(net, priors.Gaussian(100.0))["weight"][0, 0]) == 0


def test_importance_is_what_the_group_costs():
    net = model()
    (group,) = find_groups(net, torch.randn(1, 5)).groups
    weights = bp.prune.evidence(net)
    expected = -(weights["0.weight"].sum(1) + weights["2.weight"].sum(0))
    torch.testing.assert_close(bp.prune.EvidenceImportance()(group.group), expected)
    assert (
        bp.prune.EvidenceImportance()(find_groups(bp.to_deterministic(model()), torch.randn(1, 5)).groups[0].group)
        is None
    )


def test_channels_go_where_the_evidence_says_so():
    net, x = model(), torch.randn(1, 5)
    net[0].weight.data[[1, 4]] *= 1e-3  # channels without signal, on both sides
    net[2].weight.data[:, [1, 4]] *= 1e-3
    importance = bp.prune.EvidenceImportance(priors.Gaussian(0.4))
    (group,) = find_groups(net, x).groups
    assert (importance(group.group) < 0).nonzero().flatten().tolist() == [1, 4]
    report = bp.prune_channels(net, x, target="evidence=0", importance=importance)
    assert report.removed == {"0": (1, 4)}
    assert bp.prune_channels(net, x, target="evidence=0", importance=importance).removed == {}
    harder = bp.prune_channels(model(), x, target="evidence=-1e9", dry_run=True)
    assert harder.removed["0"], "any loss is accepted, down to the floor"


@pytest.mark.parametrize(
    "prior",
    [priors.ARD("weight"), priors.Horseshoe("weight"), priors.Gaussian(centered=True), priors.LogUniform()],
    ids=["ARD", "horseshoe", "MOPED", "improper"],
)
def test_refuses_priors_that_allow_no_comparison(prior):
    with pytest.raises(ValueError, match="the evidence cannot be compared"):
        bp.prune.evidence(model(), prior)
    with pytest.raises(ValueError, match="the evidence cannot be compared"):
        bp.prune.EvidenceImportance(prior)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "evidence=inf"}, "expected a number of nats"),
        ({"target": "evidence=0", "uniform": True}, "criterion of its own"),
        ({"target": "evidence=0", "importance": tp.importance.MagnitudeImportance()}, "criterion of its own"),
    ],
)
def test_refuses_other_options(options, message):
    with pytest.raises(ValueError, match=message):
        bp.prune_channels(model(), torch.randn(1, 5), **options)
