"""What the callback logs, removes and stops, and that the Trainer's own features go on working."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback

import bayesprune as bp
from bayesprune.hosts.transformers import BayesPruneCallback, PruneSchedule, Tolerance
from bayesprune.prune.scores.weights import magnitude
from bayesprune.train import default_temperature
from tests.hosts.transformers import tiny

ADDED = {"nll", "kl_nats", "temperature", "sparsity", "snr_median", "snr_below_1"}


class Logger(TrainerCallback):
    """Stands where TensorBoard and W&B stand: what it sees is what they write."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def zeros(state: dict[str, torch.Tensor]) -> dict[str, float]:
    """Fraction of zeros of each weight that has a mask."""
    return {k: float((state[k] == 0).float().mean()) for k in state if f"{k}_mask" in state}


def test_loggers_see_what_is_added(tmp_path):
    logger = Logger()
    callback = BayesPruneCallback(prune="weights=0.5", temperature=0.2, warmup=0.5)
    made = tiny.trainer(tiny.llama(), tmp_path, logger, callback, max_steps=8, logging_steps=2, eval_strategy="epoch")
    names = [type(other).__name__ for other in made.callback_handler.callbacks]
    assert names[:2] == ["DefaultFlowCallback", "BayesPruneCallback"]
    assert names.index("Logger") < names.index(PrinterCallback.__name__)
    made.train()
    training = [entry for entry in logger.seen if "loss" in entry]
    assert len(training) == 4
    for entry in training:
        assert entry.keys() >= ADDED
        assert entry["nll"] == entry["loss"]
        assert all(math.isfinite(value) for value in entry.values())
    assert [entry["temperature"] for entry in training] == pytest.approx([0.1, 0.2, 0.2, 0.2])
    assert [entry["sparsity"] for entry in training] == pytest.approx([0.0, 0.4375, 0.5, 0.5], abs=1e-3)
    history = [{k: v for k, v in entry.items() if k != "step"} for entry in made.state.log_history]
    assert history == logger.seen
    assert [entry["step"] for entry in made.state.log_history if "nll" in entry] == [2, 4, 6, 8]


def test_what_is_logged_is_so(tmp_path):
    callback = BayesPruneCallback(prior=bp.priors.Gaussian(0.1), prune=PruneSchedule("weights=0.5", begin=0, end=0.5))
    made = tiny.trainer(tiny.llama(), tmp_path, callback, max_steps=4, logging_steps=4)
    made.train()
    entry = next(entry for entry in made.state.log_history if "nll" in entry)
    num_data = sum(label != -100 for row in tiny.language() for label in row["labels"][1:])
    assert entry["temperature"] == default_temperature(made.model, num_data)
    assert entry["kl_nats"] == pytest.approx(float(bp.kl_divergence(made.model, bp.priors.Gaussian(0.1)).detach()))
    scores = torch.cat([s.flatten() for name, s in bp.signal_to_noise(made.model).items()])
    kept = scores[scores > 0]
    assert entry["sparsity"] == pytest.approx(1 - len(kept) / len(scores)) == 0.5
    assert entry["snr_median"] == pytest.approx(float(kept.median()))
    assert entry["snr_below_1"] == pytest.approx(float((kept < 1).float().mean()))


def test_evaluations_get_metrics(tmp_path):
    """During training, of several data sets, and of a trained model alone."""
    made = tiny.trainer(tiny.bert(), tmp_path, BayesPruneCallback(), max_steps=4, eval_strategy="steps", eval_steps=2)
    made.eval_dataset = {"a": made.eval_dataset[:8], "b": made.eval_dataset[8:]}
    made.train()
    entries = [entry for entry in made.state.log_history if "eval_b_loss" in entry]
    assert len(entries) == 2
    assert all({"eval_b_sparsity", "eval_b_snr_median", "eval_b_snr_below_1"} <= entry.keys() for entry in entries)
    assert made.evaluate(made.eval_dataset["a"])["eval_sparsity"] == 0.0
    assert made.evaluate(made.eval_dataset["a"], metric_key_prefix="test")["test_sparsity"] == 0.0
    assert "test_sparsity" not in made.predict(made.eval_dataset["a"]).metrics


