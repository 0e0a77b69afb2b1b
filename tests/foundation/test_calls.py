import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayesprune.foundation.model import layers_called


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
