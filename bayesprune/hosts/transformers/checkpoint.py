"""What a Trainer's checkpoint needs beside its own files to continue an attachment: one safetensors file, no pickle."""

import hashlib
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bayesprune.errors import StorageError
from bayesprune.foundation.batches import device_of
from bayesprune.foundation.sharding import full_tensor, whole_values
from bayesprune.layers import named_auxiliaries, named_posteriors
from bayesprune.storage.state import read_about, read_state, write_state
from bayesprune.train.attachment import Attachment

_LOGGER = logging.getLogger(__name__)

FILE_NAME = "bayesprune_training.safetensors"
_NAMES_DIFFER = (
    "the Trainer loads nothing from checkpoints of a model whose names on disk differ from those in memory. "
    "Put `model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)` before "
    "Trainer(...)."
)
_WITHIN = "within_tolerance"
_FINGERPRINT_SIZE = 1024  # stds of each parameter


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds beside the Trainer's own files.

    Attributes:
        attachment: The attachment's state.
        num_data: Number of examples or label tokens that it was attached with.
        within_tolerance: Values of the model to roll back to; None where those are the checkpoint's own.
        ended_by: The tolerance that had ended the training there; None where none had.
    """

    attachment: dict[str, Any]
    num_data: int
    within_tolerance: dict[str, Tensor] | None = None
    ended_by: dict[str, Any] | None = None


def write(
    args: TrainingArguments,
    step: int,
    attachment: Attachment,
    model: nn.Module,
    *,
    within_tolerance: Mapping[str, Tensor] | None = None,
    ended_by: dict[str, Any] | None = None,
) -> None:
    """Puts all that `Saved` says into the checkpoint of this step, whole or not at all; every process calls it."""
    directory = _of_step(args, step)
    state = whole_values(attachment.state_dict())  # which waits for all processes, so each of them does it
    if within_tolerance is not None:
        state |= {_WITHIN: gathered(within_tolerance, model)}
    about = {"fingerprint": fingerprint(model), "num_data": attachment.num_data, "ended_by": ended_by}
    if args.should_save and not directory.is_dir():  # the search for hyperparameters has folders of its own
        _LOGGER.warning("there is no %s: this trial's checkpoint cannot be resumed", directory)
    elif args.should_save:
        write_state(directory / FILE_NAME, state, about)


def read(args: TrainingArguments, step: int, model: nn.Module) -> Saved:
    """The state saved at this step with the stds that the model, which was loaded already, has.

    Raises:
        StorageError: there is none.
    """
    given: Any = args.resume_from_checkpoint  # callbacks are not told another; True is the last of the output directory
    named = [Path(given)] if isinstance(given, str | PathLike) else []
    looked = [directory / FILE_NAME for directory in (*named, _of_step(args, step))]
    expected = fingerprint(model)
    for path in looked:
        if path.is_file() and (about := read_about(path))["fingerprint"] == expected:
            state = read_state(path)
            within = state.pop(_WITHIN, None)
            return Saved(state, about["num_data"], within, about.get("ended_by"))
    there = [str(path) for path in looked if path.is_file()]
    if not there:
        raise StorageError(
            f"training resumes at step {step}, but there is no {' and no '.join(map(str, looked))}. Name the "
            "checkpoint in TrainingArguments(resume_from_checkpoint=...) as well; where it was saved "
            "without BayesPruneCallback, load its model and start a new training."
        )
    raise StorageError(
        f"training resumes at step {step}, but {there[0]} has other stds than the model that was loaded. If that is "
        "another run's checkpoint, name the right one in TrainingArguments(resume_from_checkpoint=...) as well. If the "
        f"Trainer said that keys were missing: {_NAMES_DIFFER}"
    )


def gathered(values: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Values of a model that lie on the CPU, whole; sharded ones are sent between the model's devices one by one."""
    device = device_of(model)
    return {
        key: full_tensor(value.to(device)).cpu() if hasattr(value, "full_tensor") else value
        for key, value in values.items()
    }


def warn_unless_best_is_loaded(directory: str | None, model: nn.Module) -> None:
    """Says so where `load_best_model_at_end` has left the last model in place of the best."""
    path = Path(directory or "") / FILE_NAME
    if directory and path.is_file() and read_about(path)["fingerprint"] != fingerprint(model):
        warnings.warn(f"the best model, {directory}, was not loaded: {_NAMES_DIFFER}", stacklevel=2)


def fingerprint(model: nn.Module) -> str:
    """A digest of the beginnings of log stds and gates: equal for the model that was saved and the one loaded."""
    digest = hashlib.sha256()
    for part in moved_by_attachment(model):
        digest.update(full_tensor(part.detach()).flatten()[:_FINGERPRINT_SIZE].cpu().numpy().tobytes())
    return digest.hexdigest()


def moved_by_attachment(model: nn.Module) -> list[nn.Parameter]:
    """The log stds, then those of the gates, in the order in which an attachment gives them to an optimizer."""
    parts = {id(part): part for posterior in named_posteriors(model) for part in posterior.log_std_parts}
    return [*parts.values(), *(part for _, module in named_auxiliaries(model) for part in module.parameters())]


def _of_step(args: TrainingArguments, step: int) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{step}"
