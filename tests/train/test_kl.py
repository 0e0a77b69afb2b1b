import copy
import math

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.layers import named_posteriors
from bayesprune.priors import ARD, Gaussian, LogUniform
from bayesprune.train.kl import bind_prior
from tests.cases import layers, structures
from tests.oracles import gaussian_kl


@structures
@layers
def test_default_prior_is_a_gaussian_at_the_layers_rms(case, std):
    """Against torch.distributions, weight by weight."""
    layer = bp.to_variational(case.layer(), std=std).double()
    with torch.no_grad():
        for part in [part for name in layer.active_names() for part in layer.log_std_parts(name)]:
            part += torch.randn_like(part)
    expected = 0.0
    weight_rms = layer.weight.detach().square().mean().sqrt()
    for name, (mean, std_) in layer.posteriors().items():
        own_rms = mean.detach().square().mean().sqrt()
        scale = weight_rms if name == "weight" else torch.maximum(own_rms, weight_rms)
        expected += gaussian_kl(mean.detach(), std_.detach(), scale).sum()
    assert bp.kl_divergence(layer).item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("prior", [Gaussian(), Gaussian(0.2), ARD("channel"), LogUniform()], ids=repr)
@structures
def test_kl_is_differentiable_like_its_closed_form(prior, std):
    model = bp.to_variational(nn.Sequential(nn.Conv1d(2, 3, 2), nn.Linear(4, 2)), std=std).double()
    kl = bp.kl_divergence(model, prior)
    kl.backward()
    for posterior, bound in bind_prior(model, prior).items():
        mean_gradient, std_gradient = bound.kl_gradient(posterior.mean.detach(), posterior.log_std.detach())
        torch.testing.assert_close(posterior.mean.grad, mean_gradient, rtol=1e-9, atol=1e-12)
        for part in posterior.log_std_parts:
            torch.testing.assert_close(part.grad, std_gradient.sum_to_size(part.shape), rtol=1e-9, atol=1e-12)


def test_shared_and_tied_weights_count_once():
    shared = nn.Linear(4, 4)
    model = bp.to_variational(nn.Sequential(shared, nn.Tanh(), shared))
    assert len(list(named_posteriors(model))) == 2
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    bp.to_variational(tied)
    assert [posterior.name for posterior in named_posteriors(tied)] == ["0.weight"]
    torch.testing.assert_close(bp.kl_divergence(tied), bp.kl_divergence(tied[1]))


@pytest.mark.parametrize(
    "prior", [Gaussian(), Gaussian(0.2), Gaussian(0.2, centered=True), ARD("layer"), ARD(), LogUniform()], ids=repr
)
def test_removed_weights_do_not_count(prior):
    """Half the inputs gone: the KL is that of a layer that never had them."""
    layer = nn.Linear(8, 3)
    small = nn.Linear(4, 3)
    small.weight.data, small.bias.data = layer.weight.data[:, :4].clone(), layer.bias.data.clone()
    for module in (layer, small):
        bp.to_variational(module)
        module.weight_log_std.data.fill_(-3.0)
        module.bias_log_std.data.fill_(-3.0)
    layer.set_mask("weight", torch.arange(8).expand(3, 8) < 4)
    torch.testing.assert_close(bp.kl_divergence(layer, prior), bp.kl_divergence(small, prior))


def test_a_layer_without_weights_left_has_a_finite_kl():
    layer = bp.to_variational(nn.Linear(4, 3))
    layer.set_mask("weight", torch.zeros(3, 4, dtype=torch.bool))
    for prior in (Gaussian(), ARD(), ARD("weight"), LogUniform()):
        assert bp.kl_divergence(layer, prior).isfinite()


def test_zero_weights_take_the_fan_in_for_a_scale():
    layer = nn.Linear(16, 3)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    bp.to_variational(layer)
    bound = {posterior.parameter: prior for posterior, prior in bind_prior(layer, Gaussian()).items()}
    assert bound["weight"].scale == bound["bias"].scale == pytest.approx(0.25)


def test_kl_follows_the_stds():
    layer = bp.to_variational(nn.Linear(4, 3))
    before = bp.kl_divergence(layer).item()
    layer.weight_log_std.data -= 1
    difference = bp.kl_divergence(layer).item() - before
    variance = float((2 * (layer.weight_log_std.data[0, 0] + 1)).exp() / layer.weight.detach().square().mean())
    assert difference == pytest.approx(12 * (1 - 0.5 * variance * (1 - math.exp(-2))), rel=1e-3)


def test_a_model_without_posteriors_is_refused():
    with pytest.raises(ValueError, match="no variational layer; call to_variational first"):
        bp.kl_divergence(nn.Linear(2, 2))


def test_conversion_back_and_forth_keeps_the_kl():
    model = bp.to_variational(nn.Linear(5, 4))
    again = bp.to_variational(bp.to_deterministic(copy.deepcopy(model)))
    assert torch.equal(bp.kl_divergence(model), bp.kl_divergence(again))


def test_a_std_rests_where_curvature_and_prior_balance():
    """1 / std^2 = curvature * num_data / temperature + 1 / prior std^2: there the objective has no slope."""
    torch.manual_seed(0)
    layer = bp.to_variational(nn.Linear(5, 3, bias=False))
    curvature, num_data, temperature, prior = torch.rand(3, 5) + 0.1, 1_000, 10.0, bp.priors.Gaussian(0.3)
    layer.weight_log_std.data = (curvature * num_data / temperature + 0.3**-2).rsqrt().log()

    def slope():
        loss = (0.5 * curvature * (2 * layer.weight_log_std).exp()).sum()  # what noise adds to a quadratic loss
        objective = loss + temperature / num_data * bp.kl_divergence(layer, prior)
        return torch.autograd.grad(objective, layer.weight_log_std)[0]

    assert slope().abs().max() < 1e-6
    layer.weight_log_std.data += 0.1
    assert slope().min() > 1e-4
