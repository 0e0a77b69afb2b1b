"""One training by the stock Trainer, without files, bars or printed logs of its own."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_utils import PreTrainedModel

from bayesprune.app.tasks.task import Progress, check_finite
from bayesprune.hosts.transformers.callback import BayesPruneCallback
from bayesprune.hosts.transformers.distillation import DistillationCallback
from bayesprune.prune.weights.schedule import PruneSchedule
from bayesprune.train import Distillation

_LOGS_PER_EPOCH = 20


@dataclass(frozen=True)
class TrainingData:
    """What a Trainer is given: examples, how they become a batch, and how many are in one."""

    examples: Any
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    batch_size: int
    seed: int


def train(
    model: PreTrainedModel,
    data: TrainingData,
    progress: Progress,
    *,
    num_epochs: int,
    lr: float,
    learn_stds: bool = False,
    sparsity: float | None = None,
    distill: Distillation | None = None,
) -> None:
    """As `Task.train` says: AdamW without weight decay, a tenth of the steps to warm up, then linearly to zero.

    Single weights are removed between a tenth and seven tenths of the training.
    """
    steps_per_epoch = -(-len(data.examples) // data.batch_size)
    num_steps = steps_per_epoch * num_epochs
    is_cpu = model.device.type == "cpu"
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            num_train_epochs=num_epochs,
            per_device_train_batch_size=data.batch_size,
            learning_rate=lr,
            weight_decay=0.0,
            warmup_steps=num_steps // 10,
            logging_steps=max(1, steps_per_epoch // _LOGS_PER_EPOCH),
            logging_first_step=True,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=data.seed,
            use_cpu=is_cpu,
            dataloader_pin_memory=not is_cpu,
        )
        callbacks: list[TrainerCallback] = []
        if learn_stds:
            prune = None if sparsity is None else PruneSchedule(f"weights={1 - sparsity}")
            callbacks.append(BayesPruneCallback(prune=prune))
        if distill is not None:
            callbacks.append(DistillationCallback(distill))
        with progress.training(num_epochs, steps_per_epoch) as advance:
            callbacks.append(_Steps(advance, lr))
            trainer = Trainer(
                model, arguments, train_dataset=data.examples, data_collator=data.collate, callbacks=callbacks
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    model.eval()
    model.zero_grad()


class _Steps(TrainerCallback):
    """Reports each step with the most recently logged loss."""

    def __init__(self, advance: Callable[[float], None], lr: float) -> None:
        self.advance, self.lr, self.loss = advance, lr, float("nan")
        self.is_pending = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Keeps the loss."""
        if "loss" in event["logs"]:
            self.loss = check_finite(float(event["logs"]["loss"]), self.lr)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Waits for the log."""
        self.is_pending = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Tells of the step before."""
        if self.is_pending:
            self.advance(self.loss)
        self.is_pending = False

    on_train_end = on_step_begin
