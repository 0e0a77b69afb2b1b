"""Groups of weights as plain data: what they say is what a cut removes."""

import copy
import pickle

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.prune import dependency_groups
from bayesprune.prune.graph.find import find_groups
from bayesprune.prune.graph.removal import remove
from tests.cases import Tied
from tests.prune.nets import nets


def assert_units_are_what_leaves(model: nn.Module, x: torch.Tensor) -> None:
    """Marks the weights of each group's last unit; cutting it takes away exactly the marked ones."""
    groups = dependency_groups(model, x)
    for group in groups:
        marked = copy.deepcopy(model)
        for member in group.members:
            parameter = marked.get_parameter(member.parameter)
            assert len(member.units) == parameter.shape[member.dim]
            assert set(member.units) - {-1} == set(range(group.num_units))
            unit = torch.tensor([p for p, of in enumerate(member.units) if of == group.num_units - 1])
            parameter.data.index_fill_(member.dim, unit, torch.nan)
        before = dict(marked.named_parameters())
        cut = next(found for found in find_groups(marked, x).groups if found.name == group.name)
        remove(marked, [(cut, [cut.units[-1]])])
        for name, parameter in marked.named_parameters():
            expected = before[name][before[name].isfinite()]
            assert torch.equal(parameter.flatten(), expected), f"{group.name}: {name}"


@nets
def test_a_unit_is_what_leaves_with_it(case):
    model, x = case.net(), case.input()
    groups = dependency_groups(model, x)
    assert [group.name for group in groups] == [group.name for group in find_groups(model, x).groups]
    assert_units_are_what_leaves(model, x)
    assert dependency_groups(bp.to_variational(model), x) == groups
    assert pickle.loads(pickle.dumps(groups)) == groups, "plain data"


def test_heads_and_widths_of_attention():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=16, num_heads=4, num_classes=3)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 3, 32, 32)
    groups = {group.name: group for group in dependency_groups(model.eval(), x)}
    heads = groups["blocks.0.attn"]
    assert heads.num_units == 4
    members = {(member.parameter, member.dim): member.units for member in heads.members}
    assert (
        members["blocks.0.attn.qkv.weight", 0]
        == (0,) * 4 + (1,) * 4 + (2,) * 4 + (3,) * 4 + members["blocks.0.attn.qkv.weight", 0][:16] * 2
    ), "queries, keys and values"
    assert ("pos_embed", 2) in {(m.parameter, m.dim) for group in groups.values() for m in group.members}
    assert_units_are_what_leaves(model, x)


def test_a_tied_weight_stands_under_its_first_name():
    model = Tied(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model.stem, model.head = nn.Linear(3, 6), nn.Linear(6, 2)
    model.forward = lambda x: model.head(_block(_block(model.stem(x), model.first), model.second))
    (stream,) = dependency_groups(model, torch.randn(1, 3))
    assert stream.num_units == 6
    found = sorted((member.parameter, member.dim) for member in stream.members if "stem" not in member.parameter)
    assert found == [("first.weight", 0), ("first.weight", 1), ("head.weight", 1)]


def _block(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    return x + layer(x).tanh()


def test_granularity_and_ignored_layers_are_those_of_the_search():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(1, 3)
    assert [group.name for group in dependency_groups(model, x, ignored_layers=[model[0]])] == ["2"]
    with pytest.raises(ValueError, match=r"no group of channels or heads can be removed; left whole: 0 \(granularity"):
        dependency_groups(model, x, granularity=["heads"])
