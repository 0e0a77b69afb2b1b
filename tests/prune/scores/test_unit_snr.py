"""The squared SNR of a unit as a vector: the cost of what leaves after the others have made up for it."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bayesprune as bp
from bayesprune.laplace import KroneckerFactors, output_metric
from bayesprune.prune.graph.find import find_groups
from bayesprune.prune.graph.trials import silence_inputs
from bayesprune.prune.scores.channels import unit_scores
from bayesprune.prune.scores.unit_snr import _systems, removal_costs


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(*sizes: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())]
    return bp.to_variational(nn.Sequential(*layers[:-1]).eval())


def spd(*sizes: int, seed: int) -> torch.Tensor:
    """A positive definite matrix for each of the leading sizes."""
    root = normal(*sizes, sizes[-1] + 3, seed=seed).double()
    return root @ root.mT


def factors(inputs: list[torch.Tensor], outputs: list[torch.Tensor], mean: torch.Tensor) -> KroneckerFactors:
    return KroneckerFactors(mean, tuple(inputs), tuple(outputs), 1.0, 1.0)


def damped(block: torch.Tensor) -> torch.Tensor:
    return block + 0.01 * block.diagonal().mean() * torch.eye(len(block), dtype=block.dtype)


def masks(units: list[list[int]], columns: int) -> list[torch.Tensor]:
    return [torch.isin(torch.arange(columns), torch.tensor(unit))[None] for unit in units]


def smallest_rise(mean: torch.Tensor, between: torch.Tensor, metric: torch.Tensor, gone: list[int]) -> float:
    """Half of E |change of the outputs|^2 in the metric, the weights that stay being free."""
    stay = [c for c in range(mean.shape[1]) if c not in gone]
    change = torch.zeros_like(mean)
    change[:, gone] = -mean[:, gone]
    change[:, stay] = mean[:, gone] @ between[gone][:, stay] @ torch.linalg.inv(between[stay][:, stay])
    return float(0.5 * (metric @ change @ between @ change.T).trace())


def test_costs_add_up_to_the_rise_of_the_loss_when_the_others_adapt():
    between, metric, mean = spd(1, 6, seed=1), spd(1, 3, seed=2), normal(1, 3, 6, seed=3)
    units = [[0, 1], [2, 3], [4, 5]]
    found = list(removal_costs(list(_systems(factors([between], [metric], mean), masks(units, 6))), 3))
    gone: list[int] = []
    total = 0.0
    for unit, cost in found[:2]:
        gone += units[unit]
        total += cost
        assert total == pytest.approx(smallest_rise(mean[0].double(), damped(between[0]), metric[0], gone), rel=1e-6)


def test_the_cheapest_leaves_first_and_a_twin_costs_nothing():
    model = mlp(5, 4, 3)
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = model[0].weight[1], model[0].bias[1]
    posterior = bp.laplace.fit_kronecker(model, [normal(256, 5)], loss=output_metric)
    (group,) = find_groups(model, normal(1, 5)).groups
    scored = unit_scores(bp.prune.UnitSNRImportance(model, posterior), group)
    costs = torch.tensor(scored.scores)
    twins, others = costs[[1, 3]], costs[[0, 2]]
    assert twins.min() < 0.2 * others.min()
    assert twins.max() > 0.5 * others.min(), "of two that say the same the second is not free"


def test_units_with_columns_in_several_blocks_and_fewer_columns():
    first, second = spd(1, 4, seed=1), spd(1, 3, seed=2)
    metric, mean = spd(1, 2, seed=4), normal(1, 2, 7, seed=5)
    units = [[0, 1], [2, 3, 4], [5, 6]]  # the second unit lies in both blocks
    found = dict(removal_costs(list(_systems(factors([first, second], [metric], mean), masks(units, 7))), 3))
    whole = torch.block_diag(damped(first[0]), damped(second[0]))
    cheapest = min(range(3), key=lambda unit: smallest_rise(mean[0].double(), whole, metric[0], units[unit]))
    expected = smallest_rise(mean[0].double(), whole, metric[0], units[cheapest])
    assert next(iter(found)) == cheapest
    assert found[cheapest] == pytest.approx(expected, rel=1e-6)


def test_outputs_in_blocks_and_groups_of_a_convolution():
    between, metric, mean = spd(2, 4, seed=1), [spd(2, 2, seed=2), spd(2, 1, seed=3)], normal(2, 3, 4, seed=4)
    units = [torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]]).bool(), torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]).bool()]
    unit, cost = next(iter(removal_costs(list(_systems(factors([between], metric, mean), units)), 2)))
    gone = [0, 1] if unit == 0 else [2, 3]
    rises = [
        smallest_rise(mean[g].double(), damped(between[g]), torch.block_diag(metric[0][g], metric[1][g]), gone)
        for g in range(2)
    ]
    assert cost == pytest.approx(sum(rises), rel=1e-6)


def test_scores_of_a_pruner_are_those_of_single_channels():
    model = mlp(5, 6, 3)
    importance = bp.prune.UnitSNRImportance(model, bp.laplace.fit_kronecker(model, [normal(64, 5)]))
    (group,) = find_groups(model, normal(1, 5)).groups
    assert torch.equal(importance(group.group), importance.of_group(group))
    pruner = tp.pruner.BasePruner(model, normal(1, 5), importance, pruning_ratio=0.5, ignored_layers=[model[2]])
    pruner.step()
    assert model[0].out_features == 3


def test_a_copy_of_the_model_is_ranked_too():
    model = mlp(5, 6, 3)
    importance = bp.prune.UnitSNRImportance(model, bp.laplace.fit_kronecker(model, [normal(64, 5)]))
    reports = [
        bp.prune_channels(net, normal(1, 5), "macs=0.5", importance=importance) for net in (copy.deepcopy(model), model)
    ]
    assert reports[0].removed == reports[1].removed


def test_a_group_without_a_known_reader_has_no_score():
    model = mlp(5, 6, 3)
    (group,) = find_groups(model, normal(1, 5)).groups
    assert bp.prune.UnitSNRImportance(model, {}).of_group(group) is None


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, self.num_heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(n, t, -1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = Attention(), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head((x + self.attention(x)).mean(1))


def test_a_head_that_nobody_needs_is_the_cheapest():
    torch.manual_seed(0)
    model = Encoder().eval()
    with torch.no_grad():
        model.attention.out.weight[:, 8:12] *= 0.01
    model = bp.to_variational(model)
    posterior = bp.laplace.fit_kronecker(model, [normal(64, 5, 16)], loss=output_metric)
    (group,) = [g for g in find_groups(model, normal(1, 5, 16)).groups if g.attention]
    scored = unit_scores(bp.prune.UnitSNRImportance(model, posterior), group)
    cheapest = min(range(4), key=lambda unit: scored.scores[unit])
    assert group.units[cheapest] == (8, 9, 10, 11)


def test_the_output_metric_is_that_of_the_logits():
    model = mlp(4, 3)
    x = normal(2048, 4)
    posterior = bp.laplace.fit_kronecker(model, [x], loss=output_metric)
    assert torch.allclose(posterior["0"].outputs[0][0], torch.eye(3, dtype=torch.double), atol=0.1)


def test_inputs_of_grouped_convolutions_are_silenced_in_their_group():
    layer = nn.Conv2d(4, 6, 1, groups=2)
    expected = layer.weight.detach().clone()
    expected[:3, 1] = 0  # the second input of the first group
    expected[3:, 0] = 0  # the first of the second
    silence_inputs(layer, [1, 2])
    assert torch.equal(layer.weight, expected)


class LargeTensors(TorchDispatchMode):
    """Counts tensors of at least so many entries that operations make."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_new = not (func.is_view or func._schema.is_mutable) and isinstance(result, torch.Tensor)
        self.count += is_new and result.numel() >= self.numel
        return result


def test_matrices_are_copied_when_they_have_become_smaller_not_for_every_unit():
    """From 64 columns to 32 they shrink by a fifth three times, a copy along rows and one along columns each."""
    between, metric, mean = spd(1, 64, seed=1), spd(1, 3, seed=2), normal(1, 3, 64, seed=3)
    systems = list(_systems(factors([between], [metric], mean), masks([[column] for column in range(64)], 64)))
    with LargeTensors(32 * 32) as large:
        order = list(removal_costs(systems, 64))
    assert sorted(unit for unit, _ in order) == list(range(64))
    assert large.count <= 3 * 2 * 2


def test_a_model_that_was_cut_since_is_refused():
    model = mlp(5, 6, 6, 3)
    importance = bp.prune.UnitSNRImportance(model, bp.laplace.fit_kronecker(model, [normal(64, 5)]))
    bp.prune_channels(model, normal(1, 5), {"0": 5}, importance=importance)
    with pytest.raises(ValueError, match=r"2 has a matrix of .1, 6, 6. .* one of .1, 6, 7.: the model was cut since"):
        bp.prune_channels(model, normal(1, 5), "macs=0.5", importance=importance)
