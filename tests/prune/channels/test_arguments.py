"""What is given in another form than expected: taken where its meaning is plain, else refused in a sentence."""

import copy
import re
from fractions import Fraction

import pytest
import torch
import torch_pruning as tp
from torch import nn

import bayesprune as bp
from bayesprune import gates
from bayesprune.prune import MeasuredImportance, dependency_groups, prune_channels
from bayesprune.prune.graph.prunable_layers import layer_names

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.body(self.stem(x).relu()).relu().mean((2, 3)))


def net() -> nn.Module:
    return bp.to_variational(Net())


@pytest.mark.parametrize("target", [0.5, "macs", None, ("macs", 0.5), "", "mac=0.5", "macs=half", "2:4"])
def test_a_target_out_of_the_grammar_says_what_one_is(target):
    expected = re.escape(f"prune_channels got the target {target!r}; expected a text like") + r' "macs=0.5" \(half'
    with pytest.raises(ValueError, match=expected):
        prune_channels(net(), X, target)


@pytest.mark.parametrize("value", ["0.5", None, [0.5], 1.5, -0.1])
def test_a_fraction_by_name_that_is_none_says_so(value):
    with pytest.raises(ValueError, match=re.escape(f"is to keep {value!r} of 'fc'; expected a fraction from 0 to 1")):
        bp.prune_weights(net(), {"fc": value})


@pytest.mark.parametrize("value", [torch.tensor(0.5), Fraction(1, 2)])
def test_numbers_of_other_types_are_numbers(value):
    expected = bp.prune_weights(net(), {"fc": 0.5})
    assert bp.prune_weights(net(), {"fc": value}) == expected


@pytest.mark.parametrize("form", ["name", "names", "module", "modules", "container"])
def test_layers_are_ignored_by_name_or_as_modules(form):
    model = net()
    ignored = {
        "name": "body.0",
        "names": ["body.0", "body.2"],
        "module": model.body[0],
        "modules": (layer for layer in (model.body[0], model.body[2])),
        "container": "body",
    }[form]
    expected = ["body.0"] if form in ("name", "module") else ["body.0", "body.2"]
    report = prune_channels(model, X, target="params=0.8", ignored_layers=ignored)
    assert [name for name, reason in report.left_whole.items() if reason == "ignored_layers"] == expected


def test_names_are_taken_wherever_layers_are_ignored():
    model = net()
    groups = dependency_groups(model, X, ignored_layers=["stem", "body.2"])
    assert [group.name for group in groups] == ["body.0"]
    measured = MeasuredImportance(model, X, lambda m: m(X).square().mean(), ignored_layers="stem", levels=(0.5,))
    assert measured._scores.keys() == {"body.0", "body.2"}
    assert "stem" in gates.add_channel_gates(copy.deepcopy(model), X, ignored_layers="stem").left_out


def test_a_search_ignores_the_layers_of_its_copies():
    model = net()
    for ignored in ([model.stem], ["stem"]):
        options = {"evaluate": lambda m: 0.0, "tolerance": 0.0, "min_step": 0.3, "ignored_layers": ignored}
        found = bp.prune.smallest_within(model, X, **options)
        assert found.model.stem.out_channels == 8
        assert found.model.body[0].out_channels < 8


def test_layers_that_are_not_there_are_refused():
    model = net()
    message = (
        "ignored_layers has 'fcc', which is no part of this Net; expected its modules or their names, such as 'fc'"
    )
    with pytest.raises(ValueError, match=message):
        prune_channels(model, X, target="macs=0.5", ignored_layers=["fcc"])
    with pytest.raises(ValueError, match="has a VariationalLinear, which is no part of this Net.*'body.2', 'fc'"):
        prune_channels(copy.deepcopy(model), X, target="macs=0.5", ignored_layers=[model.fc])
    assert layer_names(model, ()) == []


TAYLOR = tp.importance.TaylorImportance, tp.importance.GroupTaylorImportance


@pytest.mark.parametrize("criterion", TAYLOR)
def test_a_criterion_without_gradients_says_what_it_needs(criterion):
    model = Net()
    message = r"Importance fails on stem, whose weights have no gradients .* needs loss\.backward\(\) before"
    with pytest.raises(ValueError, match=message):
        prune_channels(model, X, target="macs=0.5", importance=criterion())
    model(X).square().mean().backward()
    assert prune_channels(model, X, target="macs=0.5", importance=criterion()).achieved["macs"] <= 0.5


def test_a_criterion_that_gives_no_score_without_gradients_says_so():
    with pytest.raises(
        bp.errors.InfeasibleTargetError, match=r"GroupHessianImportance gives its group no score; the we"
    ):
        prune_channels(Net(), X, target="macs=0.5", importance=tp.importance.GroupHessianImportance())


def test_an_importance_that_fails_for_another_reason_is_not_explained_away():
    def importance(group):
        raise TypeError("a fault of its own")

    model = Net()
    model(X).square().mean().backward()
    with pytest.raises(TypeError, match="a fault of its own"):
        prune_channels(model, X, target="macs=0.5", importance=importance)
