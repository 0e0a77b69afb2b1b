"""The stock Trainer with a teacher: its steps are those of the loop by hand, and nothing is left behind."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

import bayesprune as bp
from bayesprune.hosts.transformers import BayesPruneCallback, DistillationCallback
from bayesprune.train import Distillation
from tests.hosts.transformers import tiny
from tests.hosts.transformers.test_callback import Recorder
from tests.hosts.transformers.test_callback_guards import inflated
from tests.hosts.transformers.test_callback_resume import SAVED, STEPS, Interrupt, assert_equal

BUILD = {"bert": tiny.bert, "llama": tiny.llama}


def teacher(name: str) -> nn.Module:
    """Sharper than the student, so that the two disagree."""
    model = BUILD[name]()
    head = model.classifier if name == "bert" else model.lm_head
    with torch.no_grad():
        head.weight.mul_(30)
    return model


def distilled(name: str, **options) -> Distillation:
    return bp.distillation(teacher(name), **{"temperature": 2.0, "weight": 0.8} | options)


def run_by_hand(model: nn.Module, distill: Distillation, recorder: Recorder, accumulation: int) -> list[float]:
    """Sums over all tokens of an update, divided by their number; returns the losses on the labels."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 4)
    model.train()
    nlls = []
    for start in range(0, len(recorder.batches), accumulation):
        terms, losses = [], []
        for batch, _ in recorder.batches[start : start + accumulation]:
            outputs = model(input_ids=batch["input_ids"])
            logits, labels = outputs.logits, batch["labels"]
            if labels.dim() > 1:
                logits, labels = logits[:, :-1], labels[:, 1:]
            losses.append(nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none"))
            losses[-1] = losses[-1][labels.flatten() != -100]
            terms.append(distill.divergences(outputs, batch))
        nll = torch.cat(losses).mean()
        optimizer.zero_grad()
        (distill.weight * torch.cat(terms).mean() + (1 - distill.weight) * nll).backward()
        optimizer.step()
        schedule.step()
        nlls.append(float(nll.detach()))
    return nlls


@pytest.mark.parametrize(
    ("name", "accumulation", "features"),
    [("bert", 1, 0.0), ("bert", 2, 0.3), ("llama", 1, 0.3), ("llama", 2, 0.0)],
)
def test_steps_are_those_of_the_loop_by_hand(name, accumulation, features, tmp_path):
    """Also where the label tokens of the accumulated batches differ in number, and where features are compared."""
    model, distill = BUILD[name](), distilled(name, features=features)
    start, recorder = copy.deepcopy(model), Recorder(model)
    made = tiny.trainer(
        model,
        tmp_path,
        DistillationCallback(distill),
        max_steps=4,
        logging_steps=1,
        gradient_accumulation_steps=accumulation,
    )
    made.train()
    with distill.watch(start):
        nlls = run_by_hand(start, distill, recorder, accumulation)
    for (key, value), expected in zip(model.state_dict().items(), start.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=key)
    logs = [entry for entry in made.state.log_history if "nll" in entry]
    assert [entry["nll"] for entry in logs] == pytest.approx(nlls, rel=1e-4)
    assert all(entry["loss"] != pytest.approx(entry["nll"], rel=1e-2) for entry in logs)
    if accumulation == 1:
        mixed = [0.8 * entry["distillation"] + 0.2 * entry["nll"] for entry in logs]
        assert mixed == pytest.approx([entry["loss"] for entry in logs], rel=1e-4)


def test_evaluation_has_the_loss_of_the_labels_and_nothing_is_left(tmp_path):
    model, distill = tiny.llama(), distilled("llama")
    made = tiny.trainer(model, tmp_path, DistillationCallback(distill), max_steps=3, eval_strategy="epoch")
    state = copy.deepcopy(distill.teacher.state_dict())
    made.train()
    (during,) = (entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry)
    again = made.evaluate()["eval_loss"]
    assert during == again
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert_equal(dict(distill.teacher.state_dict()), dict(state))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bp.save(model, tmp_path / "saved")
    with torch.no_grad():
        loss = Trainer(model, tiny.arguments(tmp_path), eval_dataset=tiny.language()[:16]).evaluate()["eval_loss"]
    assert loss == again


@pytest.mark.parametrize("name", BUILD)
def test_resumed_in_the_middle_of_a_recovery(name, tmp_path):
    """Of a model that was cut: the teacher is made again from the dense one."""

    def build(directory, *others):
        model = bp.to_variational(BUILD[name]())
        granularity = {"granularity": ("mlp",), "target": "params=0.95"}
        batch = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
        bp.prune_channels(model, batch, **granularity)
        options = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED, "gradient_accumulation_steps": 2}
        callback = DistillationCallback(distilled(name))
        return tiny.trainer(bp.to_deterministic(model), directory, callback, *others, logging_steps=SAVED, **options)

    whole = build(tmp_path / "whole")
    whole.train()
    build(tmp_path / "parts", Interrupt(SAVED + 1)).train()
    resumed = build(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert_equal(resumed.model.state_dict(), whole.model.state_dict())
    logs = [[e for e in run.state.log_history if "nll" in e] for run in (whole, resumed)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("is_first", [True, False])
def test_beside_posteriors_whose_weights_go(is_first, tmp_path):
    callbacks = [DistillationCallback(distilled("llama")), BayesPruneCallback(prune="weights=0.5")]
    made = tiny.trainer(
        tiny.llama(), tmp_path, *(callbacks if is_first else callbacks[::-1]), gradient_accumulation_steps=2
    )
    seen = []
    made.add_callback(_Seeing(seen))
    made.train()
    logs = [entry for entry in made.state.log_history if "nll" in entry]
    assert seen == [entry for entry in seen if {"nll", "distillation", "kl_nats"} <= entry.keys()]
    assert len(seen) == len(logs) == 4
    assert all(entry["loss"] != pytest.approx(entry["nll"], rel=1e-3) for entry in logs)
    assert logs[-1]["distillation"] < logs[0]["distillation"]
    assert logs[-1]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert not made.model._forward_hooks


class _Seeing(TrainerCallback):
    """A logger: what it sees is what others have added before it."""

    def __init__(self, seen: list[dict[str, float]]) -> None:
        self.seen = seen

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.seen.append(dict(logs))


def test_the_teacher_alone_needs_no_labels(tmp_path):
    data = [{"input_ids": row["input_ids"]} for row in tiny.classification()]
    model, distill = tiny.bert(), distilled("bert", weight=1.0)
    callback = DistillationCallback(distill)
    made = Trainer(model, tiny.arguments(tmp_path, logging_steps=5), train_dataset=data, callbacks=[callback])
    made.train()
    logs = [entry for entry in made.state.log_history if "distillation" in entry]
    assert logs[-1]["loss"] == pytest.approx(logs[-1]["distillation"])
    assert logs[-1]["loss"] < logs[0]["loss"] / 2


@pytest.mark.parametrize("weight", [0.8, 1.0])
@pytest.mark.parametrize("others", [(), (BayesPruneCallback,)])
def test_a_loss_that_grows_with_accumulation_is_refused(weight, others, tmp_path):
    callbacks = [DistillationCallback(distilled("bert", weight=weight)), *(kind() for kind in others)]
    made = tiny.trainer(inflated(), tmp_path, *callbacks, max_steps=2, gradient_accumulation_steps=4)
    if weight == 1.0:  # the head's loss does not count
        made.train()
        return
    with pytest.raises(ValueError, match="ignores num_items_in_batch"):
        made.train()


def test_bfloat16(tmp_path):
    made = tiny.trainer(
        tiny.llama(), tmp_path, DistillationCallback(distilled("llama")), max_steps=8, logging_steps=4, bf16=True
    )
    made.train()
    first, last = (entry["distillation"] for entry in made.state.log_history if "distillation" in entry)
    assert last < first


def test_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments writes it, and leaves it
    options = {"max_steps": 4, "logging_steps": 1, "torch_compile": True, "torch_compile_backend": "eager"}
    found = []
    for is_compiled in (False, True):
        callback = DistillationCallback(distilled("llama"))
        kept = options if is_compiled else {k: v for k, v in options.items() if not k.startswith("torch")}
        made = tiny.trainer(tiny.llama(), tmp_path, callback, **kept)
        made.train()
        found.append([entry["distillation"] for entry in made.state.log_history if "distillation" in entry])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert len(found[0]) == 4


class _OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def test_a_loss_that_the_trainer_computes_is_told(tmp_path):
    message = "Override compute_loss"
    callback = DistillationCallback(distilled("bert"))
    with pytest.raises(ValueError, match=rf"label_smoothing_factor is 0.1.*{message}"):
        tiny.trainer(tiny.bert(), tmp_path, callback, label_smoothing_factor=0.1).train()
    options = {"args": tiny.arguments(tmp_path), "train_dataset": tiny.classification(), "callbacks": [callback]}
    with pytest.raises(ValueError, match=f"called without labels.*{message}"):
        Trainer(
            tiny.bert(), compute_loss_func=lambda outputs, labels, **kwargs: outputs.logits.sum(), **options
        ).train()
    with pytest.raises(ValueError, match=f"not the one that BertFor.*{message}"):
        _OwnLoss(tiny.bert(), **options).train()


class _Distilling(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **options):
        loss, outputs = super().compute_loss(model, dict(inputs), True, **options)
        loss = self.distill(outputs, inputs, loss)
        return (loss, outputs) if return_outputs else loss


def test_the_way_round_smooths_labels_too(tmp_path):
    distill, model = distilled("bert"), tiny.bert()
    args = tiny.arguments(tmp_path, label_smoothing_factor=0.1, logging_steps=1, max_steps=1)
    made = _Distilling(copy.deepcopy(model), args, train_dataset=tiny.classification())
    made.distill = distill
    recorder = Recorder(made.model)
    made.train()
    batch, _ = recorder.batches[0]
    outputs = model.train()(input_ids=batch["input_ids"])
    batch["labels"] = torch.tensor([int(row[0]) % 3 for row in batch["input_ids"]])
    smoothed = nn.functional.cross_entropy(outputs.logits, batch["labels"], label_smoothing=0.1)
    expected = float(distill(outputs, batch, smoothed).detach())
    assert made.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    made = tiny.trainer(tiny.bert(), tmp_path, DistillationCallback(distilled("bert")))
    monkeypatch.setattr(type(made.args), "n_gpu", 2)
    with pytest.raises(bp.errors.UnsupportedModelError, match="2 GPUs in one process"):
        made.callback_handler.on_train_begin(made.args, made.state, made.control)


class _Evaluates(TrainerCallback):
    """Measures the model by another Trainer after each step."""

    def on_step_end(self, args, state, control, **event):
        Trainer(event["model"], args, eval_dataset=tiny.classification()[:8]).evaluate()
        event["model"].train()


def test_another_trainer_inside_a_callback_leaves_the_teacher_in_place(tmp_path):
    distill = distilled("bert")
    logs = []
    for others in ((), (_Evaluates(),)):
        made = tiny.trainer(tiny.bert(), tmp_path, DistillationCallback(distill), *others, max_steps=3, logging_steps=1)
        made.train()
        logs.append([(entry["loss"], entry["distillation"]) for entry in made.state.log_history if "loss" in entry])
    assert len(logs[0]) == 3
    assert logs[0] == logs[1]


class _Interrupted(TrainerCallback):
    """Somebody presses Ctrl-C."""

    def on_substep_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt

    on_step_end = on_substep_end


@pytest.mark.parametrize("features", [0.0, 0.3])
@pytest.mark.parametrize("others", [(), (DistillationCallback,)])
def test_an_interrupted_training_leaves_the_next_one_alone(others, features, tmp_path):
    """Whether it distils itself, with the same teacher, or not at all."""
    distill = distilled("bert", features=features)

    def losses(model):
        callbacks = [kind(distill) for kind in others]
        made = tiny.trainer(model, tmp_path, TrainerCallback(), *callbacks, max_steps=2, logging_steps=1)
        made.train()
        return [entry["loss"] for entry in made.state.log_history if "loss" in entry]

    model = tiny.bert()
    interrupted = DistillationCallback(distill)  # which somebody may keep
    made = tiny.trainer(model, tmp_path, interrupted, _Interrupted(), learning_rate=0.0)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert losses(model) == losses(tiny.bert())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_refused_training_leaves_the_next_one_alone(tmp_path):
    """The message says what to do, and who does it goes on with the model that is there."""
    options = {"max_steps": 1, "gradient_accumulation_steps": 2, "logging_steps": 1}
    distill, model = distilled("bert"), inflated()
    with pytest.raises(ValueError, match="Put `model.accepts_loss_kwargs = False`"):
        tiny.trainer(model, tmp_path, DistillationCallback(distill), **options).train()
    model.accepts_loss_kwargs = False
    logs = []
    for again in (model, tiny.bert()):
        made = tiny.trainer(again, tmp_path, DistillationCallback(distill), **options)
        made.train()
        logs.append(made.state.log_history[0])
    assert logs[0] == logs[1]
    assert not model._forward_hooks
