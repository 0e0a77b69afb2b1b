"""A task around any of timm's training tasks, with which timm's own loop learns posteriors and removes weights.

timm's loop asks its task for everything: the loss, the module the optimizer gets, what is clipped, averaged (EMA) and
checkpointed. So conversion before the optimizer, masks before the average, and the attachment's state in checkpoints
are all said here, and the loop stays as it is. What is not said here is answered by the task inside.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from bayesprune.errors import StorageError
from bayesprune.foundation import defaults
from bayesprune.hosts.options import TrainingOptions
from bayesprune.layers import named_posteriors, variational_layers
from bayesprune.priors import Prior
from bayesprune.prune.weights.schedule import PruneSchedule
from bayesprune.train.attachment import Attachment

_KEY = "bayesprune"


class BayesPruneTask(nn.Module):
    """A timm task that trains posteriors: `task = BayesPruneTask(ClassificationTask(model))`, then `task.attach(...)`.

    Goes around any of timm's tasks (classification, multi-label, distillation, where the student learns posteriors),
    before the optimizer, `setup_ema`, `compile` and `prepare_distributed`. Each update is one on the task's loss +
    temperature * KL / num_data. `state_dict` keys of checkpoints are those of the model, and `task_state` holds the
    attachment, so that timm's `--resume` continues the same run.

    - Clipping ("norm", "value", "agc") sees the gradients of the loss in the parameters of the stock model: stds are
      neither clipped nor counted, and the KL comes after it.
    - Frozen layers stay as they are, and `prune` is a fraction of the others.
    - The average (EMA) has the same zeros as the model after each update.
    - `no_weight_decay()` of the model names the stds as well.

    Attributes:
        task: The task inside.
        model: The model that is converted, without the wrappers around it.
    """

    task: Any
    model: nn.Module

    def __init__(
        self,
        task: Any,
        *,
        prior: Prior | None = None,
        temperature: float | Literal["auto"] = defaults.TEMPERATURE,
        warmup: float = defaults.WARMUP,
        std_lr: float = defaults.STD_LR,
        max_noise_cost: float | None = defaults.MAX_NOISE_COST,
        prune: str | PruneSchedule | None = None,
        convert: Mapping[str, Any] | None = None,
    ) -> None:
        """Converts the task's model, in place.

        Args:
            task: Any task of timm >= 1.0.27.
            prior: The prior; None is `priors.Gaussian("layer_rms")`, fixed at the weights when `attach` is called.
            temperature: Weight of the KL; see `train.attach`.
            warmup: Share of the updates, 0 to 1, over which the weight of the KL rises linearly from zero.
            std_lr: Learning rate of the log stds; see `attach`.
            max_noise_cost: What the noise may add to the loss, in nats; see `attach`.
            prune: "weights=0.2", the fraction that is kept in the end of the weights that can go, or a schedule; None
                removes none.
            convert: Options of `to_variational`, for a model that is not variational yet.

        Raises:
            TypeError: it is no task of timm, or that of a version whose tasks do not write checkpoints.
            ValueError: a number is out of range, the task has an EMA already, no layer can be converted, or `convert`
                was given for a model that is variational.
            UnsupportedModelError: the model is compiled or wrapped already.
        """
        super().__init__()
        if not hasattr(task, "get_checkpoint_state"):
            raise TypeError(
                f"BayesPruneTask got {type(task).__name__}; expected a task of timm >= 1.0.27, such as "
                "timm.task.ClassificationTask(model)."
            )
        if task.has_ema():
            raise ValueError(
                f"{type(task).__name__} has an average (EMA) of the stock model, which would have no posteriors; make "
                "the BayesPruneTask before setup_ema()."
            )
        self.task = task
        self._options = TrainingOptions(prior, temperature, warmup, std_lr, max_noise_cost, prune, convert)
        model: nn.Module = task.get_eval_model()  # of a distillation the student
        self.__dict__["model"] = model  # a part of the task, not one beside it
        self._options.convert_model(model)  # with masks: the average copies buffers by position
        self._keep_stds_from_decay()
        self._attachment: Attachment | None = None
        self._saved: dict[str, Any] | None = None

    def attach(
        self, optimizer: Optimizer, loader: Any = None, *, num_steps: int, num_data: int | None = None
    ) -> Attachment:
        """Makes each step of this optimizer one on loss + temperature * KL / num_data; before or after a resume.

        Args:
            optimizer: The optimizer of the task's trainable module.
            loader: The training loader, whose data set says how many examples there are.
            num_steps: Updates that the whole training has, those before a resume included: epochs times updates per
                epoch. `warmup` and `prune` are shares of it.
            num_data: Terms that the loss is a mean over. None is the number of examples, times the number of classes
                for a binary cross-entropy that is a mean over classes, too.

        Returns:
            The attachment, for its `kl_divergence()` or `step`.

        Raises:
            ValueError: a number is out of range or cannot be found, the optimizer holds none of the model, or the
                checkpoint that was resumed from has other posteriors.
        """
        self.detach()
        num_data = self._count(loader) if num_data is None else num_data
        self._attachment = self._options.attach(optimizer, self.model, num_data=num_data, num_steps=num_steps)
        if self._saved is not None:
            self._attachment.load_state_dict(self._saved)
            self._saved = None
        return self._attachment

    def detach(self) -> None:
        """Leaves optimizer and model to themselves; removed weights stay zeros."""
        if self._attachment is not None:
            self._attachment.detach()
        self._attachment = None

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The loss and the outputs of the task inside.

        Raises:
            RuntimeError: `attach` was not called.
        """
        if self._attachment is None and self.training:
            raise RuntimeError(
                "the task has no optimizer, and none would update the stds; call task.attach(optimizer, "
                "loader_train, num_steps=num_epochs * updates_per_epoch) before the first epoch."
            )
        return self.task(*args, **kwargs)

    def update_ema(self, step: int | None = None) -> None:
        """The average takes up this update, and what was removed is removed from it."""
        self.task.update_ema(step=step)
        ema = self.task.get_trainable_module(ema=True)
        for _, layer in variational_layers(ema) if ema is not None else ():
            layer.apply_masks()

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """The parameters of the stock model that the task inside would clip; `exclude_head` leaves out the last two."""
        stds = {id(part) for posterior in named_posteriors(self.model) for part in posterior.log_std_parts}
        stock = [id(parameter) for parameter in self.model.parameters() if id(parameter) not in stds]
        left_out = stds | set(stock[-2:] if exclude_head else ())
        return [p for p in self.task.get_clip_parameters() if id(p) not in left_out]

    def get_task_state(self, *args: Any, ema: bool = False, **kwargs: Any) -> dict[str, Any]:
        """The state that the task inside keeps beside the model's state dict, and the attachment's."""
        state = dict(self.task.get_task_state(*args, ema=ema, **kwargs))
        own = self._saved if self._attachment is None else self._attachment.state_dict()
        return state if ema or own is None else {**state, _KEY: own}

    def get_checkpoint_state(self, ema: bool = False, **kwargs: Any) -> dict[str, Any]:
        """The state of this task for a checkpoint; tensors and numbers only."""
        state = dict(self.task.get_checkpoint_state(ema=ema, **kwargs))
        return state if ema else {**state, "task_state": self.get_task_state()}

    def load_checkpoint_state(
        self,
        state_dict: Mapping[str, Any],
        task_state: Mapping[str, Any] | None = None,
        ema: bool = False,
        **kwargs: Any,
    ) -> None:
        """Continues from what `get_checkpoint_state` gave; the attachment's part waits for `attach` if need be.

        Raises:
            StorageError: the checkpoint is of a run without posteriors.
        """
        task_state = dict(task_state or {})
        own: dict[str, Any] | None = task_state.pop(_KEY, None)
        if ema:
            own = None  # an average that is loaded from the model of a checkpoint without one
        elif own is None:
            raise StorageError(
                "the checkpoint holds no state of a BayesPruneTask: it is of a run that trained no posteriors. Start "
                "from its weights instead: timm.create_model(checkpoint_path=...), --initial-checkpoint of train.py."
            )
        self.task.load_checkpoint_state(state_dict, task_state or None, ema=ema, **kwargs)
        if own is not None and self._attachment is not None:
            self._attachment.load_state_dict(own)
        elif own is not None:
            self._saved = own

    def prepare_distributed(self, *args: Any, **kwargs: Any) -> "BayesPruneTask":
        """Wraps what is trained in DDP."""
        self.task.prepare_distributed(*args, **kwargs)
        return self

    def compile(self, *args: Any, **kwargs: Any) -> Any:
        """Compiles what the task inside compiles."""
        return self.task.compile(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("task"), name)

    def _keep_stds_from_decay(self) -> None:
        """`create_optimizer_v2` asks the model what is not to decay."""
        stds = {id(part) for posterior in named_posteriors(self.model) for part in posterior.log_std_parts}
        names = {name for name, parameter in self.model.named_parameters() if id(parameter) in stds}
        names |= set(getattr(self.model, "no_weight_decay", set)())
        self.model.__dict__["no_weight_decay"] = functools.partial(set, names)

    def _count(self, loader: Any) -> int:
        dataset = getattr(loader, "dataset", None)
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"the number of training examples is unknown: {type(dataset).__name__} has no length. Pass "
                "attach(..., num_data=...)."
            )
        criterion = getattr(self.task, "criterion", None)
        is_binary = isinstance(criterion, nn.BCEWithLogitsLoss) or getattr(criterion, "sum_classes", None) is False
        is_over_classes = is_binary and getattr(criterion, "reduction", None) == "mean"
        num_classes = int(self.model.num_classes) if is_over_classes else 1  # type: ignore[arg-type]
        return len(dataset) * num_classes  # type: ignore[arg-type]
