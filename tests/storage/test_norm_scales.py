import json

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.layers import variational_layers
from tests.cases import NormNet


@pytest.mark.parametrize("norm_scales", [False, True])
def test_a_model_comes_back_with_the_posteriors_that_it_had(tmp_path, norm_scales):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    net = bp.to_variational(NormNet(), norm_scales=norm_scales)
    net(x)
    bp.prune_channels(net.eval(), x, target="params=0.6")
    bp.save(net, tmp_path)
    recorded = json.loads((tmp_path / "bayesprune.json").read_text())
    assert ("batch" in json.dumps(recorded["spec"]["variational"])) == norm_scales
    again = bp.load(tmp_path, model=NormNet()).eval()
    kinds = [(name, type(layer)) for name, layer in variational_layers(net)]
    assert [(name, type(layer)) for name, layer in variational_layers(again)] == kinds
    assert sum(layer.is_norm for _, layer in variational_layers(again)) == (3 if norm_scales else 0)
    assert torch.equal(again(x), net(x))
    state = net.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    bp.to_deterministic(again)
    assert type(again.batch) is nn.BatchNorm2d