def test_zeros_stay_zeros(tmp_path):
    """Through momentum and weight decay, in the moments, in every checkpoint and for any reader of the saved model."""
    schedule = PruneSchedule("weights=0.2", begin=0.2, end=0.6, num_updates=4)
    model = tiny.llama()
    made = tiny.trainer(
        model,
        tmp_path,
        BayesPruneCallback(prune=schedule),
        adam_beta1=0.95,
        max_steps=10,
        save_strategy="steps",
        save_steps=1,
    )
    made.train()
    total = {step: load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors") for step in range(1, 11)}
    found = [sum(int((~state[k]).sum()) for k in state if k.endswith("_mask")) for state in total.values()]
    count = sum(value.numel() for key, value in total[1].items() if key.endswith("_mask"))
    wanted = [round(schedule.sparsity_at(step / 10) * count) for step in range(1, 11)]
    assert found == wanted
    assert found[1] == 0 < found[2]
    assert found[5] == round(0.8 * count) == found[-1]
    for state in total.values():
        for key in (key for key in state if key.endswith("_mask")):
            assert not state[key.removesuffix("_mask")][~state[key]].any(), key
    for name, layer in made.model.named_modules():
        if isinstance(layer, bp.layers.VariationalLayer):
            moments = made.optimizer.state[layer.weight]
            assert not moments["exp_avg"][~layer.weight_mask].any(), name
            assert not moments["exp_avg_sq"][~layer.weight_mask].any(), name
    bp.to_deterministic(model).save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    for key, fraction in zeros(total[10]).items():
        assert float((plain.state_dict()[key] == 0).float().mean()) == fraction > 0.3, key


def test_scope_and_score_of_the_schedule(tmp_path):
    model = tiny.llama()
    before = copy.deepcopy(model)
    schedule = PruneSchedule("weights=0.5", begin=0.0, end=0.0, scope="layer", score=magnitude)
    tiny.trainer(model, tmp_path, BayesPruneCallback(prune=schedule), max_steps=1, learning_rate=0.0).train()
    state = model.state_dict()
    assert set(zeros(state).values()) == {0.5}
    for key in zeros(state):
        weight = before.state_dict()[key].abs()
        assert weight[~state[f"{key}_mask"]].max() <= weight[state[f"{key}_mask"]].min(), key


def test_the_schedule_is_a_pure_function():
    schedule = PruneSchedule("weights=0.2", begin=0.2, end=0.6, num_updates=4)
    values = [schedule.sparsity_at(step / 100) for step in range(101)]
    assert values == sorted(values)
    assert len(set(values)) == 5
    assert values[20] == 0.0
    assert values[30] == pytest.approx(0.8 * (1 - 0.75**3))
    assert values[60] == values[100] == 0.8
    assert PruneSchedule("weights=0.5", begin=0.5, end=0.5).sparsity_at(0.5) == 0.5
    for options in (
        {"target": "weights=1.5"},
        {"target": "weights=0.5", "begin": 0.7, "end": 0.6},
        {"target": "weights=0.5", "num_updates": 0},
    ):
        with pytest.raises(ValueError, match="expected"):
            PruneSchedule(**options)


@pytest.mark.parametrize("then", ["rollback", "stop"])
def test_training_ends_past_the_tolerance(then, tmp_path, caplog):
    """Half of the weights go at once; the model of the evaluation before, or the cut one, is what is left."""
    schedule = PruneSchedule("weights=0.05", begin=0.5, end=0.5)
    tolerance = Tolerance(0.02, "accuracy", then, reference=1.0)
    model = tiny.bert()
    callback = BayesPruneCallback(prune=schedule, tolerance=tolerance)
    made = tiny.trainer(model, tmp_path, callback, max_steps=20, eval_strategy="steps", eval_steps=4)
    made.train()
    values = {e["step"]: e["eval_accuracy"] for e in made.state.log_history if "eval_accuracy" in e}
    assert made.state.global_step == 12
    assert values[12] < 0.98
    assert f"eval_accuracy is {values[12]:g} at step 12" in caplog.text
    metrics = made.evaluate()
    if then == "rollback":
        assert metrics["eval_accuracy"] == values[8]
        assert metrics["eval_sparsity"] == 0.0
    else:
        assert metrics["eval_accuracy"] == values[12]
        assert metrics["eval_sparsity"] == pytest.approx(0.95, abs=1e-3)


def test_a_tolerance_that_holds_lets_training_end(tmp_path):
    callback = BayesPruneCallback(prune="weights=0.7", tolerance=Tolerance(10.0))
    options = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2}
    made = tiny.trainer(tiny.llama(), tmp_path, callback, **options)
    made.train()
    assert made.state.global_step == 6
    scores = [e["eval_compression_score"] for e in made.state.log_history if "eval_compression_score" in e]
    assert len(scores) == 3
    assert scores[0] < scores[1] < scores[2]
    assert scores[2] == pytest.approx(0.3, abs=2e-3)


