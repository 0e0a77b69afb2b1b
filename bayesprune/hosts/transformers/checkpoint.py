"""What a Trainer's checkpoint needs beside its own files to continue an attachment: one safetensors file, no pickle."""

import hashlib
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bayesprune.errors import StorageError
from bayesprune.foundation.sharding import whole
from bayesprune.layers import named_gates, named_posteriors
from bayesprune.train.attachment import Attachment
from bayesprune.train.state import flattened, restored

_LOGGER = logging.getLogger(__name__)

FILE_NAME = "bayesprune_training.safetensors"
_FORMAT_VERSION = 2
_NAMES_DIFFER = (
    "the Trainer loads nothing from checkpoints of a model whose names on disk differ from those in memory. "
    "Put `model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)` before "
    "Trainer(...)."
)
_FINGERPRINT_SIZE = 1024  # stds of each parameter


@dataclass(frozen=True)
class Saved:
    """What was read: the attachment's state, and the number of examples or label tokens it was attached with."""

    attachment: dict[str, Any]
    num_data: int


def write(args: TrainingArguments, step: int, attachment: Attachment, model: nn.Module) -> None:
    """Puts the attachment's state into the checkpoint of this step, whole or not at all; every process calls it."""
    directory = _of_step(args, step)
    if args.should_save and not directory.is_dir():  # the search for hyperparameters has folders of its own
        _LOGGER.warning("there is no %s: this trial's checkpoint cannot be resumed", directory)
        return
    tensors, outline = flattened(attachment.state_dict())
    tensors = {key: whole(value).detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
    about = {
        "format_version": _FORMAT_VERSION,
        "fingerprint": fingerprint(model),
        "num_data": attachment.num_data,
        "attachment": outline,
    }
    if not args.should_save:
        return
    partial = directory / f"{FILE_NAME}.partial"
    save_file(tensors, partial, metadata={"bayesprune": json.dumps(about)})
    partial.replace(directory / FILE_NAME)


def read(args: TrainingArguments, step: int, model: nn.Module) -> Saved:
    """The state saved at this step with the stds that the model, which was loaded already, has.

    Raises:
        StorageError: there is none.
    """
    named = [Path(args.resume_from_checkpoint)] if args.resume_from_checkpoint else []  # callbacks are not told another
    looked = [directory / FILE_NAME for directory in (*named, _of_step(args, step))]
    expected = fingerprint(model)
    for path in looked:
        if path.is_file() and (about := _about(path))["fingerprint"] == expected:
            return _read(path, about)
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


def warn_unless_best_is_loaded(directory: str | None, model: nn.Module) -> None:
    """Says so where `load_best_model_at_end` has left the last model in place of the best."""
    path = Path(directory or "") / FILE_NAME
    if directory and path.is_file() and _about(path)["fingerprint"] != fingerprint(model):
        warnings.warn(f"the best model, {directory}, was not loaded: {_NAMES_DIFFER}", stacklevel=2)


def fingerprint(model: nn.Module) -> str:
    """A digest of the beginnings of log stds and gates: equal for the model that was saved and the one loaded."""
    digest = hashlib.sha256()
    for part in (*_parts(model), *(gate.logits for _, gate in named_gates(model))):
        digest.update(whole(part.detach()).flatten()[:_FINGERPRINT_SIZE].cpu().numpy().tobytes())
    return digest.hexdigest()


def _of_step(args: TrainingArguments, step: int) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def _about(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {}).get("bayesprune", "{}"))
    if about.get("format_version") != _FORMAT_VERSION:
        raise StorageError(
            f"{path} has format version {about.get('format_version')!r}; expected {_FORMAT_VERSION}. Resume with the "
            "bayesprune version that saved it."
        )
    return about


def _read(path: Path, about: dict[str, Any]) -> Saved:
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return Saved(restored(tensors, about["attachment"]), about["num_data"])


def _parts(model: nn.Module) -> list[nn.Parameter]:
    """The log-std parameters in the order in which an attachment counts them."""
    return list({id(part): part for p in named_posteriors(model) for part in p.log_std_parts}.values())
