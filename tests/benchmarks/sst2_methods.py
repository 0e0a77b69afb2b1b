"""What the benchmarks with transformers' Trainer compare: our options, and removal by magnitude, movement, at random.

Each control is a callback beside which nothing in a Trainer changes, on the schedule of `BayesPruneCallback`: the same
number of weights at the same steps.
"""

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import bayesprune as bp
from bayesprune.hosts.transformers import BayesPruneCallback, PruneSchedule
from bayesprune.layers import Posterior
from bayesprune.prune.channels.report import ChannelReport
from bayesprune.reports import macs_by_module

KINDS = ("magnitude", "movement", "random")


@dataclass(frozen=True)
class Method:
    """How weights are chosen; what does not concern a kind stands at its default."""

    kind: str
    scope: Literal["global", "layer"] = "global"
    std: str = "per_weight"
    temperature: float = 0.1
    std_lr: float = 1e-2
    power: float = 2.0
    score_optimizer: str = "sgd"


class RemoveGradually(TrainerCallback):
    """Zeros in the weights of stock layers, chosen anew where the schedule removes more.

    Movement (Sanh et al., 2020, arXiv:2005.07683): a weight W, used as W' = mask * W, has a score S that descends on
    dL/dW' * W, from 0, by the straight-through rule; W's own gradient is masked, and a removed weight keeps its value,
    with which it may return.
    """

    def __init__(
        self,
        kind: str,
        schedule: PruneSchedule,
        selected: Callable[[nn.Module, str], bool],
        *,
        seed: int,
        score_optimizer: str = "sgd",
    ) -> None:
        """Takes effect in the Trainer it is given to.

        Args:
            kind: Of `KINDS`.
            schedule: When how many weights go, and whether layers are ranked together; its score is not used.
            selected: Whether a linear layer, by module and name, takes part.
            seed: Of random scores.
            score_optimizer: What the scores of movement descend with: "sgd", or "adam" with a rate of 1e-2.
        """
        self.kind, self.schedule, self.selected, self.seed = kind, schedule, selected, seed
        self.score_optimizer = score_optimizer

    @torch.no_grad()
    def on_train_begin(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        layers = [m for n, m in event["model"].named_modules() if isinstance(m, nn.Linear) and self.selected(m, n)]
        self.weights = [layer.weight for layer in layers]
        self.masks = [torch.ones_like(weight) for weight in self.weights]
        generator = torch.Generator().manual_seed(self.seed)
        self.scores = [torch.zeros_like(weight) for weight in self.weights]
        if self.kind == "random":
            self.scores = [torch.rand(weight.shape, generator=generator) for weight in self.weights]
        if self.kind == "movement":
            self.whole = [weight.detach().clone() for weight in self.weights]
            adam = self.score_optimizer == "adam"
            self.descent = torch.optim.Adam(self.scores, lr=1e-2) if adam else torch.optim.SGD(self.scores, lr=1.0)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        if self.kind == "movement":
            for score, gradient, whole in zip(self.scores, gradients, self.whole, strict=True):
                score.grad = gradient * whole
            self.descent.step()
        for gradient, mask in zip(gradients, self.masks, strict=True):
            gradient.mul_(mask)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        if self.kind == "movement":
            for whole, weight, mask in zip(self.whole, self.weights, self.masks, strict=True):
                whole.copy_(torch.where(mask.bool(), weight, whole))
        if (sparsity := self.schedule.removal_after(state.global_step, state.max_steps)) is not None:
            scores = [weight.abs() for weight in self.weights] if self.kind == "magnitude" else self.scores
            for mask, keep in zip(self.masks, best(scores, sparsity, self.schedule.scope), strict=True):
                mask.copy_(keep)
        for weight, whole, mask in zip(
            self.weights, self.whole if self.kind == "movement" else self.weights, self.masks, strict=True
        ):
            weight.copy_(whole * mask)


def best(scores: list[Tensor], sparsity: float, scope: str) -> list[Tensor]:
    """Which weights are kept when those with the lowest scores go, of all layers together or of each."""
    if scope == "layer":
        return [best([score], sparsity, "global")[0] for score in scores]
    flat = torch.cat([score.flatten() for score in scores])
    threshold = flat.kthvalue(max(1, round(sparsity * flat.numel()))).values
    return [score > threshold for score in scores]


def signal(power: float) -> Callable[[Posterior], Tensor]:
    """|mean| / s * (s / std)^(power / 2) with s the layer's RMS: 2 is the SNR, 0 magnitude relative to the layer."""

    def score(posterior: Posterior) -> Tensor:
        mean = posterior.mean.detach().float()
        kept = mean if posterior.mask is None else mean[posterior.mask]
        scale = kept.square().mean().sqrt()
        return mean.abs() / scale * (scale * (-posterior.log_std.detach()).exp()) ** (power / 2)

    return score


def callback(
    method: Method,
    schedule: PruneSchedule | None,
    selected: Callable[[nn.Module, str], bool],
    *,
    seed: int,
    num_data: int | None = None,
) -> TrainerCallback:
    """What a Trainer gets for a method; without a schedule, ours that learn posteriors and remove nothing."""
    if method.kind == "ours":
        return BayesPruneCallback(
            num_data,
            temperature=method.temperature,
            std_lr=method.std_lr,
            max_noise_cost=None,
            prune=schedule,
            convert={"std": method.std, "filter_fn": selected},
        )
    assert schedule is not None, "the controls only remove"
    return RemoveGradually(method.kind, schedule, selected, seed=seed, score_optimizer=method.score_optimizer)


def train(
    model: Any,
    data: list[Any],
    collate: Any,
    added: TrainerCallback | None,
    *,
    batch: int,
    lr: float,
    seed: int,
    bf16: bool = False,
) -> Trainer:
    """One epoch of the stock Trainer through the data as they are ordered; the model is left ready for evaluation."""
    dataset: Any = data
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=len(data) // batch,
            per_device_train_batch_size=batch,
            train_sampling_strategy="sequential",
            learning_rate=lr,
            warmup_steps=0.1,
            bf16=bf16,
            use_cpu=True,
            seed=seed,
            save_strategy="no",
            report_to="none",
            logging_steps=len(data) // batch,
            disable_tqdm=True,
        )
        callbacks = [added] if added else None
        trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=collate, callbacks=callbacks)
        trainer.train()
    for name in ("forward", "_original_forward"):  # accelerate's autocast would stay in evaluations
        vars(model).pop(name, None)
    return trainer


