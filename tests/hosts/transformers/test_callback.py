"""Twelve steps of the stock Trainer with the callback are twelve steps on the ELBO, written by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.hosts.transformers import BayesPruneCallback
from bayesprune.train.kl import bind_prior
from tests.hosts.transformers import tiny
from tests.oracles import HandMadeAdam
from tests.train.reference import clamp, others_of, stds_of

STEPS = 12
TEMPERATURE = 0.05
LR = 1e-2
WARMUP = 0.25
NUM_DATA = {
    tiny.bert: tiny.NUM_EXAMPLES,
    tiny.llama: sum(label != -100 for row in tiny.language() for label in row["labels"][1:]),
}


class Recorder:
    """Each training batch with the state of the random generator at which its forward began."""

    def __init__(self, model: nn.Module) -> None:
        self.batches: list[tuple[dict[str, Tensor], Tensor]] = []
        model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module.training:
            batch = {key: value.clone() for key, value in kwargs.items() if isinstance(value, Tensor)}
            self.batches.append((batch, torch.get_rng_state()))


def negative_log_likelihood(model: nn.Module, batches: list[tuple[dict[str, Tensor], Tensor]]) -> Tensor:
    """Mean over all labels of the batches, from logits."""
    total, count = torch.zeros(()), 0
    for batch, random_state in batches:
        torch.set_rng_state(random_state)
        logits, labels = model(input_ids=batch["input_ids"]).logits, batch["labels"]
        if labels.dim() > 1:
            logits, labels = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()  # as transformers does
        total = total + nn.functional.cross_entropy(logits, labels, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


OPTIMIZERS = {
    "adamw_torch": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.0),
    "sgd": lambda p: torch.optim.SGD(p, lr=100 * LR),
}


def train_on_elbo(model: nn.Module, recorded: Recorder, *, accumulation: int, num_data: int, optim: str) -> nn.Module:
    """NLL + temperature * KL / num_data by autograd; torch moves the means, an Adam written by hand the stds."""
    bound = bind_prior(model, bp.priors.Gaussian())
    stds, others = stds_of(model), others_of(model)
    optimizer = OPTIMIZERS[optim](others.values())
    adams = {name: HandMadeAdam(1e-2) for name in stds}
    model.train()
    for step in range(STEPS):
        weight = TEMPERATURE * min(1.0, (step + 1) / (WARMUP * STEPS)) / num_data
        nll = negative_log_likelihood(model, recorded.batches[step * accumulation : (step + 1) * accumulation])
        kl = sum(prior.kl(p.mean, p.log_std, p.mask) for p, prior in bound.items())
        names = {**others, **stds}
        gradients = dict(zip(names, torch.autograd.grad(nll + weight * kl, list(names.values())), strict=True))
        for name, parameter in others.items():
            parameter.grad = gradients[name]
        optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * (1 - step / STEPS)
        optimizer.step()
        with torch.no_grad():
            for name, part in stds.items():
                part.copy_(adams[name].moved(part, gradients[name]))
            for posterior, prior in bound.items():
                clamp(posterior.log_std_parts, prior.max_log_std)
    return model


def largest_difference(model: nn.Module, expected: nn.Module, start: nn.Module) -> float:
    """Between parameters that all have moved."""
    worst = {"means": 0.0, "stds": 0.0}
    for name, parameter in model.named_parameters():
        wanted = expected.get_parameter(name).detach()
        assert (wanted - start.get_parameter(name)).abs().max() > 1e-4, f"{name} has not moved"
        kind = "stds" if name.endswith("log_std") else "means"
        a, b = (value.exp() if kind == "stds" else value for value in (parameter.detach(), wanted))
        worst[kind] = max(worst[kind], float((a - b).abs().max()))
    print(f"largest difference: {worst}")
    return max(worst.values())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("build", [tiny.bert, tiny.llama])
def test_the_callback_is_the_elbo(build, accumulation, tmp_path):
    """In double precision, where AdamW does not blow rounding up, on a model that was variational before."""
    model = bp.to_variational(build().double(), relative_std=0.2).double()
    start, expected = copy.deepcopy(model), copy.deepcopy(model)
    recorder = Recorder(model)
    callback = BayesPruneCallback(temperature=TEMPERATURE, warmup=WARMUP)
    tiny.trainer(model, tmp_path, callback, max_steps=STEPS, gradient_accumulation_steps=accumulation).train()
    assert len(recorder.batches) == STEPS * accumulation
    train_on_elbo(expected, recorder, accumulation=accumulation, num_data=NUM_DATA[build], optim="adamw_torch")
    # a key's bias has a gradient that is rounding alone (softmax does not see it), and AdamW divides it by its size
    assert largest_difference(model, expected, start) < (1e-6 if build is tiny.bert else 1e-12)


@pytest.mark.parametrize("structure", ["per_weight", "rank_one"])
def test_in_single_precision_the_callback_converts(structure, tmp_path):
    model = tiny.llama()
    options = {"relative_std": 0.2, "std": structure}
    start, expected = (bp.to_variational(copy.deepcopy(model), **options) for _ in range(2))
    recorder = Recorder(model)
    callback = BayesPruneCallback(temperature=TEMPERATURE, warmup=WARMUP, convert=options)
    made = tiny.trainer(
        model, tmp_path, callback, max_steps=STEPS, gradient_accumulation_steps=2, optim="sgd", learning_rate=100 * LR
    )
    assert made.model is model
    made.train()
    train_on_elbo(expected, recorder, accumulation=2, num_data=NUM_DATA[tiny.llama], optim="sgd")
    assert largest_difference(model, expected, start) < 1e-6


def test_noise_is_bounded_and_said_as_in_a_loop(tmp_path):
    callback = BayesPruneCallback(max_noise_cost=1e-3, num_data=10**9, convert={"relative_std": 1.0})
    model = tiny.bert()
    model.classifier.weight.data.mul_(100)  # a loss that noise can cost something
    made = tiny.trainer(model, tmp_path, callback, max_steps=10, learning_rate=0.0)
    with pytest.warns(UserWarning, match=r"adds [\d.]+ to the training loss.*max_noise_cost=0.001"):
        made.train()


def test_checkpointed_activations_change_nothing(tmp_path):
    """The second forward draws the noise of the first."""
    models = [tiny.llama(), tiny.llama()]
    for model, is_checkpointed in zip(models, (False, True), strict=True):
        options = {"activation_checkpointing": is_checkpointed, "max_steps": 6}
        tiny.trainer(model, tmp_path, BayesPruneCallback(), **options).train()
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_bf16(tmp_path):
    """Under autocast, and with a model that is bfloat16 itself; the stds stay float32 and move."""
    for model, options in ((tiny.llama(), {"bf16": True}), (tiny.llama().to(torch.bfloat16), {})):
        made = tiny.trainer(model, tmp_path, BayesPruneCallback(), max_steps=6, logging_steps=1, **options)
        before = {name: part.detach().clone() for name, part in stds_of(model).items()}
        made.train()
        for name, part in stds_of(model).items():
            assert part.dtype == torch.float32
            assert (part.detach() - before[name]).abs().max() > 1e-3, name
        losses = [entry["nll"] for entry in made.state.log_history if "nll" in entry]
        assert losses[-1] < losses[0], losses


def test_label_smoothing(tmp_path):
    """The Trainer computes that loss itself, with the right scale also for a head that ignores the number of items."""
    model = tiny.bert()
    del model.accepts_loss_kwargs
    made = tiny.trainer(
        model,
        tmp_path,
        BayesPruneCallback(),
        label_smoothing_factor=0.1,
        gradient_accumulation_steps=2,
    )
    made.train()
    losses = [entry["nll"] for entry in made.state.log_history if "nll" in entry]
    assert losses[-1] < losses[0] < 1.5, losses
