"""Gated nets, and KLs written out by hand."""

import math

import torch
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.gates.gate import named_gates
from bayesprune.layers import VariationalLayer


class Residual(nn.Module):
    """A stream that blocks read from and add to: its gates stand on both sides of `square`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.square, self.head = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.inner, self.outer = nn.Linear(6, 4), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = x + self.square(x)
        return self.head(x + self.outer(torch.relu(self.inner(x))))


def residual() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(11)
    return bp.to_variational(Residual().double()).double(), torch.randn(5, 3, dtype=torch.float64)


def spread(model: nn.Module) -> None:
    """Logits of all sizes, away from zero, some of every gate closed."""
    generator = torch.Generator().manual_seed(12)
    for _, gate in named_gates(model):
        drawn = torch.randn(gate.logits.shape, dtype=gate.logits.dtype, generator=generator)
        gate.logits.data.copy_(1.5 * drawn + 0.1 * drawn.sign())
        gate.logits.data.view(-1)[:2] = torch.tensor([-0.7, 0.8], dtype=gate.logits.dtype)


def bernoulli_kl(probability: Tensor, prior: float) -> Tensor:
    """KL of Bernoullis from one prior, summed."""
    odds = probability * (probability / prior).log()
    return (odds + (1 - probability) * ((1 - probability) / (1 - prior)).log()).sum()


def gaussian_kl(layer: VariationalLayer, name: str, scale: float) -> Tensor:
    """KL of each weight of a parameter from N(0, scale^2)."""
    mean, log_std = getattr(layer, name), layer.log_std(name)
    return 0.5 * ((mean**2 + (2 * log_std).exp()) / scale**2 - 1) - log_std + math.log(scale)
