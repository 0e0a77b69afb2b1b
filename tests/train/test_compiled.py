"""A compiled model that is trained with an attachment: one graph, made once."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import bayesprune as bp

ROWS = [
    ("per_channel", "weight_sampling"),
    ("per_weight", "weight_sampling"),
    ("per_channel", "local_reparameterization"),
    ("rank_one", "local_reparameterization"),
    ("per_weight", "local_reparameterization"),
]


@pytest.mark.parametrize(("std", "estimator"), ROWS)
def test_no_graph_break_and_no_recompilation_after_the_second_step(std, estimator):
    torch.compiler.reset()
    counters.clear()
    layers = [
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.Linear(8, 3),
    ]
    model = bp.to_variational(nn.Sequential(*layers), std=std, estimator=estimator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    attachment = bp.attach(optimizer, model, num_data=100)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 2, 4, 4)
    before, outputs = [parameter.detach().clone() for parameter in model.parameters()], []

    def step():
        optimizer.zero_grad()
        outputs.append(compiled(x))
        outputs[-1].square().sum().backward()
        optimizer.step()

    step()
    step()
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(6):
            step()
    assert counters["stats"]["unique_graphs"] == graphs <= 2
    assert not counters["graph_break"]
    assert attachment.step == 8
    assert not torch.equal(outputs[-1], outputs[-2])
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        assert parameter.isfinite().all(), name
        assert not torch.equal(parameter, old), name
