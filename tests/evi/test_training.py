"""The paper's loss: its formulas, that it trains, and the loop that compresses."""

import math

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune import evi

# torch's own table of forward derivatives, which first-order moments use, is loaded with it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


def net(kernels: int = 6) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, kernels, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(kernels * 9, 3)
    )


def images(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three kinds of stripes in noise."""
    labels = torch.arange(num) % 3
    grid = torch.arange(8.0)
    kinds = torch.stack([grid.expand(8, 8), grid.expand(8, 8).T, grid + grid.unsqueeze(1)])
    clean = torch.sin(2.1 * kinds[labels] + 6.28 * torch.rand(num, 1, 1))
    return (clean + 0.3 * torch.randn(num, 8, 8)).unsqueeze(1), labels


def test_gaussian_nll_is_its_formula():
    torch.manual_seed(0)
    root = torch.randn(5, 4, 4, dtype=torch.float64)
    covariance, mean = root @ root.transpose(1, 2), torch.rand(5, 4, dtype=torch.float64)
    target = torch.tensor([0, 3, 1, 1, 2])
    full = covariance + 1e-3 * torch.eye(4, dtype=torch.float64)
    residual = torch.eye(4, dtype=torch.float64)[target] - mean
    expected = 0.5 * torch.einsum("nc,ncd,nd->n", residual, full.inverse(), residual) + 0.5 * full.det().log()
    torch.testing.assert_close(evi.gaussian_nll(mean, covariance, target), expected, rtol=1e-10, atol=1e-10)


def test_gaussian_nll_of_a_certain_hit_is_the_ridge():
    found = evi.gaussian_nll(torch.eye(4), torch.zeros(4, 4, 4), torch.arange(4))
    torch.testing.assert_close(found, torch.full((4,), 2 * math.log(1e-3)))


def test_gradients_of_the_loss_agree_with_finite_differences():
    torch.manual_seed(0)
    model = evi.convert(net(2)).double()
    x, y = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 2])
    for covariance in ("spatial", "diagonal"):
        for name in ("0.weight", "0.weight_log_std", "4.weight_log_std"):
            value = model.get_parameter(name)
            gradient = torch.autograd.grad(evi.loss(model, x, y, covariance=covariance), value)[0]
            direction, step = torch.randn_like(value), 1e-4
            ends = []
            for sign in (1, -1):
                value.data += sign * step * direction
                ends.append(evi.loss(model, x, y, covariance=covariance).item())
                value.data -= sign * step * direction
            numeric = (ends[0] - ends[1]) / (2 * step)
            assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=1e-3), (covariance, name)


def test_gaussian_kl_is_that_of_the_library_on_the_weights():
    model = bp.to_variational(net(), std="per_channel")
    bias = model[4]
    expected = bp.kl_divergence(model, bp.priors.Gaussian(1.0))
    of_bias = bp.priors.BoundGaussian(1.0).kl(bias.bias, bias.bias_log_std)
    torch.testing.assert_close(evi.gaussian_kl(model), expected - of_bias)


def test_published_kl_is_the_formula_of_the_code():
    model = evi.convert(net())
    total = 0.0
    for layer in (model[0], model[4]):
        n, s = layer.weight[0].numel(), layer.weight_log_std.flatten().exp().square()
        total += -0.5 * (n + n * s.log() - layer.weight.abs().sum() - n * s).mean()
    torch.testing.assert_close(evi.published_kl(model), total)


def test_both_kls_are_defined_where_weights_were_removed():
    model = bp.to_variational(net())
    bp.prune_weights(model, "weights=0.5")
    for kl in (evi.gaussian_kl, evi.published_kl):
        assert torch.isfinite(kl(model))


def test_biases_are_certain():
    model = evi.convert(net())
    x = torch.rand(2, 1, 8, 8)
    before = evi.propagate(model, x, covariance="diagonal").covariance
    bias = model[4].bias_log_std
    assert not bias.requires_grad
    bias.data.fill_(-40.0)
    torch.testing.assert_close(evi.propagate(model, x, covariance="diagonal").covariance, before, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("covariance", ["diagonal", "spatial"])
def test_covariance_of_the_probabilities_is_one(covariance):
    torch.manual_seed(0)
    found = evi.propagate(evi.convert(net()).double(), torch.rand(3, 1, 8, 8).double(), covariance=covariance)
    torch.testing.assert_close(found.mean.sum(1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(found.covariance, found.covariance.transpose(1, 2))
    assert float(found.covariance.detach().sum(2).abs().max()) < 1e-12
    assert float(torch.linalg.eigvalsh(found.covariance.detach()).min()) > -1e-12


def test_refuses_unknown_covariance():
    with pytest.raises(ValueError, match="expected"):
        evi.propagate(evi.convert(net()), torch.rand(1, 1, 8, 8), covariance="full")


@pytest.mark.parametrize("covariance", ["diagonal", "spatial"])
def test_trains_and_compresses(covariance):
    torch.manual_seed(0)
    model = evi.convert(net(12))
    x, y = images(300)
    held_out = images(300)

    def train(candidate):
        optimizer = torch.optim.Adam([p for p in candidate.parameters() if p.requires_grad], lr=1e-2)
        for step in range(60):
            batch = slice(50 * (step % 6), 50 * (step % 6) + 50)
            optimizer.zero_grad()
            evi.loss(candidate, x[batch], y[batch], covariance=covariance).backward()
            optimizer.step()

    def evaluate(candidate):
        with torch.no_grad():
            return float((candidate.eval()(held_out[0]).argmax(1) == held_out[1]).double().mean())

    assert evaluate(model) < 0.7
    found = evi.self_compress(model, x[:1], train=train, evaluate=evaluate, tolerance=0.05, step=0.5, min_step=0.3)
    assert evaluate(model) > 0.95
    assert model[0].out_channels == 12
    assert found.model[0].out_channels <= 6
    assert found.model[0].weight_log_std.shape == (found.model[0].out_channels, 1, 1, 1)
    assert evaluate(found.model) >= evaluate(model) - 0.05


def test_kernel_norm_ranks_by_the_mean_kernel():
    model = evi.convert(net(8))
    model[0].weight.data *= torch.arange(1.0, 9.0).reshape(-1, 1, 1, 1) / model[0].weight.flatten(1).norm(
        dim=1
    ).reshape(-1, 1, 1, 1)
    report = bp.prune_channels(model, torch.rand(1, 1, 8, 8), target="macs=0.5", importance=evi.kernel_norm)
    assert report.removed == {"0": (0, 1, 2, 3)}
    torch.testing.assert_close(model[0].weight.flatten(1).norm(dim=1), torch.arange(5.0, 9.0))