def test_scores_put_sparsity_before_accuracy():
    tolerance = Tolerance(0.02, "eval_accuracy")
    history = [{"eval_accuracy": value} for value in (0.9, 0.89, 0.85)]

    def score(sparsity: float, accuracy: float) -> float:
        metrics = {"eval_accuracy": accuracy}
        return tolerance.score(sparsity, metrics, tolerance.shortfall(metrics, history))

    assert score(0.9, 0.85) < 0 < score(0.5, 0.9) < score(0.8, 0.885) < score(0.8, 0.89) < score(0.81, 0.885)
    assert tolerance.is_exceeded(float("nan"))
    strict, losses = Tolerance(1e-5), [{"eval_loss": value} for value in (1.2, 1.2001)]
    within, beyond = (strict.score(0.0, each, strict.shortfall(each, losses)) for each in losses)
    assert beyond < 0 < within, "losses count with the opposite sign"
    assert Tolerance(0.1).shortfall({"eval_loss": 2.0}, [{"eval_loss": 1.5}, {"eval_loss": 3.0}]) == 0.5


def test_the_best_model_is_loaded_with_its_masks(tmp_path):
    """By loss the best is an early one, with fewer zeros than the last; it comes back as it was evaluated."""
    callback = BayesPruneCallback(prune=PruneSchedule("weights=0.03", begin=0.6, end=0.7))
    options = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    model = tiny.llama()
    made = tiny.trainer(model, tmp_path, callback, load_best_model_at_end=True, metric_for_best_model="loss", **options)
    made.train()
    evaluations = {e["step"]: e for e in made.state.log_history if "eval_loss" in e}
    best = min(evaluations, key=lambda step: evaluations[step]["eval_loss"])
    assert evaluations[best]["eval_sparsity"] == 0.0
    assert evaluations[20]["eval_sparsity"] == pytest.approx(0.97, abs=1e-3)
    metrics = made.evaluate()
    assert metrics["eval_sparsity"] == 0.0
    assert metrics["eval_loss"] == evaluations[best]["eval_loss"]


@pytest.mark.parametrize("metric", ["sparsity", "compression_score"])
def test_our_metrics_choose_the_best_model(metric, tmp_path):
    callback = BayesPruneCallback(prune=PruneSchedule("weights=0.5", begin=0.2, end=0.4), tolerance=Tolerance(10.0))
    options = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "best", "greater_is_better": True}
    made = tiny.trainer(
        tiny.llama(),
        tmp_path,
        callback,
        max_steps=12,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        **options,
    )
    made.train()
    assert made.evaluate()["eval_sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert made.state.best_global_step == (6 if metric == "sparsity" else 12)


def test_stock_features(tmp_path):
    """Predictions are those of the means; a saved model is the stock one to a stock reader; training goes on."""
    made = tiny.trainer(tiny.llama(), tmp_path, BayesPruneCallback(), max_steps=3)
    made.train()
    first, second = (made.predict(made.eval_dataset).predictions for _ in range(2))
    assert (first == second).all()
    made.save_model(str(tmp_path / "saved"))
    state = load_file(tmp_path / "saved" / "model.safetensors")
    plain = tiny.llama()
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert not missing
    assert all(key.endswith("log_std") for key in unexpected)
    stock = tiny.trainer(plain, tmp_path / "stock", TrainerCallback())
    assert (stock.predict(made.eval_dataset).predictions == first).all()
    made.args.max_steps = 2
    made.train()
    assert made.state.global_step == 2
    assert not made.optimizer.optimizer._optimizer_step_pre_hooks, "nothing stays attached"
