"""`attach` trains gates on the ELBO of spike and slab."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import bayesprune as bp
from bayesprune import gates, priors
from bayesprune.gates.gate import named_gates
from tests.gates.gated_nets import bernoulli_kl, gaussian_kl, residual, spread

PRIOR = priors.Gaussian(0.3)


def gated_residual(*, weights: bool = False):
    model, x = residual()
    gates.add_channel_gates(model, x, prior_inclusion=0.2)
    if weights:
        gates.add_weight_gates(model, prior_inclusion=0.1)
    spread(model.double())
    return model, x


def test_kl_by_hand():
    """Every weight counts as far as both its channels are there; the stream's units that `square` keeps count once."""
    model, _ = gated_residual()
    outer, inner = (gate.logits.sigmoid() for gate in (model.outer.channel_gate, model.inner.channel_gate))
    both = outer[:, None] * outer
    both = torch.where(torch.eye(6, dtype=torch.bool), outer, both)
    factors = {
        "stem": (outer[:, None], outer),
        "square": (both, outer),
        "inner": (inner[:, None] * outer, inner),
        "outer": (outer[:, None] * inner, outer),
        "head": (outer, torch.ones(2)),
    }
    expected = bernoulli_kl(outer, 0.2) + bernoulli_kl(inner, 0.2)
    for name, (weight, bias) in factors.items():
        layer = model.get_submodule(name)
        expected = expected + (weight * gaussian_kl(layer, "weight", 0.3)).sum()
        expected = expected + (bias * gaussian_kl(layer, "bias", 0.3)).sum()
    torch.testing.assert_close(bp.kl_divergence(model, PRIOR), expected, rtol=1e-6, atol=0)


def test_kl_of_gated_convolutions_with_groups():
    torch.manual_seed(3)
    net = bp.to_variational(
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 6, 1, groups=2, bias=False), nn.Conv2d(6, 2, 1))
    )
    gates.add_channel_gates(net, torch.randn(1, 2, 3, 3), prior_inclusion=0.5)
    spread(net)
    probabilities = {name: gate.probabilities for name, gate in named_gates(net)}
    first, second = probabilities["0"].repeat(2), probabilities["1"].repeat(2)
    by_entry = second.view(6, 1) * first.view(2, 1, 2).expand(2, 3, 2).reshape(6, 2)
    expected = sum(bernoulli_kl(p, 0.5) for p in probabilities.values())
    expected = expected + (by_entry[..., None, None] * gaussian_kl(net[1], "weight", 0.3)).sum()
    expected = expected + (first.view(4, 1, 1, 1) * gaussian_kl(net[0], "weight", 0.3)).sum()
    expected = expected + (first * gaussian_kl(net[0], "bias", 0.3)).sum() + gaussian_kl(net[2], "bias", 0.3).sum()
    expected = expected + (second.view(1, 6, 1, 1) * gaussian_kl(net[2], "weight", 0.3)).sum()
    torch.testing.assert_close(bp.kl_divergence(net, PRIOR), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "prior", [PRIOR, priors.ARD("layer"), priors.LogUniform()], ids=lambda prior: type(prior).__name__
)
@pytest.mark.parametrize("weights", [False, True], ids=["channels", "channels_and_weights"])
def test_the_hook_is_the_elbo(prior, weights):
    """Gradients before the step are those of mean NLL + temperature KL / num_data, for means, stds and logits."""
    model, x = gated_residual(weights=weights)
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attachment = bp.attach(optimizer, model, num_data=20, prior=prior, temperature=0.7)
    seen = {}
    attachment._std_optimizer.step = lambda: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    torch.manual_seed(1)
    model(x).square().mean().backward()
    optimizer.step()
    assert all(p.grad is None for name, p in model.named_parameters() if "gate" in name or "log_std" in name)
    torch.manual_seed(1)
    (expected(x).square().mean() + 0.7 / 20 * bp.kl_divergence(expected, prior)).backward()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-6, atol=1e-10, msg=name)


def test_useless_units_go_by_themselves():
    """Of 12 hidden units 2 compute the function and 10 are noise: the gates say so, with no threshold given."""
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    y = torch.relu(x[:, :1]) - torch.relu(x[:, 1:2] + 0.5)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 1))
    first, bias, last = net[0].weight.data, net[0].bias.data, net[2].weight.data
    first[:2], bias[:2], last[:, :2] = torch.eye(4)[:2], torch.tensor([0.0, 0.5]), torch.tensor([1.0, -1.0])
    last[:, 2:] *= 0.1
    bp.to_variational(net, relative_std=0.05)
    gates.add_channel_gates(net, x, lr=0.2)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    bp.attach(optimizer, net, num_data=256, temperature=1.0, prior=priors.Gaussian(0.5))
    for _ in range(100):
        optimizer.zero_grad()
        (mse_loss(net.train()(x), y) / (2 * 0.1**2)).backward()
        optimizer.step()
    assert bp.prune_channels(net, x, target="inclusion=0.5").removed == {"0": tuple(range(2, 12))}
    with torch.no_grad():
        assert float(mse_loss(net.eval()(x), y) / y.var()) < 0.01


def test_resuming_is_not_interrupting():
    def setup():
        model, x = gated_residual(weights=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        return model, x, optimizer, bp.attach(optimizer, model, num_data=20)

    def steps(model, x, optimizer, seed):
        torch.manual_seed(seed)
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(model.train()(x), torch.tensor([0, 1, 0, 1, 0])).backward()
            optimizer.step()

    model, x, optimizer, attachment = setup()
    steps(model, x, optimizer, 1)
    resumed, _, resumed_optimizer, resumed_attachment = setup()
    resumed.load_state_dict(model.state_dict())
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed_attachment.load_state_dict(copy.deepcopy(attachment.state_dict()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps(model, x, optimizer, 2)
    steps(resumed, x, resumed_optimizer, 2)
    for (name, parameter), other in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        assert not torch.equal(parameter, before[name]), f"{name} does not move"
    plain = residual()[0]
    plain_attachment = bp.attach(torch.optim.SGD(plain.parameters(), lr=0.1), plain, num_data=20)
    with pytest.raises(ValueError, match="add the gates of the run that was saved"):
        plain_attachment.load_state_dict(attachment.state_dict())


def test_gates_closed_behind_the_attachments_back():
    model, x = gated_residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bp.attach(optimizer, model, num_data=20)
    gates.close(model)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="gates were added or closed after attach"):
        optimizer.step()


def test_collapse_is_warned_of():
    model, x = gated_residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attachment = bp.attach(optimizer, model, num_data=20, temperature=0.0)
    model.outer.channel_gate.logits.data.fill_(-9.0)
    attachment.step = 99
    model.train()(x).sum().backward()
    with pytest.warns(UserWarning, match="outer: all its gates are closed at step 100"):
        optimizer.step()


def test_draws_follow_the_probability():
    """Hard draws are open with probability pi; five standard errors."""
    model, _ = gated_residual()
    gate = model.outer.channel_gate.train()
    torch.manual_seed(5)
    drawn = torch.stack([gate.draw().detach() for _ in range(4000)])
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    pi = gate.probabilities.detach()
    z = (drawn.mean(0) - pi) / (pi * (1 - pi) / 4000).sqrt()
    assert float(z.abs().max()) < 5, z
