"""An attachment's state survives a file of tensors and a text of JSON, whatever trains beside the stds."""

import json

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune import gates
from bayesprune.priors import ARD, Gaussian, Horseshoe
from bayesprune.train.state import flattened, restored


def attached(prior, gated: bool):
    torch.manual_seed(0)
    model = bp.to_variational(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), std="rank_one")
    x = torch.randn(3, 4)
    if gated:
        gates.add_channel_gates(model, x)
        gates.add_weight_gates(model, lr=0.1)
    if prior == "groups":
        prior = ARD(bp.prune.dependency_groups(model, x))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    attachment = bp.attach(optimizer, model, num_data=10, prior=prior)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return attachment


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("prior", [None, Gaussian(centered=True), Horseshoe(global_scale="auto"), "groups"], ids=str)
def test_a_state_comes_back_from_tensors_and_json(prior, gated):
    state = attached(prior, gated).state_dict()
    assert bool(state["gates"]) == gated
    tensors, outline = flattened(state)
    found = restored({key: value.clone() for key, value in tensors.items()}, json.loads(json.dumps(outline)))
    assert_same(found, state)
    other = attached(prior, gated)
    other.load_state_dict(found)
    assert_same(other.state_dict(), state)


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected
