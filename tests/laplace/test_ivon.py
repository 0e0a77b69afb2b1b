import copy

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.laplace import ivon_posterior
from tests.cases import structures


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
