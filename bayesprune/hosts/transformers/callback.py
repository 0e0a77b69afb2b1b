"""A callback that makes the stock Trainer learn posteriors, remove weights while it trains, and say what it did.

The order of a Trainer's events is used as it is: the model is converted at `on_init_end`, before an optimizer, DDP or
FSDP sees its parameters; the attachment's hook adds the KL's gradient inside the optimizer's step, so the loss, its
accumulation and its average over processes stay the Trainer's own.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bayesprune.foundation import defaults
from bayesprune.foundation.model import load_values
from bayesprune.foundation.sharding import full_tensor, shard_like
from bayesprune.hosts.options import TrainingOptions, is_variational
from bayesprune.hosts.transformers import checkpoint
from bayesprune.hosts.transformers.counting import count_terms
from bayesprune.hosts.transformers.guards import (
    Frozen,
    LossScaleProbe,
    check_dtypes,
    check_parallelism,
    check_shapes,
    freeze_stds,
    probe_of,
    shapes,
    thaw,
    warn_of_pruning,
)
from bayesprune.hosts.transformers.logs import stand_before_loggers, summarize
from bayesprune.hosts.transformers.tolerance import Tolerance, evaluation_prefix
from bayesprune.priors import Prior
from bayesprune.prune.weights.schedule import PruneSchedule
from bayesprune.train.attachment import Attachment
from bayesprune.train.checks import check_num_data
from bayesprune.train.optimizers import add_to_first_group, unwrapped

_LOGGER = logging.getLogger(__name__)


class BayesPruneCallback(TrainerCallback):
    """Trains posteriors with the stock Trainer: `Trainer(..., callbacks=[BayesPruneCallback(prune="weights=0.2")])`.

    Each step is one on mean NLL + temperature * KL / num_data. The Trainer's loss stays the NLL; `max_grad_norm` clips
    the NLL's gradient, with that of the stds in the norm, and not the KL's, which weighs more where it clips often.
    Logs get `nll` (the loss), `kl_nats`, `temperature`, `sparsity`, `snr_median` and `snr_below_1` (of the weights that
    are kept), evaluations the last three with their prefix, and with a tolerance `eval_compression_score`; each can be
    `metric_for_best_model`. Checkpoints hold the posterior, the masks and the state of the stds, so
    `resume_from_checkpoint` continues the same run.

    Works with gradient accumulation and checkpointing, bf16 and fp16, label smoothing, DDP, and FSDP 2, where each
    process holds the masks whole (a byte a weight). Frozen layers stay as they are, and `prune` is a fraction of the
    others: on a model with adapters (PEFT), of the adapters, whose checkpoints, `save_pretrained` and
    `merge_and_unload` are those of PEFT.
    The saved model has the stock keys, so that any `from_pretrained` reads the means, zeros included. Heads, neurons
    and channels are removed after `trainer.train()`, with `prune_channels`.
    """

    def __init__(
        self,
        num_data: int | None = None,
        prior: Prior | None = None,
        *,
        temperature: float | Literal["auto"] = defaults.TEMPERATURE,
        warmup: float = defaults.WARMUP,
        std_lr: float = defaults.STD_LR,
        max_noise_cost: float | None = defaults.MAX_NOISE_COST,
        prune: str | PruneSchedule | None = None,
        tolerance: Tolerance | None = None,
        convert: Mapping[str, Any] | None = None,
    ) -> None:
        """Takes effect in the Trainer it is given to; one callback serves one Trainer.

        Args:
            num_data: Terms that the training loss is a mean over: examples, or label tokens for a language model. None
                counts them in the training data.
            prior: The prior; None is `priors.Gaussian("layer_rms")`, fixed at the weights when training begins.
            temperature: Weight of the KL; see `attach`.
            warmup: Share of the training, 0 to 1, over which the weight of the KL rises linearly from zero.
            std_lr: Learning rate of the log stds; see `attach`.
            max_noise_cost: What the noise may add to the loss, in nats; see `attach`.
            prune: "weights=0.2", the fraction that is kept in the end of the weights that can go, or a schedule; None
                removes none.
            tolerance: When compression has cost too much accuracy, and what happens then; None never looks.
            convert: Options of `to_variational`, for a model that is not variational yet.

        Raises:
            ValueError: a number is out of range.
        """
        if num_data is not None:
            check_num_data(num_data)
        self.num_data, self.tolerance = num_data, tolerance
        self._options = TrainingOptions(prior, temperature, warmup, std_lr, max_noise_cost, prune, convert)
        self._attachment: Attachment | None = None
        self._probe: LossScaleProbe | None = None
        self._shapes: dict[str, tuple[torch.Size, ...]] = {}
        self._within_tolerance: dict[str, Tensor] | None = None
        self._within_step: int | None = None  # where the model was that; None is in another run
        self._ended: dict[str, Tensor] | None = None  # the model with which the tolerance had ended the run resumed
        self._is_ended = False
        self._evaluated_names: set[str] = set()  # of the metrics, on all sets
        self._frozen: Frozen = []

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Converts the model, before optimizer and wrappers exist.

        Raises:
            UnsupportedModelError: the model is spread in a way that posteriors cannot follow.
            ValueError: no layer can be converted, or `convert` was given for a model that is variational.
        """
        stand_before_loggers(self)
        accelerator = AcceleratorState()
        plugin, prunes = getattr(accelerator, "fsdp_plugin", None), self._options.schedule is not None
        check_parallelism(
            accelerator.distributed_type.name,
            fsdp_version=plugin.fsdp_version if plugin is not None else 0,
            num_threads=args.n_gpu,
            sends_masks=prunes and plugin is not None and bool(plugin.cpu_ram_efficient_loading),
        )
        model = event["model"]
        self._options.convert_model(model)  # with masks: FSDP and PEFT load into those that are there
        optimizer = event.get("optimizer")
        if optimizer is not None:  # the user's: its saved state is loaded before the attachment is made
            add_to_first_group(unwrapped(optimizer), checkpoint.moved_by_attachment(model))
        if prunes:
            warn_of_pruning(model)
        if plugin is not None:
            check_dtypes(model, accelerator.mixed_precision)
            self._frozen = freeze_stds(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Attaches to the optimizer; on resume, with the state that was saved.

        Raises:
            ValueError: the model is not variational, or the number of training examples cannot be found.
            StorageError: the checkpoint holds no state of an attachment that fits.
            UnsupportedModelError: FSDP 1 or DeepSpeed.
        """
        model, loader = event["model"], event["train_dataloader"]
        self._end()
        stand_before_loggers(self)
        thaw(self._frozen)
        self._frozen = []
        if not is_variational(model):
            raise ValueError(
                f"{type(model).__name__} is not variational when training begins: BayesPruneCallback was added after "
                "the Trainer was made, or model_init built a new model. Pass Trainer(callbacks=[callback]), or return "
                "bayesprune.to_variational(model) from model_init."
            )
        saved = checkpoint.read(args, state.global_step, model) if state.global_step else None
        num_data = self.num_data
        if num_data is None:
            num_data = saved.num_data if saved is not None else count_terms(loader, model)
        optimizer, num_steps = event["optimizer"], state.max_steps
        self._attachment = self._options.attach(optimizer, model, num_data=num_data, num_steps=num_steps)
        if saved is not None:
            self._attachment.load_state_dict(saved.attachment)
        self._shapes = shapes(model)
        self._evaluated_names = set()
        self._resume_tolerance(saved, state, model)
        self._probe = probe_of(model, args, loader)

    def _resume_tolerance(self, saved: checkpoint.Saved | None, state: TrainerState, model: nn.Module) -> None:
        """Takes up what the tolerance had done so far."""
        self._within_tolerance, self._within_step = self._copy(model), state.global_step
        if saved is not None and saved.within_tolerance is not None and self._within_tolerance is not None:
            own = model.state_dict()
            within = {key: shard_like(value, own[key]) for key, value in saved.within_tolerance.items()}
            self._within_tolerance, self._within_step = _on_cpu(within), None
        self._is_ended = saved is not None and saved.ended_by is not None and saved.ended_by == self._limits()
        self._ended = _on_cpu(model.state_dict()) if self._is_ended else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Undoes the step, which the Trainer takes in any case, where a tolerance had ended the run that is resumed."""
        if self._ended is not None:
            load_values(event["model"], self._ended)
            control.should_training_stop = True
            _LOGGER.warning(
                "the tolerance had ended this training before step %d already: it ends again, with the model of the "
                "checkpoint. Another tolerance would let it go on.",
                state.global_step,
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Looks at the model once more.

        Raises:
            RuntimeError: the model was cut since training began.
            ValueError: evaluations took place, and none has the metric of the tolerance.
        """
        check_shapes(event["model"], self._shapes)
        self._check_evaluations()
        if self._probe is not None:
            self._probe.begin()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Looks once at the scale of the loss.

        Raises:
            ValueError: accumulation or processes multiply the loss (transformers issue 47688).
        """
        if self._probe is not None:
            self._probe.check(event["optimizer"])

    on_pre_optimizer_step = on_substep_end

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Adds to what the loggers, which come after it, are going to write."""
        logs, model = event["logs"], event["model"]
        if not is_variational(model):
            return
        if "loss" in logs and self._attachment is not None:
            with torch.no_grad():
                kl = float(full_tensor(self._attachment.kl_divergence()))
            added = {
                "nll": logs.get("nll", logs["loss"]),
                "kl_nats": kl,
                "temperature": self._attachment.temperature_at(self._attachment.step),
                **summarize(model),
            }
        else:
            added = self._evaluated(logs, state, model)
        logs.update(added)
        if state.log_history:
            state.log_history[-1].update(added)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Ends the training where the metric fell past the tolerance.

        Raises:
            ValueError: the evaluation has no such metric.
        """
        metrics, model = event["metrics"], event["model"]
        if (evaluation_prefix(metrics) or "").startswith("eval"):
            self._evaluated_names |= metrics.keys()
        metrics.update(self._evaluated(metrics, state, model))
        shortfall = self._shortfall(metrics, state)
        if self._attachment is None or self.tolerance is None or shortfall is None:
            return
        is_compressed = self._options.schedule is None or self._attachment.sparsity > 0
        if not (is_compressed and self.tolerance.is_exceeded(shortfall)):
            self._within_tolerance, self._within_step = self._copy(model), state.global_step
            return
        control.should_training_stop = self._is_ended = True
        if self._within_tolerance is not None:
            load_values(model, self._within_tolerance)
            self._within_step = state.global_step
        _LOGGER.warning(
            "%s is %g at step %d, %g worse than the reference: the training ends%s",
            self.tolerance.key,
            metrics[self.tolerance.key],
            state.global_step,
            shortfall,
            " with the model of the evaluation before" if self._within_tolerance is not None else "",
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Adds the attachment's state to the checkpoint."""
        if self._attachment is not None and not args.save_only_model:
            checkpoint.write(
                args,
                state.global_step,
                self._attachment,
                event["model"],
                within_tolerance=None if self._within_step == state.global_step else self._within_tolerance,
                ended_by=self._limits() if self._is_ended else None,
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Leaves optimizer and model to themselves; removed weights stay zeros.

        Raises:
            ValueError: evaluations took place, and none has the metric of the tolerance.
        """
        if self._attachment is not None and args.load_best_model_at_end:
            checkpoint.warn_unless_best_is_loaded(state.best_model_checkpoint, event["model"])
        self._end()
        self._check_evaluations()

    def _check_evaluations(self) -> None:
        if self.tolerance is not None and self._evaluated_names:
            self.tolerance.check(self._evaluated_names)

    def _end(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()
        if self._probe is not None:
            self._probe.end()
        self._attachment = self._probe = self._within_tolerance = self._ended = None
        self._is_ended = False

    def _evaluated(self, metrics: Mapping[str, Any], state: TrainerState, model: nn.Module) -> dict[str, float]:
        """What an evaluation's metrics get, unless they have it; nothing for other logs."""
        prefix = evaluation_prefix(metrics)
        if prefix is None or f"{prefix}_sparsity" in metrics:
            return {}
        values = summarize(model)
        shortfall = self._shortfall(metrics, state) if values else None
        if self.tolerance is not None and shortfall is not None:
            values["compression_score"] = self.tolerance.score(values["sparsity"], metrics, shortfall)
        return {f"{prefix}_{key}": value for key, value in values.items()}

    def _shortfall(self, metrics: Mapping[str, Any], state: TrainerState) -> float | None:
        return self.tolerance.shortfall(metrics, state.log_history) if self.tolerance is not None else None

    def _copy(self, model: nn.Module) -> dict[str, Tensor] | None:
        if self.tolerance is None or self.tolerance.then != "rollback":
            return None
        return _on_cpu(model.state_dict())

    def _limits(self) -> dict[str, Any] | None:
        return None if self.tolerance is None else asdict(self.tolerance)


def _on_cpu(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().to("cpu", copy=True) for key, value in values.items()}
