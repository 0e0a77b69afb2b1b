"""The search of `smallest_within`: how it bisects, what it keeps, what it says, what it refuses."""

import json
import math

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.layers import named_posteriors
from bayesprune.prune import Compression, SearchStep
from bayesprune.prune.scores.weights import magnitude


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    return bp.to_variational(net).eval()


def hidden(net: nn.Module) -> int:
    return net[0].out_features + net[2].out_features


def num_weights(net: nn.Module) -> int:
    return sum(int(posterior.mean.count_nonzero()) for posterior in named_posteriors(net) if posterior.is_weight)


def learn(net: nn.Module) -> None:
    """Nothing, so that a size is all that a score can depend on."""


X = torch.zeros(1, 8)


@pytest.mark.parametrize("fine_tune", [None, learn])
def test_stops_at_the_smallest_model_that_passes(fine_tune):
    def evaluate(net):
        return 1.0 if hidden(net) >= 60 else 0.0

    found = bp.prune.smallest_within(
        model(), X, evaluate=evaluate, tolerance=0.5, fine_tune=fine_tune, step=0.3, min_step=0.05
    )
    accepted = [trial for trial in found.trials if trial.accepted]
    assert 60 <= hidden(found.model) < 64
    assert found.trials[0].kept == 1.0
    assert accepted[-1].kept == min(trial.kept for trial in accepted)
    assert [trial.accepted for trial in found.trials].count(False) >= 1


@pytest.mark.parametrize("fine_tune", [None, learn])
@pytest.mark.parametrize("smallest", [4800, 1234, 57, 4])
def test_finds_the_smallest_number_of_weights_of_a_monotone_score(fine_tune, smallest):
    """Within `min_step` of the true one, whatever it is, in few trials."""
    found = bp.prune.smallest_within(
        model(),
        by="weights",
        evaluate=lambda net: float(num_weights(net) >= smallest),
        tolerance=0.5,
        fine_tune=fine_tune,
        min_step=0.02,
    )
    assert smallest <= num_weights(found.model) <= max(smallest / 0.98, smallest + 1)
    assert len(found.trials) <= (12 if fine_tune is None else 30)
    assert min(trial.kept for trial in found.trials if trial.accepted) == num_weights(found.model) / 4800


@pytest.mark.parametrize("by", ["macs", "weights"])
def test_a_score_that_is_not_monotone_still_gives_a_model_within_the_tolerance(by):
    scores: dict[int, float] = {}

    def evaluate(net):
        torch.manual_seed(num_weights(net))
        return scores.setdefault(id(net), float(torch.rand(()))) if scores else scores.setdefault(id(net), 0.7)

    kept_alive = []
    found = bp.prune.smallest_within(
        model(), X, by=by, evaluate=evaluate, tolerance=0.4, fine_tune=kept_alive.append, data=[X.expand(4, 8)]
    )
    assert scores[id(found.model)] >= found.reference - found.tolerance
    best = min((trial for trial in found.trials if trial.accepted), key=lambda trial: trial.kept)
    assert scores[id(found.model)] == best.score
    assert {trial.accepted for trial in found.trials} == {True, False}


def test_cuts_go_on_from_what_was_learned():
    """Each trial starts from the smallest model that passed, and its first cut is no deeper than the step."""
    steps = []

    def fine_tune(net):
        net.trained = getattr(net, "trained", 0) + 1

    def evaluate(net):
        steps.append((getattr(net, "trained", 0), num_weights(net)))
        return 1.0 if num_weights(net) >= 1000 else 0.0

    bp.prune.smallest_within(model(), by="weights", evaluate=evaluate, tolerance=0.5, fine_tune=fine_tune, step=0.5)
    assert steps[:4] == [(0, 4800), (1, 2400), (2, 1200), (3, 600)]
    assert all(trained == 3 for trained, _ in steps[3:5])


def test_leaves_the_given_model_alone_even_when_nothing_passes():
    net = model()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = bp.prune.smallest_within(net, X, evaluate=lambda candidate: float(hidden(candidate)), tolerance=0.0)
    assert found.model is not net
    assert hidden(found.model) == hidden(net) == 128
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_fine_tunes_each_candidate_before_it_is_judged():
    seen = []
    found = bp.prune.smallest_within(
        model(),
        X,
        evaluate=lambda net: 1.0 if hidden(net) > 90 else 0.0,
        tolerance=0.1,
        fine_tune=lambda net: seen.append(hidden(net)),
    )
    assert len(seen) == len(found.trials) - 1
    assert all(size < 128 for size in seen)
    assert len(set(seen)) == len(seen), "the same cut is not tried twice"


def test_compares_with_the_reference_that_is_given(caplog):
    found = bp.prune.smallest_within(
        model(), X, evaluate=lambda net: 0.9, tolerance=0.05, reference=1.0, step=0.3, min_step=0.2
    )
    assert not any(trial.accepted for trial in found.trials)
    assert "no model within 0.05 of the score 1.0000; the uncut one has 0.9000 and is returned" in caplog.text
    assert "nothing within the tolerance" in str(found)


