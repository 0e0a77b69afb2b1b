"""The Trainer's own features beside the callback: loss scaling, clipping, batch sizes, length groups, compilation."""

import copy

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

import bayesprune as bp
from bayesprune.hosts.transformers import BayesPruneCallback, PruneSchedule
from tests.hosts.transformers import tiny
from tests.hosts.transformers.test_callback_resume import assert_equal


def test_loss_scaling_changes_nothing(tmp_path):
    """accelerate scales fp16 losses on GPUs alone; the same scaler on the CPU, by a power of two, must not be seen."""
    models = [tiny.llama() for _ in range(2)]
    for index, model in enumerate(models):
        made = tiny.trainer(model, tmp_path, BayesPruneCallback(), max_steps=4, gradient_accumulation_steps=2)
        if index:
            made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        made.train()
    assert made.accelerator.scaler.get_scale() == 2.0**10, "no step was skipped"
    assert_equal(models[1].state_dict(), models[0].state_dict())


def test_skipped_steps_move_nothing(tmp_path):
    """Nor does the scale, halved after each, make the loss of a head that was right look too large."""
    model = bp.to_variational(tiny.bert())
    del model.accepts_loss_kwargs  # so that the head is handed the number of items, and ignores it
    before = copy.deepcopy(model.state_dict())
    made = tiny.trainer(model, tmp_path, BayesPruneCallback(), max_steps=3, gradient_accumulation_steps=2)
    made.loss_is_scaled_for_ga = False
    made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    made.train()
    assert made.accelerator.scaler.get_scale() == 2.0**124, "the gradients overflowed"
    assert_equal(model.state_dict(), before)


def test_clipping_leaves_the_kl_alone(tmp_path):
    """Where the NLL's gradient is clipped to nothing, a step is one on temperature * KL / num_data."""
    model = bp.to_variational(tiny.llama().double()).double()
    before = copy.deepcopy(model.state_dict())
    callback = BayesPruneCallback(num_data=10, prior=bp.priors.Gaussian(0.5), temperature=0.2, warmup=0.0)
    options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 1, "logging_steps": 1}
    made = tiny.trainer(model, tmp_path, callback, max_grad_norm=1e-14, **options)
    made.train()
    assert made.state.log_history[0]["grad_norm"] > 0.1, "the norm before clipping"
    for name, layer in model.named_modules():
        if isinstance(layer, bp.layers.VariationalLayer):
            mean = before[f"{name}.weight"]
            torch.testing.assert_close(layer.weight.detach(), mean * (1 - 0.1 * 0.2 / 10 / 0.5**2), rtol=0, atol=1e-14)
            rises = layer.weight_log_std.detach() - before[f"{name}.weight_log_std"]  # towards the prior's std
            torch.testing.assert_close(rises, torch.full_like(rises, 1e-2), rtol=1e-5, atol=0)


class HookCounter(TrainerCallback):
    """How many attachments the optimizer has at each step."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(len(optimizer.optimizer._optimizer_step_pre_hooks))


def raise_above(size: int, model: nn.Module) -> None:
    """A training batch of more examples than this does not fit."""

    def check(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module.training and len(kwargs["input_ids"]) > size:
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(check, with_kwargs=True)


def test_a_batch_size_that_is_found(tmp_path, monkeypatch):
    """Training begins again with half the batch, examples grouped by length; the callback is attached once."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # nine of them, half a second each
    model = tiny.llama()
    raise_above(2, model)
    options = {"auto_find_batch_size": True, "train_sampling_strategy": "group_by_length"}
    made = tiny.trainer(
        model, tmp_path, BayesPruneCallback(prune="weights=0.5"), max_steps=6, logging_steps=6, **options
    )
    counter = HookCounter()
    made.add_callback(counter)
    made.train()
    assert made._train_batch_size == 2
    assert counter.seen == [1] * 6
    metrics = made.evaluate()
    assert metrics["eval_sparsity"] == pytest.approx(0.5, abs=1e-3)
    made.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"- Loss: {metrics['eval_loss']:.4f}" in card
    assert "- Sparsity: 0.5" in card


