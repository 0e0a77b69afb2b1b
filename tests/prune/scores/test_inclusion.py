import pytest
import torch
import torch_pruning as tp
from torch import nn

import bayesprune as bp
from bayesprune import gates
from bayesprune.errors import UnsupportedModelError
from bayesprune.gates import InclusionImportance
from bayesprune.gates.gate import named_gates
from bayesprune.prune.graph.find import find_groups


class Joined(nn.Module):
    """Two layers whose outputs one layer reads, and one more inside."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(3, 5)
        self.reads, self.out = nn.Linear(9, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(torch.relu(self.reads(torch.cat([self.one(x), self.two(x)], 1))))


@pytest.fixture
def joined():
    torch.manual_seed(4)
    model, x = bp.to_variational(Joined()), torch.randn(2, 3)
    gates.add_channel_gates(model, x, ignored_layers=[model.reads])
    for seed, (_, gate) in enumerate(named_gates(model)):
        gate.logits.data.normal_(generator=torch.Generator().manual_seed(seed))
    return model, x


def test_scores_are_the_probabilities_of_the_groups_own_gate(joined):
    model, x = joined
    expected = gates.inclusion_probabilities(model)
    assert expected.keys() == {"one", "two"}
    for group in find_groups(model, x).groups:
        scores = InclusionImportance()(group.group)
        if group.name == "reads":
            assert scores is None
        else:
            torch.testing.assert_close(scores, expected[group.name])


def test_a_ranking_for_another_target(joined):
    model, x = joined
    probabilities = torch.cat(list(gates.inclusion_probabilities(model).values()))
    report = bp.prune_channels(model, x, target="params=0.8", importance=InclusionImportance())
    assert report.params_after <= 0.8 * report.params_before
    assert report.left_whole["reads"] == "nothing in its group has a score (no variational layer)"
    removed = [*report.removed["one"], *(4 + unit for unit in report.removed["two"])]
    kept = sorted(set(range(9)) - set(removed))
    assert probabilities[removed].max() < probabilities[kept].min()


def test_a_dry_run_leaves_the_gates(joined):
    model, x = joined
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = model.eval()(x)
    report = bp.prune_channels(model, x, target="inclusion=0.5", dry_run=True)
    assert report.removed
    assert report.left_whole["reads"] == "nothing in its group has a score (no gate)"
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), before)
    assert report.params_before == sum(p.numel() for p in Joined().parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "inclusion=1"}, "a probability between 0 and 1"),
        ({"target": "inclusion=0.5", "uniform": True}, "criterion of its own"),
        ({"target": "inclusion=0.5", "importance": tp.importance.MagnitudeImportance()}, "criterion of its own"),
    ],
)
def test_refuses_other_options(joined, options, message):
    with pytest.raises(ValueError, match=message):
        bp.prune_channels(*joined, **options)


def test_refuses_a_model_without_gates():
    model, x = bp.to_variational(Joined()), torch.randn(2, 3)
    for options in ({"target": "inclusion=0.5"}, {"target": "macs=0.5", "importance": InclusionImportance()}):
        with pytest.raises(UnsupportedModelError, match="no gates decide"):
            bp.prune_channels(model, x, **options)
