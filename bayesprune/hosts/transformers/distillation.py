"""A callback that makes the stock Trainer distil: the loss that the model returns becomes that of a student.

The Trainer computes its loss by calling the model, and takes what is in the output. So a hook on the model's forward is
the one place that a callback reaches: it stands inside DDP, FSDP 2 and accelerate's wrappers, sees inputs and outputs
alike, and leaves accumulation, clipping, scaling and the average over processes to the Trainer. It is there from the
beginning of a training to its end, and works in training mode alone, so that evaluations have the loss on the labels.
No event tells that an error or an interruption ended a training. So another hook looks who calls the model, and both
go where the Trainer which has the callback is not among the callers.
"""

import math
from collections.abc import MutableMapping
from contextlib import ExitStack
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bayesprune.errors import UnsupportedModelError
from bayesprune.hosts.transformers.guards import LossScaleProbe, probe_of
from bayesprune.hosts.transformers.logs import callers, stand_before_loggers
from bayesprune.train.distillation import Distillation

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NOTHING = [0, 0, 0, 0]  # sums of the loss, of the task's, of the divergences, and their number
_OWN_LOSS = (
    "Override compute_loss in its place, without the callback: loss, outputs = super().compute_loss(model, "
    "dict(inputs), True, **options), then distill(outputs, inputs, loss)."
)


class DistillationCallback(TrainerCallback):
    """Distils in any stock Trainer: `Trainer(small, ..., callbacks=[DistillationCallback(bp.distillation(dense))])`.

    For the recovery after `prune_channels`, and beside `BayesPruneCallback` for single weights that go while training
    goes on. The loss of each step is that of `bayesprune.distillation`, divided by what the Trainer divides the task's
    loss by: label tokens of all accumulated batches where the head knows them. Logs get `nll`, the part of the labels,
    and `distillation`, T^2 * KL in nats of this process's batches. A checkpoint needs nothing of it: whoever resumes
    makes the same teacher again, from the same files.
    """

    def __init__(self, distill: Distillation) -> None:
        """Takes effect in the Trainer it is given to.

        Args:
            distill: What `bayesprune.distillation` made.
        """
        self.distill = distill
        self._hooks = ExitStack()
        self._probe: LossScaleProbe | None = None
        self._is_used: bool | None = None
        self._sums: list[Any] = _NOTHING

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Puts the hook on the model.

        Raises:
            ValueError: the Trainer smooths labels, for which it takes them away from the model.
            UnsupportedModelError: one process drives several GPUs.
        """
        self._end()
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor} beside a DistillationCallback: the Trainer "
                "computes such a loss itself, past the model. The teacher's labels are soft already: leave the "
                f"smoothing out. {_OWN_LOSS}"
            )
        if args.n_gpu > 1:
            raise UnsupportedModelError(
                f"DistillationCallback got {args.n_gpu} GPUs in one process (nn.DataParallel), for which there is one "
                "teacher; start the program with torchrun, or set CUDA_VISIBLE_DEVICES to one GPU."
            )
        stand_before_loggers(self)
        model = event["model"]
        self._hooks = self.distill.watch(model)
        before = model.register_forward_pre_hook(torch.compiler.disable(self._before))
        after = model.register_forward_hook(torch.compiler.disable(self._after), with_kwargs=True)
        self._hooks.callback(before.remove)
        self._hooks.callback(after.remove)
        self._probe = probe_of(model, args, event["train_dataloader"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Makes the first forward an eager one where it is to be looked at."""
        if self._probe is not None:
            self._probe.begin()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Looks once at what became of the loss.

        Raises:
            ValueError: the Trainer does not take the model's loss, or accumulation or processes multiply it.
        """
        if self._is_used is False:
            raise ValueError(
                f"the Trainer's loss is not the one that {type(event['model']).__name__} gives. {_OWN_LOSS}"
            )
        if self._probe is not None:
            self._probe.check(event["optimizer"])

    on_pre_optimizer_step = on_substep_end

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Divides the loss into its parts, for the loggers that come after."""
        mixed, task, divergence, count = map(float, self._sums)
        if "loss" not in event["logs"] or not count:
            return
        added = {"distillation": divergence / count}
        if mixed and not math.isnan(task):
            added["nll"] = event["logs"]["loss"] * task / mixed
        event["logs"].update(added)
        if state.log_history:
            state.log_history[-1].update(added)
        self._sums = _NOTHING

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Leaves the model to itself."""
        self._end()

    def _end(self) -> None:
        self._hooks.close()
        if self._probe is not None:
            self._probe.end()
        self._probe = self._is_used = None
        self._sums = _NOTHING

    def _before(self, model: nn.Module, args: tuple) -> None:
        if not any(self in trainer.callback_handler.callbacks for trainer in callers(Trainer)):
            self._end()

    def _after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if not (model.training and torch.is_grad_enabled()):
            return None
        inputs = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
        if not isinstance(output, MutableMapping):
            raise TypeError(
                f"{type(model).__name__} returned {type(output).__name__}; expected an output with loss and logits by "
                "name: leave return_dict=False out."
            )
        task = output.get("loss")
        if task is None and self.distill.weight < 1:
            raise ValueError(f"{type(model).__name__} was called without labels, and gives no loss. {_OWN_LOSS}")
        precision = _PRECISIONS.get(AcceleratorState().mixed_precision)
        device = next(model.parameters()).device.type
        with torch.autocast(device, precision, enabled=precision is not None):
            divergences = self.distill.divergences(output, inputs)
        number = kwargs.get("num_items_in_batch")
        if isinstance(number, Tensor):  # the probe asks whether the head of the model used it
            number = (number if self.distill.weight == 1 else number.detach()).to(divergences.device)
        loss = output["loss"] = self.distill.mixed(divergences, task, number)
        if self._is_used is None:
            self._is_used = False
            loss.register_hook(self._arrived)
        parts = (loss, math.nan if task is None else task, divergences.sum(), divergences.numel())
        self._sums = [total + torch.as_tensor(part).detach() for total, part in zip(self._sums, parts, strict=True)]
        return output

    def _arrived(self, gradient: Tensor) -> None:
        self._is_used = True
