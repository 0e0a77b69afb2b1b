"""The search of `compress`: how it steps, what it keeps, what it refuses."""

import pytest
import torch
from torch import nn

import bayesprune as bp


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    return bp.to_variational(net).eval()


def hidden(net: nn.Module) -> int:
    return net[0].out_features + net[2].out_features


X = torch.zeros(1, 8)


def test_stops_at_the_smallest_model_that_passes():
    def evaluate(net):
        return 1.0 if hidden(net) >= 60 else 0.0

    found = bp.compress(model(), X, evaluate=evaluate, tolerance=0.5, step=0.3, min_step=0.05)
    accepted = [trial for trial in found.trials if trial.accepted]
    assert hidden(found.model) >= 60
    assert hidden(found.model) < 80
    assert found.trials[0].macs == 1.0
    assert accepted[-1].macs == min(trial.macs for trial in accepted)
    assert [trial.accepted for trial in found.trials].count(False) >= 1


def test_leaves_the_given_model_alone_even_when_nothing_passes():
    net = model()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = bp.compress(net, X, evaluate=lambda candidate: float(hidden(candidate)), tolerance=0.0)
    assert found.model is not net
    assert hidden(found.model) == hidden(net) == 128
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_fine_tunes_each_candidate_before_it_is_judged():
    seen = []
    found = bp.compress(
        model(),
        X,
        evaluate=lambda net: 1.0 if hidden(net) > 90 else 0.0,
        tolerance=0.1,
        fine_tune=lambda net: seen.append(hidden(net)),
    )
    assert len(seen) == len(found.trials) - 1
    assert all(size < 128 for size in seen)


def test_compares_with_the_reference_that_is_given():
    found = bp.compress(model(), X, evaluate=lambda net: 0.9, tolerance=0.05, reference=1.0, step=0.3, min_step=0.2)
    assert not any(trial.accepted for trial in found.trials[1:])


@pytest.mark.parametrize(
    "options", [{"tolerance": -0.1}, {"tolerance": 0.1, "step": 1.0}, {"tolerance": 0.1, "min_step": 0.5}]
)
def test_refuses_numbers_out_of_range(options):
    with pytest.raises(ValueError, match="expected"):
        bp.compress(model(), X, evaluate=lambda net: 1.0, **options)
