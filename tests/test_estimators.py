"""Each estimator against a slow form of its equation with the same noise; its distribution is in layers/test_stock."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from bayesprune import estimators
from bayesprune.estimators import Gaussian
from bayesprune.foundation import noise

RANDOM = ("weight_sampling", "flipout", "local_reparameterization")


@pytest.fixture
def recorded(monkeypatch):
    """Every draw of the library, in order."""
    draws = []
    for name in ("normal", "signs"):
        original = getattr(noise, name)

        def draw(*args, _original=original, **kwargs):
            draws.append(_original(*args, **kwargs))
            return draws[-1]

        monkeypatch.setattr(noise, name, draw)
    return draws


def posterior(*shape, dtype=torch.float64) -> Gaussian:
    mean = torch.randn(shape, dtype=dtype, requires_grad=True)
    return Gaussian(mean, torch.rand(shape, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True))


def gradients(output, *posteriors):
    return torch.autograd.grad(output.square().sum(), [tensor for p in posteriors for tensor in p])


def assert_same(output, expected, *posteriors):
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(gradients(output, *posteriors), gradients(expected, *posteriors), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_mean_is_the_operation():
    x, weight, bias = torch.randn(5, 4).double(), posterior(3, 4), posterior(3)
    assert torch.equal(estimators.run("mean", F.linear, x, weight, bias, -1), F.linear(x, weight.mean, bias.mean))
    assert torch.equal(estimators.run("mean", F.linear, x, weight, None, -1), F.linear(x, weight.mean))


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (4,)])
def test_weight_sampling_is_one_draw_for_all(recorded, shape):
    x, weight, bias = torch.randn(shape).double(), posterior(3, 4), posterior(3)
    output = estimators.run("weight_sampling", F.linear, x, weight, bias, -1)
    eps_weight, eps_bias = recorded
    expected = x @ (weight.mean + weight.std * eps_weight).T + bias.mean + bias.std * eps_bias
    assert_same(output, expected, weight, bias)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
def test_flipout_is_a_draw_for_each_example(recorded, shape):
    """W_n = mean + std eps * s_n r_n^T, one for each example, applied example by example."""
    x, weight, bias = torch.randn(shape).double(), posterior(3, 4), posterior(3)
    output = estimators.run("flipout", F.linear, x, weight, bias, -1)
    r, eps_weight, eps_bias, s = recorded
    assert r.numel() == shape[0] * 4
    assert s.numel() == shape[0] * 3
    expected = []
    for x_n, r_n, s_n in zip(x, r.reshape(-1, 4), s.reshape(-1, 3), strict=True):
        weight_n = weight.mean + weight.std * eps_weight * torch.outer(s_n, r_n)
        expected.append(x_n @ weight_n.T + bias.mean + bias.std * eps_bias * s_n)
    assert_same(output, torch.stack(expected), weight, bias)


def test_flipout_of_a_convolution_flips_channels(recorded):
    x, weight, bias = torch.randn(3, 4, 5, 5).double(), posterior(6, 2, 3, 3), posterior(6)

    def operation(x, weight, bias):
        return F.conv2d(x, weight, bias, padding=1, groups=2)

    output = estimators.run("flipout", operation, x, weight, bias, -3)
    r, eps_weight, eps_bias, s = recorded
    assert r.shape == (3, 4, 1, 1)
    assert s.shape == (3, 6, 1, 1)
    expected = []
    for x_n, r_n, s_n in zip(x, r[:, :, 0, 0], s[:, :, 0, 0], strict=True):
        flips = s_n.view(6, 1, 1, 1) * r_n.view(2, 2).repeat_interleave(3, dim=0)[:, :, None, None]
        weight_n = weight.mean + weight.std * eps_weight * flips
        expected.append(operation(x_n[None], weight_n, bias.mean + bias.std * eps_bias * s_n))
    assert_same(output, torch.cat(expected), weight, bias)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)])
def test_local_reparameterization_draws_outputs(recorded, shape):
    x, weight, bias = torch.randn(shape).double(), posterior(3, 4), posterior(3)
    output = estimators.run("local_reparameterization", F.linear, x, weight, bias, -1)
    (eps,) = recorded
    assert eps.shape == output.shape
    expected = torch.empty_like(output)
    for index in itertools.product(*map(range, shape[:-1])):
        variance = (x[index] ** 2 * weight.std**2).sum(-1) + bias.std**2
        expected[index] = x[index] @ weight.mean.T + bias.mean + variance.sqrt() * eps[index]
    assert_same(output, expected, weight, bias)


@pytest.mark.parametrize("name", RANDOM)
def test_two_forwards_before_one_backward(recorded, name):
    """Noise buffers that the second forward overwrites give wrong std gradients."""
    x = torch.randn(2, 3, 4).double()
    weight, bias = posterior(3, 4), posterior(3)
    separate = []
    torch.manual_seed(7)
    for x_i in x:
        separate.append(gradients(estimators.run(name, F.linear, x_i, weight, bias, -1), weight, bias))
    torch.manual_seed(7)
    outputs = torch.stack([estimators.run(name, F.linear, x_i, weight, bias, -1) for x_i in x])
    together = gradients(outputs, weight, bias)
    for got, *parts in zip(together, *separate, strict=True):
        torch.testing.assert_close(got, sum(parts), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_finite_on_zeros(name, dtype):
    weight, bias = posterior(3, 4, dtype=dtype), Gaussian(*(torch.zeros(3, dtype=dtype, requires_grad=True),) * 2)
    output = estimators.run(name, F.linear, torch.zeros(2, 4, dtype=dtype), weight, bias, -1)
    assert output.dtype == dtype
    assert output.abs().max() < 1e-15
    for gradient in torch.autograd.grad(output.sum(), (*weight, bias.mean)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", RANDOM)
def test_small_stds_survive_half_precision(name):
    """A std of 1e-4 squares to 1e-8, which float16 rounds to zero."""
    weight = Gaussian(torch.zeros(50, 4, dtype=torch.float16), torch.full((50, 4), 1e-4))
    output = estimators.run(name, F.linear, torch.ones(20, 4, dtype=torch.float16), weight, None, -1)
    assert output.dtype == torch.float16
    assert output.float().std().item() == pytest.approx(2e-4, rel=0.2)


@pytest.mark.parametrize("name", RANDOM)
def test_autocast(name):
    """Under autocast the output has its dtype, and the noise is that of full precision up to rounding."""
    x, weight, bias = torch.randn(6, 4), posterior(3, 4, dtype=torch.float32), posterior(3, dtype=torch.float32)
    torch.manual_seed(1)
    expected = estimators.run(name, F.linear, x, weight, bias, -1)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        output = estimators.run(name, F.linear, x, weight, bias, -1)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0.1)
    for got, wanted in zip(gradients(output.float(), weight, bias), gradients(expected, weight, bias), strict=True):
        assert got.dtype == torch.float32
        assert (got - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("name", RANDOM)
def test_stds_broadcast(name):
    """The cheap structures give stds of a broadcastable shape: each weight has noise of its own all the same."""
    weight = Gaussian(torch.zeros(3, 400).double(), torch.full((3, 1), 0.5).double().requires_grad_())
    output = estimators.run(name, F.linear, torch.eye(400).double(), weight, None, -1)
    assert output.std().item() == pytest.approx(0.5, rel=0.1)
    assert output.unique().numel() > 600  # flipout shares the size of the noise, not its sign
    (gradient,) = torch.autograd.grad(output.square().sum(), weight.std)
    assert gradient.shape == (3, 1)


def test_check_names_the_estimators():
    assert [estimators.check(name) for name in estimators.ESTIMATORS] == list(estimators.ESTIMATORS)
    with pytest.raises(ValueError, match=r"estimator is 'lrt'; expected one of auto, mean, .*local_reparam"):
        estimators.check("lrt")
