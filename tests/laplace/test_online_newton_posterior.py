import copy

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.laplace import online_newton_posterior
from bayesprune.train import OnlineNewton
from tests.cases import structures


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))


def trained() -> tuple[nn.Module, OnlineNewton]:
    model = net()
    optimizer = OnlineNewton(model.parameters(), 0.1, num_data=100, betas=(0.9, 0.5))
    for _ in range(3):
        optimizer.zero_grad()
        with optimizer.sampled(model):
            model(torch.randn(5, 1, 3, 3)).square().mean().backward()
        optimizer.step()
    return model, optimizer


class IVON(torch.optim.Optimizer):
    """What `ivon.IVON` shows of itself: a flat `hess` in each group, no state by parameter."""

    def __init__(self, params, *, ess, hess_init=1.0, weight_decay=1e-4):
        super().__init__(params, {"ess": ess, "hess_init": hess_init, "weight_decay": weight_decay})
        for group in self.param_groups:
            group["hess"] = torch.full((sum(p.numel() for p in group["params"]),), hess_init)


@structures
def test_stds_are_those_of_the_optimizer(std):
    model, optimizer = trained()
    means = copy.deepcopy(dict(model.named_parameters()))
    assert online_newton_posterior(bp.to_variational(model, std=std), optimizer) is model
    for layer in (model[0], model[3]):
        for name in ("weight", "bias"):
            precision = optimizer.precision(getattr(layer, name))
            scaled = (2 * layer.log_std(name)).exp() * precision
            if std == "per_weight" or name == "bias":
                torch.testing.assert_close(scaled, torch.ones_like(scaled), rtol=1e-5, atol=0)
            else:
                torch.testing.assert_close(scaled.flatten(1).mean(1), torch.ones(len(scaled)), rtol=1e-4, atol=0)
    assert all(torch.equal(p, means[name]) for name, p in model.named_parameters() if name in means)


def test_stds_of_ivon_by_group():
    model = bp.to_variational(net())
    conv, norm, linear = list(model[0].parameters())[:2], list(model[1].parameters()), [model[3].bias, model[3].weight]
    optimizer = IVON([{"params": conv + norm}, {"params": linear, "weight_decay": 0.5}], ess=1000)
    for group in optimizer.param_groups:
        group["hess"] = torch.rand(len(group["hess"]))
    expected = {
        model[0].weight: optimizer.param_groups[0]["hess"][:12].view(3, 1, 2, 2) + 1e-4,
        model[0].bias: optimizer.param_groups[0]["hess"][12:15] + 1e-4,
        model[3].bias: optimizer.param_groups[1]["hess"][:2] + 0.5,
        model[3].weight: optimizer.param_groups[1]["hess"][2:].view(2, 12) + 0.5,
    }
    online_newton_posterior(model, optimizer)
    for layer in (model[0], model[3]):
        for name in ("weight", "bias"):
            std = layer.posteriors()[name].std
            torch.testing.assert_close(std, (1000 * expected[getattr(layer, name)]).rsqrt(), rtol=1e-5, atol=0)


def test_what_does_not_fit_is_refused():
    model, optimizer = trained()
    with pytest.raises(ValueError, match="no variational layer"):
        online_newton_posterior(model, optimizer)
    bp.to_variational(model)
    with pytest.raises(TypeError, match="SGD has no hess, ess.*OnlineNewton or ivon"):
        online_newton_posterior(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for kind in (lambda p: OnlineNewton(p, 0.1, num_data=10), lambda p: IVON(p, ess=10)):
        with pytest.raises(ValueError, match=r"has taken no step on 0.weight, 0.bias, 3.weight, ... \(4\)"):
            online_newton_posterior(model, kind(model.parameters()))
        with pytest.raises(ValueError, match=r"does not hold 0.weight, 0.bias \(2\) of the model's 4"):
            online_newton_posterior(model, kind(model[3].parameters()))
    ivon = IVON(model[3].parameters(), ess=10)
    ivon.param_groups[0]["hess"] = torch.rand(3)
    with pytest.raises(ValueError, match=r"hess of shape \(3,\) for 4 parameters of 52 entries"):
        online_newton_posterior(model, ivon)
    model[3].weight.data = model[3].weight.data[:, :6]
    with pytest.raises(ValueError, match=r"shape \(2, 12\) for 3.weight, which has shape \(2, 6\)"):
        online_newton_posterior(model, optimizer)
