"""What would go wrong in silence is said, with the line that mends it."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainerCallback

import bayesprune as bp
from bayesprune.errors import UnsupportedModelError
from bayesprune.hosts.transformers import BayesPruneCallback, Tolerance
from bayesprune.hosts.transformers.counting import count_terms
from bayesprune.hosts.transformers.guards import check_dtypes, check_parallelism, freeze_stds, thaw
from tests.hosts.transformers import tiny


def inflated() -> nn.Module:
    model = tiny.bert()
    del model.accepts_loss_kwargs
    return model


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_loss_that_grows_with_accumulation_is_refused(is_compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments writes it, and leaves it
    message = (
        r"BertForSequenceClassification ignores num_items_in_batch \(transformers issue 47688\), so its gradients are "
        r"4 times too large .* Put `model.accepts_loss_kwargs = False` before Trainer"
    )
    options = {"gradient_accumulation_steps": 4, "torch_compile": is_compiled}
    with pytest.raises(ValueError, match=message):
        tiny.trainer(inflated(), tmp_path, BayesPruneCallback(), **options).train()
    assert torch.compile(lambda: torch.compiler.is_compiling(), backend="eager")(), "compilation is on again"


@pytest.mark.parametrize("mended", ["accumulation 1", "accepts_loss_kwargs", "loss_is_scaled_for_ga", "short epoch"])
def test_a_loss_that_is_right_is_not(mended, tmp_path):
    model = tiny.bert() if mended == "accepts_loss_kwargs" else inflated()
    accumulation = 1 if mended == "accumulation 1" else 4
    made = tiny.trainer(model, tmp_path, BayesPruneCallback(), max_steps=2, gradient_accumulation_steps=accumulation)
    if mended in ("loss_is_scaled_for_ga", "short epoch"):
        made.loss_is_scaled_for_ga = False
    if mended == "short epoch":
        made.train_dataset = made.train_dataset[:8]  # two batches, which the Trainer divides by two
    made.train()
    assert made.state.global_step == 2
    assert not model._forward_pre_hooks, "the probe is gone"


def test_the_probe_changes_nothing(tmp_path):
    """A run that was probed equals one that is not, also for a head that uses the number of items."""
    models = [bp.to_variational(tiny.llama()) for _ in range(2)]
    for index, model in enumerate(models):
        made = tiny.trainer(model, tmp_path, BayesPruneCallback(), max_steps=3, gradient_accumulation_steps=2)
        if index:
            made.add_callback(_NoProbe(made))
        made.train()
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class _NoProbe(TrainerCallback):
    def __init__(self, trainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        callback = next(c for c in self.trainer.callback_handler.callbacks if isinstance(c, BayesPruneCallback))
        callback._probe.end()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"distributed_type": "DEEPSPEED"}, r"got DeepSpeed.*Remove `deepspeed` and set TrainingArguments\(fsdp=True"),
        (
            {"distributed_type": "FSDP", "fsdp_version": 1},
            r'got FSDP 1.*Set TrainingArguments\(fsdp_config=\{"version": 2',
        ),
        (
            {"distributed_type": "FSDP", "fsdp_version": 2, "sends_masks": True},
            r'prune=.* with cpu_ram_efficient_loading.*set TrainingArguments\(fsdp_config=\{"cpu_ram',
        ),
        ({"num_threads": 2}, "got 2 GPUs in one process.*start the program with torchrun"),
    ],
)
def test_ways_of_spreading_a_model(case, message):
    fine = {"distributed_type": "NO", "fsdp_version": 0, "num_threads": 1, "sends_masks": False}
    check_parallelism(**fine)
    check_parallelism(**fine | {"distributed_type": "MULTI_CPU", "num_threads": 0})
    check_parallelism(**fine | {"distributed_type": "FSDP", "fsdp_version": 2})
    with pytest.raises(UnsupportedModelError, match=message):
        check_parallelism(**fine | case)


def test_weight_decay_on_means_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"AdamW has weight_decay=0.1 on posterior means.*set weight_decay=0"):
        tiny.trainer(tiny.llama(), tmp_path, BayesPruneCallback(), max_steps=1, weight_decay=0.1).train()


def test_weight_decay_leaves_the_stds_alone(tmp_path):
    """The Trainer puts them into the group that decays."""
    models = [tiny.llama(), tiny.llama()]
    for model, decay in zip(models, (0.0, 0.1), strict=True):
        made = tiny.trainer(model, tmp_path, BayesPruneCallback(), max_steps=1, weight_decay=decay)
        if decay:
            with pytest.warns(UserWarning, match="weight_decay"):
                made.train()
        else:
            made.train()
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b) == ("log_std" in name or "norm" in name), name


def test_a_model_that_is_cut_inside_train(tmp_path):
    class Cut(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            layer = model.model.layers[0].mlp.gate_proj
            layer.cut("weight", 0, [0, 1], 24)
            layer.weight = nn.Parameter(layer.weight.detach()[:2])

    message = (
        r"layers.0.mlp.gate_proj.weight was \(24, 16\) when training began and is \(2, 16\) .* after trainer.train"
    )
    with pytest.raises(RuntimeError, match=message):
        tiny.trainer(tiny.llama(), tmp_path, BayesPruneCallback(), Cut()).train()


def test_a_callback_that_comes_too_late(tmp_path):
    made = tiny.trainer(tiny.llama(), tmp_path, TrainerCallback())
    made.add_callback(BayesPruneCallback())
    with pytest.raises(ValueError, match="LlamaForCausalLM is not variational when training begins.*callbacks="):
        made.train()


def test_a_late_callback_on_a_variational_model_is_in_time(tmp_path):
    made = tiny.trainer(bp.to_variational(tiny.llama()), tmp_path, TrainerCallback(), max_steps=1, logging_steps=1)
    made.add_callback(BayesPruneCallback())
    made.train()
    assert "kl_nats" in made.state.log_history[0]
    assert type(made.callback_handler.callbacks[1]) is BayesPruneCallback


def test_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="warmup is 100; expected a share of the training"):
        BayesPruneCallback(warmup=100)
    with pytest.raises(ValueError, match="temperature is -1"):
        BayesPruneCallback(temperature=-1)
    with pytest.raises(ValueError, match="num_data is 0"):
        BayesPruneCallback(num_data=0)
    with pytest.raises(TypeError, match=r"prune is 50; expected .*PruneSchedule\(.weights=0\.2.\), or None"):
        BayesPruneCallback(prune=50)
    with pytest.raises(ValueError, match="expected the fraction of the weights to keep"):
        BayesPruneCallback(prune="weights=50")
    with pytest.raises(ValueError, match="drop is -1"):
        Tolerance(-1)
    with pytest.raises(ValueError, match="then is 'wait'"):
        Tolerance(1, then="wait")
    with pytest.raises(ValueError, match="variational already"):
        tiny.trainer(bp.to_variational(tiny.llama()), tmp_path, BayesPruneCallback(convert={"std": "rank_one"}))


def test_a_tolerance_without_its_metric(tmp_path):
    callback = BayesPruneCallback(tolerance=Tolerance(0.1, "f1"))
    made = tiny.trainer(tiny.llama(), tmp_path, callback, max_steps=2, eval_strategy="steps", eval_steps=1)
    with pytest.raises(ValueError, match="the evaluation has no eval_f1; it has .*eval_loss.*compute_metrics"):
        made.train()


@pytest.mark.parametrize("steps", [2, 1])
def test_a_tolerance_without_its_metric_on_several_sets(steps, tmp_path):
    """Also where the only evaluation is that of the last step."""
    callback = BayesPruneCallback(tolerance=Tolerance(0.1))
    made = tiny.trainer(tiny.llama(), tmp_path, callback, max_steps=steps, eval_strategy="steps", eval_steps=1)
    made.eval_dataset = {"a": made.eval_dataset, "b": made.eval_dataset}
    with pytest.raises(ValueError, match="the evaluation has no eval_loss; it has .*eval_a_loss.*eval_b_loss"):
        made.train()
    assert made.state.global_step == 1


def test_a_tolerance_on_one_of_several_sets(tmp_path):
    callback = BayesPruneCallback(prune="weights=0.5", tolerance=Tolerance(0.0, "b_loss", reference=0.0))
    made = tiny.trainer(tiny.llama(), tmp_path, callback, max_steps=6, eval_strategy="steps", eval_steps=2)
    made.eval_dataset = {"a": made.eval_dataset, "b": made.eval_dataset}
    made.train()
    assert made.state.global_step == 2


def test_a_lost_place_among_the_callbacks_is_said(tmp_path, caplog):
    made = tiny.trainer(tiny.llama(), tmp_path, TrainerCallback())
    callback = BayesPruneCallback()
    with caplog.at_level(logging.WARNING):
        callback.on_init_end(made.args, made.state, made.control, model=made.model)
    assert "trainer.callback_handler.callbacks.insert(1, trainer.pop_callback(callback))" in caplog.text


class _Stream(IterableDataset):
    def __iter__(self):
        yield from tiny.language(4)


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    torch.rand(3)  # a collator that masks tokens at random
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def test_num_data():
    language, classes, classifier = tiny.language(), tiny.classification(), tiny.bert()
    shifted = sum(label != -100 for row in language for label in row["labels"][1:])
    assert count_terms(DataLoader(language, 4, collate_fn=collate, shuffle=True), tiny.llama()) == shifted
    every = sum(label != -100 for row in language for label in row["labels"])
    assert count_terms(DataLoader(language, 4, collate_fn=collate), classifier) == every
    random_state = torch.get_rng_state()
    assert count_terms(DataLoader(classes, 4, collate_fn=collate), classifier) == len(classes)
    assert torch.equal(torch.get_rng_state(), random_state)
    with pytest.raises(ValueError, match=r"_Stream has no length. Pass BayesPruneCallback\(num_data="):
        count_terms(DataLoader(_Stream(), 4), classifier)


def test_num_data_of_many_examples_is_extrapolated(monkeypatch):
    monkeypatch.setattr("bayesprune.hosts.transformers.counting._MAX_EXAMPLES", 64)
    language = tiny.language(300)
    exact = sum(label != -100 for row in language for label in row["labels"][1:])
    found = count_terms(DataLoader(language, 4, collate_fn=collate), tiny.llama())
    assert found == pytest.approx(exact, rel=0.03)


def training(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_stds_are_frozen_for_a_while():
    """What the user froze stays frozen."""
    model = tiny.llama()
    model.model.layers[0].requires_grad_(False)
    bp.to_variational(model, std="rank_one")
    before = training(model)
    frozen = freeze_stds(model)
    assert training(model) == {name for name in before if "log_std" not in name}
    thaw(frozen)
    assert training(model) == before
    assert any("layers.1" in name and "log_std" in name for name in before)


def test_half_precision_is_refused_unless_it_is_mixed():
    model = bp.to_variational(tiny.llama().to(torch.bfloat16))
    check_dtypes(bp.to_variational(tiny.llama()), "no")
    check_dtypes(model, "bf16")
    message = r"layers.0.self_attn.q_proj in torch.bfloat16.*dtype=torch.float32.*TrainingArguments\(bf16=True\)"
    with pytest.raises(UnsupportedModelError, match=message):
        check_dtypes(model, "no")
