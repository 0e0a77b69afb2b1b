"""Small mixtures of experts whose matrices stand in stacked parameters, in the arrangements that are in use."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HIDDEN, EXPERTS = 6, 16, 3


class Experts(nn.Module):
    """Experts of WIDTH inputs, HIDDEN units and WIDTH outputs, run one by one on all rows."""

    def __init__(self, *, fused: bool, transposed: bool, interleaved: bool, gated: bool = True, bias: bool = False):
        super().__init__()
        self.intermediate_size, self.num_experts = HIDDEN, EXPERTS
        self.fused, self.transposed, self.interleaved, self.gated, self.bias = (
            fused,
            transposed,
            interleaved,
            gated,
            bias,
        )
        ups = {"gate_up_proj": 2} if fused else {"gate_proj": 1, "up_proj": 1} if gated else {"up_proj": 1}
        for name, each in ups.items():
            self._add(name, each * HIDDEN, WIDTH)
        self._add("down_proj", WIDTH, HIDDEN)

    def _add(self, name: str, rows: int, columns: int) -> None:
        size = (columns, rows) if self.transposed else (rows, columns)
        self.register_parameter(name, nn.Parameter(torch.randn(EXPERTS, *size) / columns**0.5))
        if self.bias:
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, rows)))

    def _linear(self, x: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        weight = getattr(self, name)[expert]
        bias = getattr(self, f"{name}_bias")[expert] if self.bias else None
        return F.linear(x, weight.t() if self.transposed else weight, bias)

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(x)
        for expert in range(self.num_experts):
            if self.fused:
                both = self._linear(x, "gate_up_proj", expert)
                gate, up = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, -1)
                hidden = gate.sigmoid() * up
            elif self.gated:
                hidden = self._linear(x, "gate_proj", expert).sigmoid() * self._linear(x, "up_proj", expert)
            else:
                hidden = self._linear(x, "up_proj", expert).relu()
            output = output + weights[:, expert, None] * self._linear(hidden, "down_proj", expert)
        return output


class Mixture(nn.Module):
    """A layer, experts with a router beside it, a layer."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.first, self.router, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 5)
        self.experts = Experts(**options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).tanh()
        return self.last(x + self.experts(x, self.router(x).softmax(-1)))


def of_dense_router(dense: Mixture, experts: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What experts give for the rows, and by the router, of the dense model."""
    x = dense.first(x).tanh()
    return experts(x, dense.router(x).softmax(-1))


@dataclass(frozen=True)
class Arrangement:
    """A way in which experts are held, by name."""

    name: str
    options: dict[str, bool]

    def __str__(self) -> str:
        return self.name

    def build(self) -> Mixture:
        torch.manual_seed(0)
        return Mixture(**self.options).eval()


ARRANGEMENTS = [
    Arrangement("fused", {"fused": True, "transposed": False, "interleaved": False}),
    Arrangement("fused_transposed", {"fused": True, "transposed": True, "interleaved": False}),
    Arrangement("interleaved_biases", {"fused": True, "transposed": True, "interleaved": True, "bias": True}),
    Arrangement("gate_apart", {"fused": False, "transposed": False, "interleaved": False, "bias": True}),
    Arrangement("no_gate", {"fused": False, "transposed": False, "interleaved": False, "gated": False}),
]
