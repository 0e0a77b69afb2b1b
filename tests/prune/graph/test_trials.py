"""What stands for a model without channels before they go: one that reads zeros in their place."""

import torch
from torch import nn

from tests.prune.nets import assert_removing_is_silencing, units


class Gated(nn.Module):
    """Channels that a parameter reads, as the query of an additive attention is read."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.gate, self.read = nn.Linear(6, 8), nn.Parameter(torch.randn(8, 1)), nn.Linear(8, 5)

    def forward(self, x):
        query = self.query(x)
        return self.read(query * (query @ self.gate))


def test_parameters_that_read_channels_read_zeros_too():
    torch.manual_seed(0)
    net, x = Gated(), torch.randn(3, 4, 6)
    assert units(net, x) == {"query": 8}
    assert_removing_is_silencing(net, x)