def test_weights_that_were_removed_before_count_and_options_reach_the_removal():
    net = model()
    bp.prune_weights(net, "weights=0.5", score=magnitude)
    found = bp.prune.smallest_within(
        net, by="weights", evaluate=lambda n: 1.0, tolerance=0.1, score=magnitude, scope="layer", min_kept=0.1
    )
    assert found.trials[0].kept == 0.5
    counts = [int(found.model[i].weight.count_nonzero()) for i in (0, 2, 4)]
    assert counts[::2] == [52, 20]
    assert 410 <= counts[1] <= 432


def test_the_curve_is_said_from_large_to_small():
    found = bp.prune.smallest_within(
        model(), by="weights", evaluate=lambda net: num_weights(net) / 4800, tolerance=0.25, fine_tune=learn
    )
    sizes = [trial.kept for trial in found.curve]
    assert sizes == sorted(sizes, reverse=True)
    assert sorted(trial.accepted for trial in found.curve) == [trial.accepted for trial in found.curve][::-1]
    document = json.loads(json.dumps(found.to_dict()))
    assert (document["by"], document["reference"], document["tolerance"]) == ("weights", 1.0, 0.25)
    assert document["trials"][0] == {"kept": 1.0, "score": 1.0, "accepted": True}
    assert len(document["trials"]) == len(found.trials)
    text = str(found)
    smallest = min(trial.kept for trial in found.trials if trial.accepted)
    assert f"{smallest:.2%} of the weights kept (tolerance 0.25)" in text
    assert text.count("too low") == sum(not trial.accepted for trial in found.trials)
    assert text.count("smallest") == 1


@pytest.mark.parametrize(
    "options",
    [
        {"tolerance": -0.1},
        {"tolerance": math.nan},
        {"tolerance": 0.1, "step": 1.0},
        {"tolerance": 0.1, "min_step": 0.5},
        {"tolerance": 0.1, "by": "heads"},
    ],
)
def test_refuses_options_out_of_range(options):
    with pytest.raises(ValueError, match="expected"):
        bp.prune.smallest_within(model(), X, evaluate=lambda net: 1.0, **options)


@pytest.mark.parametrize("score", [None, "high", torch.ones(2)])
def test_a_score_that_is_no_number_is_said(score):
    with pytest.raises(TypeError, match="evaluate returned .*; expected a number"):
        bp.prune.smallest_within(model(), X, evaluate=lambda net: score, tolerance=0.1)


def test_a_score_of_nan_has_no_smaller_model():
    with pytest.raises(ValueError, match="score to compare with is nan"):
        bp.prune.smallest_within(model(), X, evaluate=lambda net: math.nan, tolerance=0.1)


def test_a_score_may_be_a_tensor():
    found = bp.prune.smallest_within(
        model(), evaluate=lambda net: net[0].weight.mean() * 0 + 0.5, tolerance=0.1, by="weights"
    )
    assert json.loads(json.dumps(found.to_dict()))["trials"][0]["score"] == 0.5


def test_channels_need_example_inputs():
    with pytest.raises(ValueError, match="smallest_within needs example_inputs to remove channels"):
        bp.prune.smallest_within(model(), evaluate=lambda net: 1.0, tolerance=0.1)


def test_the_curve_is_drawn():
    pytest.importorskip("matplotlib")
    from bayesprune.reports.plots import compression_curve

    trials = (SearchStep(1.0, 0.9, True), SearchStep(0.5, 0.89, True), SearchStep(0.02, 0.7, False))
    drawn = compression_curve(Compression(nn.Identity(), trials, "weights", 0.9, 0.02))
    assert drawn.startswith('<svg role="img" aria-label="Score against weights kept"')
    assert "weights kept" in drawn
    assert "2 %" in drawn
    nothing = compression_curve(Compression(nn.Identity(), trials[2:], "macs", 0.9, 0.02))
    assert "MACs kept" in nothing


@pytest.mark.parametrize("kind", ["UnitSNRImportance", "MeasuredImportance"])
def test_an_importance_of_one_model_is_refused_before_the_search(kind):
    net = model()
    importance = (
        bp.prune.UnitSNRImportance(net, bp.laplace.fit_kronecker(net, [X]))
        if kind == "UnitSNRImportance"
        else bp.prune.MeasuredImportance(net, X, lambda cut: float(cut(X).square().mean()))
    )
    with pytest.raises(ValueError, match=f"cuts several times, and {kind} scores the channels of one model"):
        bp.prune.smallest_within(net, X, evaluate=lambda net: 1.0, tolerance=0.1, importance=importance)


def test_data_that_can_be_read_once_serve_every_cut():
    net, data = model(), list(X.split(16))
    found = [
        bp.prune.smallest_within(net, X, evaluate=lambda _: 1.0, tolerance=0.1, min_step=0.3, data=its)
        for its in (data, iter(data))
    ]
    assert found[0].trials == found[1].trials
    assert len(found[0].trials) > 2