def halve(model: nn.Module, inputs: dict[str, Tensor], inside: str, method: Method, seed: int) -> ChannelReport:
    """Removes half of the heads and of the neurons of the layers that have `inside` in their names."""
    torch.manual_seed(seed)
    macs = macs_by_module(model, inputs)
    halved = sum(count for name, count in macs.items() if inside in name)
    importances = {"magnitude": tp.importance.MagnitudeImportance, "random": tp.importance.RandomImportance}
    report = bp.prune_channels(
        model,
        inputs,
        granularity=("heads", "mlp"),
        target=f"macs={(sum(macs.values()) - halved / 2 + 0.5) / sum(macs.values())}",
        uniform=True,
        importance=bp.SNRImportance(method.power) if method.kind == "ours" else importances[method.kind](),
    )
    bp.to_deterministic(model)
    return report


def like_lengths(examples: list[Any], steps: int, batch: int, seed: int) -> list[Any]:
    """As many batches as steps, epoch after epoch: sentences of like length together, the batches in random order."""
    chance, ordered = random.Random(seed), []
    while len(ordered) < steps * batch:
        epoch = sorted(chance.sample(examples, len(examples)), key=lambda example: len(example["input_ids"]))
        starts = range(chance.randrange(batch), len(epoch) - batch + 1, batch)
        ordered += [e for start in chance.sample(starts, len(starts)) for e in epoch[start : start + batch]]
    return ordered[: steps * batch]


@torch.no_grad()
def timed(dense: nn.Module, small: nn.Module, inputs: dict[str, Tensor], name: str) -> dict[str, Any]:
    """Seconds of both in turn, and the median of their ratios over rounds."""

    def seconds(model: nn.Module, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            model(**inputs)
        return (time.perf_counter() - start) / repeats

    repeats = 5 if len(inputs["input_ids"]) == 1 else 1
    rounds = [(seconds(dense, repeats), seconds(small, repeats)) for _ in range(22)][2:]
    return {
        f"{name}: tokens": inputs["input_ids"].shape[1],
        f"{name}: dense": median(first for first, _ in rounds),
        f"{name}: small": median(second for _, second in rounds),
        f"{name}: ratio": median(first / second for first, second in rounds),
    }