def test_the_autocast_that_a_training_leaves_goes_by_its_attributes(tmp_path):
    """As documented; the next Trainer puts its own there."""
    model, options = tiny.llama(), {"max_steps": 1, "bf16": True}
    tiny.trainer(model, tmp_path, BayesPruneCallback(), **options).train()
    del model.forward, model._original_forward, model._is_accelerate_prepared
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    model(input_ids=torch.arange(tiny.LENGTH)[None])
    tiny.trainer(model, tmp_path, TrainerCallback(), **options).train()
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.slow
def test_compiled(tmp_path, monkeypatch):
    """One graph for all steps that train, masks included, after an eager batch that shows the scale of the loss."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments writes it, and leaves it
    counters = torch._dynamo.utils.counters
    counters.clear()
    options = {"max_steps": 6, "logging_steps": 1, "gradient_accumulation_steps": 2, "torch_compile": True}
    made = tiny.trainer(tiny.llama(), tmp_path, BayesPruneCallback(prune="weights=0.5"), **options)
    made.train()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    losses = [entry["nll"] for entry in made.state.log_history if "nll" in entry]
    assert losses[-1] < losses[0], losses
    assert made.evaluate()["eval_sparsity"] == pytest.approx(0.5, abs=1e-3)


def lora(**config) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj", "v_proj"], "r": 2, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(tiny.llama(), peft.LoraConfig(**options | config))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:prune=... removes weights of the adapters alone")
def test_adapters(tmp_path):
    """Posteriors over what trains; resumed, saved, read by stock PEFT and merged."""
    peft = pytest.importorskip("peft")
    schedule = PruneSchedule("weights=0.7", begin=0.4, end=0.8, scope="layer")
    whole, resumed = lora(modules_to_save=["lm_head"]), lora(modules_to_save=["lm_head"])
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    made = tiny.trainer(whole, tmp_path, BayesPruneCallback(prune=schedule), **options)
    names = {name for name, layer in whole.named_modules() if isinstance(layer, bp.layers.VariationalLayer)}
    assert len(names) == 2 * 2 * 2 + 1
    assert all("lora_" in name or "modules_to_save" in name for name in names)
    made.train()
    parameters = dict(whole.named_parameters())
    assert all(parameters[f"{name}.weight_log_std"].requires_grad for name in names)
    again = tiny.trainer(resumed, tmp_path, BayesPruneCallback(prune=schedule), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_equal(resumed.state_dict(), whole.state_dict())
    assert any(key.endswith("_mask") and not value.all() for key, value in whole.state_dict().items())

    inputs = {"input_ids": torch.arange(tiny.LENGTH)[None]}
    expected = whole.eval()(**inputs).logits
    whole.save_pretrained(tmp_path / "adapter")
    stock = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path / "adapter")
    assert torch.equal(stock(**inputs).logits, expected)
    merged = whole.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected)
    assert [name for name, layer in merged.named_modules() if isinstance(layer, bp.layers.VariationalLayer)] == [
        "lm_head"
    ]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_pruning_adapters_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"prune=... removes weights of the adapters alone.*merge_and_unload\(\)"):
        tiny.trainer(lora(), tmp_path, BayesPruneCallback(prune="weights=0.5"))


def test_frozen_layers_stay_as_they_are(tmp_path):
    """No posterior, no noise, no zeros: as a backbone that only the last block is trained on."""
    model = tiny.llama()
    frozen = model.model.layers[0].requires_grad_(False)
    before = copy.deepcopy(frozen.state_dict())
    tiny.trainer(model, tmp_path, BayesPruneCallback(prune="weights=0.2"), max_steps=4).train()
    assert_equal(frozen.state_dict(), before)
    learned = [layer for name, layer in model.named_modules() if isinstance(layer, bp.layers.VariationalLayer)]
    assert learned
    assert sum(int((layer.weight == 0).sum()) for layer in learned) > 0.7 * sum(p.weight.numel() for p in learned)
