"""What the callback does around a training: evaluations of the model that it left, and gates that go on."""

import pytest
import torch

import bayesprune as bp
from bayesprune import gates
from bayesprune.hosts.transformers import BayesPruneCallback, Tolerance
from bayesprune.hosts.transformers.logs import summarize
from tests.hosts.transformers import tiny
from tests.hosts.transformers.test_callback_resume import Interrupt, assert_equal

STEPS, SAVED = 6, 3
ADDED = {"sparsity", "snr_median", "snr_below_1", "compression_score"}


@pytest.mark.parametrize("tolerance", [None, Tolerance(1.0)])
def test_a_deterministic_model_is_evaluated_and_predicts(tolerance, tmp_path):
    """In the documented order; what is no posterior has no SNR, and says none."""
    made = tiny.trainer(
        tiny.bert(), tmp_path, BayesPruneCallback(prune="weights=0.5", tolerance=tolerance), max_steps=3
    )
    made.train()
    means = made.predict(made.eval_dataset)
    assert "test_sparsity" not in means.metrics
    before = made.evaluate()
    assert before["eval_sparsity"] == pytest.approx(0.5, abs=1e-3)
    bp.to_deterministic(made.model)
    after, predicted = made.evaluate(), made.predict(made.eval_dataset)
    assert after["eval_loss"] == before["eval_loss"]
    assert (predicted.predictions == means.predictions).all()
    for metrics in (after, predicted.metrics, made.state.log_history[-1]):
        assert not [key for key in metrics if key.partition("_")[2] in ADDED]


def test_a_model_that_was_never_variational_has_no_summary():
    assert summarize(tiny.bert()) == {}


def gated(kind: str, directory, *others):
    """A run whose gates stand on weights, or on the heads and neurons."""
    model = bp.to_variational(tiny.llama())
    if kind == "weights":
        gates.add_weight_gates(model, lr=0.1)
    else:
        example = {"input_ids": torch.arange(tiny.LENGTH)[None]}
        gates.add_channel_gates(model, example, granularity=("mlp",), lr=0.1)
    options = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED, "logging_steps": SAVED}
    return tiny.trainer(model, directory, BayesPruneCallback(), *others, **options)


@pytest.mark.parametrize("kind", ["weights", "channels"])
def test_a_run_with_gates_is_resumed(kind, tmp_path):
    whole = gated(kind, tmp_path / "whole")
    start = {name: value.clone() for name, value in whole.model.state_dict().items() if "gate" in name}
    whole.train()
    gated(kind, tmp_path / "parts", Interrupt(SAVED)).train()
    resumed = gated(kind, tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    expected = whole.model.state_dict()
    assert start
    assert not any(torch.equal(value, expected[name]) for name, value in start.items())
    assert_equal(resumed.model.state_dict(), expected)
