"""Blocks of gates as one choice among patterns."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

import bayesprune as bp
from bayesprune import gates
from bayesprune.foundation.target import Target
from bayesprune.gates.density import hold
from bayesprune.gates.gate import GateOptions, WeightGate
from bayesprune.gates.patterns import inclusion_in_blocks, patterns

TEMPERATURE = 0.5
OPTIONS = GateOptions(0.01, 0.99, TEMPERATURE, 0.05)
kinds = pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8), (1, 8)])


def block_logits(m, num_blocks=5):
    return 1.5 * torch.randn(num_blocks, m, dtype=torch.float64, generator=torch.Generator().manual_seed(m))


def masks_of(n, m):
    found = patterns(n, m)
    assert found is not None
    return found.double()


def brute_force(logits, n):
    """Independent Bernoullis over all 2^M outcomes, given that N of them are 1."""
    found = []
    for block in logits.sigmoid():
        outcomes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(block))), dtype=logits.dtype)
        weights = (outcomes * block + (1 - outcomes) * (1 - block)).prod(1) * (outcomes.sum(1) == n)
        found.append(weights @ outcomes / weights.sum())
    return torch.stack(found)


def pattern_gate(logits, target, input_dim=-1):
    goal = Target.parse(target, ("N:M",), "test")
    gate = WeightGate(logits, OPTIONS, goal, input_dim).double()
    gate.logits.data.copy_(logits)
    return gate


@kinds
def test_the_patterns_of_a_block(n, m):
    masks = masks_of(n, m)
    assert masks.shape == (math.comb(m, n), m) == masks.unique(dim=0).shape
    assert (masks.sum(1) == n).all()
    assert patterns(8, 16) is None


@kinds
def test_inclusion_is_that_of_independent_gates_given_how_many_are_open(n, m):
    logits = block_logits(m)
    found = inclusion_in_blocks(logits, masks_of(n, m))
    torch.testing.assert_close(found, brute_force(logits, n))
    torch.testing.assert_close(found.sum(1), torch.full((5,), float(n), dtype=torch.float64))
    torch.testing.assert_close(inclusion_in_blocks(logits - 3, masks_of(n, m)), found)


@kinds
def test_its_gradient_against_finite_differences(n, m):
    logits = block_logits(m, 2).requires_grad_()
    assert gradcheck(lambda x: inclusion_in_blocks(x, masks_of(n, m)), logits)


@pytest.mark.parametrize(("shape", "input_dim"), [((3, 8), -1), ((3, 8, 2, 2), 1), ((8, 3), 0)], ids=str)
def test_a_gate_decides_for_the_most_probable_pattern_with_the_gradient_of_its_block(shape, input_dim):
    gate = pattern_gate(torch.randn(shape, generator=torch.Generator().manual_seed(3)), "2:4", input_dim)
    expected = gate.probabilities.detach()
    hold([gate], 1.0)
    torch.testing.assert_close(gate.probabilities.detach(), expected)
    blocks = gate.logits.detach().movedim(input_dim, -1).reshape(-1, 4)
    masks = masks_of(2, 4)
    likeliest = masks[(blocks @ masks.mT).argmax(1)]
    drawn = gate.train().draw()
    assert torch.equal(drawn.detach(), gate.eval().draw())
    assert torch.equal(drawn.detach().movedim(input_dim, -1).reshape(-1, 4), likeliest)

    direction = torch.randn(blocks.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (drawn.movedim(input_dim, -1).reshape(-1, 4) * direction).sum().backward()
    probabilities = ((blocks / TEMPERATURE) @ masks.mT).softmax(1)
    inclusion = probabilities @ masks
    together = torch.einsum("bp,pi,pj->bij", probabilities, masks, masks)
    covariance = together - inclusion[:, :, None] * inclusion[:, None]
    found = gate.logits.grad.movedim(input_dim, -1).reshape(-1, 4)
    torch.testing.assert_close(found, (covariance @ direction[..., None])[..., 0] / TEMPERATURE)


def test_with_too_many_patterns_each_gate_decides_by_itself():
    gate = pattern_gate(torch.linspace(-2, 2, 32).view(2, 16), "8:16")
    assert gate.masks is None
    torch.testing.assert_close(gate.probabilities, gate.logits.sigmoid())
    hold([gate], 1.0)
    assert (gate.is_open.sum(1) == 8).all()


def test_probabilities_of_a_model_and_its_state():
    model = gates.add_weight_gates(bp.to_variational(nn.Sequential(nn.Conv2d(8, 4, 3))), "2:4")
    (probabilities,) = gates.inclusion_probabilities(model).values()
    torch.testing.assert_close(probabilities, torch.full((4, 8, 3, 3), 0.5))
    model[0].weight_gate.logits.data.normal_()
    (probabilities,) = gates.inclusion_probabilities(model).values()
    blocks = probabilities.movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(blocks.sum(1), torch.full((len(blocks),), 2.0))
    assert [name for name in model.state_dict() if "gate" in name] == ["0.weight_gate.logits"]
    assert model.half()[0].weight_gate.masks.dtype == torch.float32
