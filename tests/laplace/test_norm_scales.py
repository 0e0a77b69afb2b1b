"""Scales of norms: their stds come from diagonal Laplace posteriors, and a Kronecker-factored one leaves them alone."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.laplace import cross_entropy
from bayesprune.laplace.diagonal import sums_of_squares
from bayesprune.layers import named_posteriors
from tests.cases import NormNet

GAMMAS = ("group.weight", "batch.weight", "layer.weight")


def variational() -> nn.Module:
    torch.manual_seed(0)
    return bp.to_variational(NormNet(), norm_scales=True)


def batch(num_examples: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_examples, 3, 8, 8, generator=generator), torch.randint(3, (num_examples,))


def gamma_stds(net: nn.Module) -> list[Tensor]:
    return [net.get_parameter(f"{name}_log_std").detach().clone() for name in GAMMAS]


def test_a_kronecker_posterior_leaves_them_alone():
    net, loader = variational().train(), [batch()]
    before = gamma_stds(net)
    posterior = bp.laplace.fit_kronecker(net, loader)
    assert posterior.keys() == {"conv", "second", "linear", "head"}
    bp.laplace.set_marginal_stds(net, posterior)
    assert all(map(torch.equal, gamma_stds(net), before))
    bp.prune_weights(net, "weights=0.7")
    bp.laplace.condition_on_zeros(net, posterior)
    compensate = partial(bp.laplace.condition_on_channels, net, posterior)
    bp.prune_channels(net, batch()[0], target="params=0.7", before_cut=compensate)
    assert net.layer.weight_log_std.shape == net.layer.weight.shape


def test_a_diagonal_posterior_has_them():
    net = variational().train()
    before, statistics = gamma_stds(net), copy.deepcopy(dict(net.batch.named_buffers()))
    bp.laplace.fit_laplace(net, [batch()], num_data=1000)
    for now, old in zip(gamma_stds(net), before, strict=True):
        assert now.isfinite().all()
        assert (now != old).all()
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in net.batch.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_squares_are_of_the_gradients_of_examples(dtype):
    """One backward an example, in evaluation mode, though the model is in training."""
    net, (x, y) = variational().to(dtype).train(), batch()
    x = x.to(dtype)
    found, _ = sums_of_squares(net, [(x, y)], loss=lambda model, batch: cross_entropy(model, batch).float())
    net.eval()
    expected = dict.fromkeys(GAMMAS, 0.0)
    for index in range(len(x)):
        net.zero_grad()
        nn.functional.cross_entropy(net(x[index : index + 1]), y[index : index + 1]).backward()
        expected = {name: old + net.get_parameter(name).grad.double().square() for name, old in expected.items()}
    tolerance = 1e-8 if dtype == torch.float64 else 0.1
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * float(value.max()))


def test_a_running_posterior_has_them():
    net = variational()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    posterior = bp.laplace.RunningLaplace(optimizer, net, num_data=100, batch_size=6)
    net(batch()[0]).square().mean().backward()
    optimizer.step()
    before = gamma_stds(net)
    posterior.update()
    assert not any(map(torch.equal, gamma_stds(net), before))
    assert all(p.log_std.isfinite().all() for p in named_posteriors(net))
