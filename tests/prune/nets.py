"""Small nets with every kind of layer whose channels can go, and a check that stds and masks followed their means."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesprune.layers import variational_layers
from bayesprune.prune.graph.find import find_groups
from bayesprune.prune.graph.removal import remove
from bayesprune.prune.graph.trials import silence


@dataclass(frozen=True)
class NetCase:
    """A net, an input shape, and, for each layer that may be a root, the modules that put out its channels."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    gates: dict[str, tuple[str, ...]]

    def net(self) -> nn.Module:
        torch.manual_seed(3)
        net = self.build()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):  # an activation of zero must not be what a removed channel gives
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
        return net

    def input(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(4))


def _head(channels: int, outputs: int = 5) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs)


NETS = [
    NetCase(
        "dense",
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()),
            nn.Linear(6 * 9, 5),
        ),
        (2, 3, 8, 8),
        {"0": ("2",), "3": ("5",)},
    ),
    NetCase(
        "grouped",
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.ReLU()),
            *(nn.Conv2d(12, 18, 3, groups=3), nn.BatchNorm2d(18), nn.ReLU()),
            nn.Conv2d(18, 4, 1),
            *_head(4),
        ),
        (2, 3, 5, 5),
        {"0": ("2",), "3": ("5",), "6": ("6",)},
    ),
    NetCase(
        "depthwise",
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU()),
            nn.Conv2d(8, 6, 1),
            *_head(6),
        ),
        (2, 3, 5, 5),
        {"0": ("2", "5"), "3": ("2", "5"), "6": ("6",)},
    ),
    NetCase(
        "transposed",
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.ConvTranspose2d(6, 7, 2, stride=2), nn.BatchNorm2d(7), nn.ReLU()),
            *(nn.ConvTranspose2d(7, 7, 2, groups=7), nn.ReLU()),
            nn.Conv2d(7, 4, 1),
            *_head(4),
        ),
        (2, 3, 4, 4),
        {"0": ("2",), "3": ("5", "7"), "6": ("5", "7"), "8": ("8",)},
    ),
    NetCase(
        "linear",
        lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.PReLU(10), nn.Linear(10, 3)),
        (2, 6),
        {"0": ("1",), "2": ("3",)},
    ),
]
nets = pytest.mark.parametrize("case", NETS, ids=lambda case: case.name)


def tie_means_to_stds(model: nn.Module) -> None:
    """Random log stds, a fifth of the weights masked, and means that repeat their log stds entry by entry."""
    generator = torch.Generator().manual_seed(5)
    for _, layer in variational_layers(model):
        for name in layer.active_names():
            for part in layer.log_std_parts(name):
                part.data = -1 - torch.rand(part.shape, generator=generator)
            mean = getattr(layer, name)
            mean.data = layer.log_std(name).detach().expand_as(mean).clone()
        keep = torch.rand(layer.weight.shape, generator=generator) > 0.2
        layer.set_mask("weight", keep)


def assert_stds_follow(model: nn.Module) -> None:
    """The opposite of `tie_means_to_stds`: every mean still stands beside its own std and mask."""
    for name, layer in variational_layers(model):
        for key in layer.active_names():
            mean, mask = getattr(layer, key), layer.mask(key)
            log_std = layer.log_std(key).expand_as(mean)
            if mask is None:
                assert torch.equal(mean, log_std), f"{name}.{key}"
            else:
                assert torch.equal(mask, mean != 0), f"{name}.{key}"
                assert torch.equal(mean[mask], log_std[mask]), f"{name}.{key}"


def units(net: nn.Module, x: Any) -> dict[str, int]:
    """How many units each group has."""
    return {group.name: len(group.units) for group in find_groups(net, x).groups}


def assert_removing_is_silencing(net: nn.Module, x: Any) -> None:
    """Every second channel of every group, which no norm counts."""
    selection = [(group, group.units[::2]) for group in find_groups(net, x).groups]
    net.eval()
    undo = remove(net, selection)
    found = net(x)
    undo()
    for group, gone in selection:
        silence(net, group, gone)
    torch.testing.assert_close(found, net(x), rtol=1e-4, atol=1e-5)
    assert found.abs().max() > 1e-3
