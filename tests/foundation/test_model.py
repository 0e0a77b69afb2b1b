"""A model run and held in a mode: values put back into modules with a version, and layers called by a function."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

import bayesprune as bp
from bayesprune.foundation.model import layers_called, load_values


class Versioned(nn.Linear):
    """Doubles what an earlier version wrote, as layers do that changed what their weights mean."""

    _version = 3

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *arguments):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)
        if local_metadata.get("version", 1) < 3:
            with torch.no_grad():
                self.weight.mul_(2)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Versioned(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()


def test_saved_and_loaded(tmp_path):
    model = net()
    bp.save(model, tmp_path)
    loaded = bp.load(tmp_path, model=net())
    assert torch.equal(loaded[0].weight, model[0].weight)


def test_variational_saved_and_loaded(tmp_path):
    model = bp.to_variational(net())
    bp.save(model, tmp_path)
    loaded = bp.load(tmp_path, model=net())
    assert torch.equal(loaded[0].weight, model[0].weight)


def test_rewound():
    model = bp.to_variational(net())
    early = copy.deepcopy(model.state_dict())
    bp.prune.discover_mask(model, "weights=0.5", train=lambda *_: None, rounds=1, rewind=early)
    kept = model[0].weight_mask
    assert torch.equal(model[0].weight[kept], early["0.weight"][kept])


def test_checkpoint_of_the_loader_task():
    pytest.importorskip("accelerate")
    from bayesprune.app.tasks.loop import _restore

    model = net()
    _restore(model, tree_map(torch.clone, dict(net().state_dict())))
    assert torch.equal(model[0].weight, net()[0].weight)


def test_an_earlier_version_that_the_values_name_is_converted():
    model, state = net(), net().state_dict()
    state._metadata["0"]["version"] = 2
    load_values(model, state)
    assert torch.equal(model[0].weight, 2 * net()[0].weight)


def test_mnasnet_of_torchvision(tmp_path):
    models = pytest.importorskip("torchvision.models")
    model = models.mnasnet0_5(num_classes=3).eval()
    bp.save(model, tmp_path)
    state = bp.load(tmp_path, model=models.mnasnet0_5(num_classes=3)).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Functional(nn.Module):
    """A layer that is called, and three whose weights a function is given."""

    def __init__(self):
        super().__init__()
        self.called, self.fc, self.bare, self.conv = (
            nn.Linear(4, 4),
            nn.Linear(4, 6),
            nn.Linear(6, 5),
            nn.Conv1d(1, 2, 3),
        )

    def forward(self, x):
        x = F.linear(input=self.called(x), weight=self.fc.weight, bias=self.fc.bias * 2)
        x = F.linear(x, self.bare.weight)
        return F.conv1d(x[:, None], self.conv.weight, self.conv.bias, padding=1)


def test_functions_run_as_calls_of_their_layers():
    net, x = Functional(), torch.randn(3, 4)
    expected, calls = net(x), []
    for name, layer in net.named_children():
        layer.register_forward_hook(lambda layer, args, output, name=name: calls.append((name, output)))
    with layers_called(net), layers_called(net):
        found = net(x)
    assert torch.equal(found, expected)
    assert [name for name, _ in calls] == ["called", "fc", "bare", "conv"]
    assert torch.equal(calls[-1][1], expected)


def test_nothing_is_left_behind():
    net = Functional()
    before = [dict(vars(module)) for module in net.modules()]
    with layers_called(net):
        net(torch.randn(3, 4))
        with pytest.raises(RuntimeError):
            net(torch.randn(3, 5))
        net(torch.randn(3, 4))
    assert [vars(module).keys() for module in net.modules()] == [state.keys() for state in before]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
