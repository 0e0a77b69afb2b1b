"""What the user asked for as a model and its task, from timm or transformers; nothing is trained yet."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from typer import BadParameter

from bayesprune.app.data.images import Data, load_data
from bayesprune.app.tasks.task import Task

HF_TASKS = ("text-classification", "causal-lm", "image-classification")


@dataclass(frozen=True)
class Defaults:
    """Values that are taken where the user names none."""

    num_epochs: int
    train_lr: float
    lr: float
    batch_size: int
    granularity: tuple[str, ...]


DEFAULTS = {
    "timm": Defaults(num_epochs=8, train_lr=3e-3, lr=1e-3, batch_size=64, granularity=("heads", "mlp", "width")),
    "hf": Defaults(num_epochs=3, train_lr=5e-5, lr=5e-5, batch_size=32, granularity=("heads", "mlp")),
}


@dataclass(frozen=True)
class Request:
    """The options of `bayesprune compress` that name a model and its data, as they were given."""

    model: str
    task: str | None
    checkpoint: Path | None
    pretrained: bool
    train: bool
    data: str | None
    data_dir: Path | None
    download: bool
    augment: bool
    image_size: int | None
    text_column: str | None
    label_column: str | None
    max_length: int | None
    batch_size: int
    seed: int
    device: str | None


@dataclass(frozen=True)
class Job:
    """A model on its device, the task it is for, and why it is trained first; None where it is not."""

    model: nn.Module
    task: Task
    untrained: str | None


def library_of(model: str) -> str:
    """The library that `--model` names by its beginning.

    Raises:
        BadParameter: it is none of the libraries.
    """
    library, separator, name = model.partition(":")
    if library not in DEFAULTS or not separator or not name:
        raise BadParameter(
            f"{model!r}; expected timm:NAME, such as timm:resnet18, or hf:NAME, a folder or a model of the Hub.",
            param_hint="--model",
        )
    return library


def prepare(request: Request) -> Job:
    """The job that was asked for.

    Raises:
        BadParameter: options contradict each other.
        ValueError: model and data do not fit each other, or are not there.
        OSError: a file cannot be read.
    """
    is_text = request.task in ("text-classification", "causal-lm")
    if is_text:
        images = {"--image-size": request.image_size, "--augment": request.augment, "--download": request.download}
        _refuse({**images, "--data-dir": request.data_dir}, "for images, not for texts")
    else:
        texts = {"--text-column": request.text_column, "--label-column": request.label_column}
        _refuse(
            {**texts, "--max-length": request.max_length}, "for texts, with --task text-classification or causal-lm"
        )
        data = request.data or ""
        if not data.startswith("torch/"):
            _refuse({"--download": request.download}, "for images of torch/NAME")
        if not data.startswith(("torch/", "hfds/")):
            _refuse({"--data-dir": request.data_dir}, "for images of torch/NAME and hfds/NAME")
    if request.task == "causal-lm":
        _refuse({"--label-column": request.label_column}, "for text-classification; causal-lm has no labels")
    if library_of(request.model) == "hf":
        return _from_transformers(request)
    if request.task not in (None, "image-classification"):
        raise BadParameter(f"{request.task!r}; timm's models are for image-classification.", param_hint="--task")
    return _from_timm(request)


def _from_timm(request: Request) -> Job:
    from bayesprune.hosts.timm import reload as host  # an extra: the error says how to install it

    if find_spec("accelerate") is None:
        raise ModuleNotFoundError('timm:NAME needs accelerate, which is not installed: pip install "bayesprune[timm]"')
    from accelerate import Accelerator

    from bayesprune.app.tasks.loop import LoaderTask, check_launch

    device = request.device or _default_device()
    accelerator = Accelerator(cpu=device == "cpu", device_placement=False)
    check_launch(accelerator, request.device)
    _check_usable(device)
    name = request.model.removeprefix("timm:")
    is_trained = request.checkpoint is not None
    data = _images(request)(config=host.data_config(name) if is_trained or request.pretrained else None)
    model = host.create(
        name,
        num_classes=data.num_classes,
        input_size=data.input_size,
        checkpoint=request.checkpoint,
        pretrained=request.pretrained,
    )
    device = accelerator.device if accelerator.num_processes > 1 else device
    untrained = "it has no checkpoint" if not is_trained else "--train" if request.train else None
    return Job(model.to(device), LoaderTask(data, accelerator), untrained)


def _from_transformers(request: Request) -> Job:
    _refuse({"--checkpoint": request.checkpoint, "--pretrained": request.pretrained}, "for timm: hf:NAME has weights")
    if request.task not in HF_TASKS:
        raise BadParameter(f"{request.task!r}; expected one of {', '.join(HF_TASKS)}.", param_hint="--task")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadParameter(
            "hf:NAME was launched in several processes, and trains in one; leave accelerate launch or torchrun out.",
            param_hint="--model",
        )
    if request.data is None:
        raise BadParameter("hf:NAME needs data: a file, a folder or hfds/NAME.", param_hint="--data")
    device = _trainer_device(request.device)
    host, source = _transformers_host(), request.model.removeprefix("hf:")
    options = host.Options(
        request.text_column, request.label_column, request.max_length, request.batch_size, request.seed
    )
    if request.task == "text-classification":
        found = host.text_classification(source, request.data, options)
    elif request.task == "causal-lm":
        found = host.causal_lm(source, request.data, options)
    else:
        found = host.image_classification(source, _images(request), options)
    return Job(found.model.to(device), found.task, found.untrained or ("--train" if request.train else None))


def _images(request: Request) -> Callable[..., Data]:
    """`load_data` with all that the user says; what the model says is left."""

    def load(config: Mapping[str, Any] | None, **options: Any) -> Data:
        if options.get("transform") is not None:
            _refuse({"--image-size": request.image_size}, "set by the image processor that the model comes with")
        return load_data(
            request.data or "digits",
            root=request.data_dir,
            image_size=request.image_size,
            batch_size=request.batch_size,
            seed=request.seed,
            augment=request.augment,
            download=request.download,
            config=config,
            **options,
        )

    return load


def _refuse(options: Mapping[str, Any], why: str) -> None:
    if given := [name for name, value in options.items() if value]:
        raise BadParameter(f"{given[0]} is {why}; leave it out.")


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_usable(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        reason = str(error).splitlines()[0]
        raise BadParameter(f"{device!r} cannot be used here: {reason}", param_hint="--device") from error


def _trainer_device(device: str | None) -> str:
    """The Trainer finds its device itself, and can only be told to take none."""
    device = device or _default_device()
    if ":" in device or (device == "cuda" and torch.cuda.device_count() > 1):
        raise BadParameter(
            f"{device!r} with {torch.cuda.device_count()} GPUs; the Trainer takes all that it sees, and posteriors "
            "need one process for each: set CUDA_VISIBLE_DEVICES to one GPU, or name cpu.",
            param_hint="--device",
        )
    _check_usable(device)
    return device


def _transformers_host() -> ModuleType:
    if missing := [name for name in ("transformers", "accelerate") if find_spec(name) is None]:
        raise ModuleNotFoundError(
            f'hf:NAME needs {missing[0]}, which is not installed: pip install "bayesprune[transformers]"'
        )
    from bayesprune.app import texts as host

    return host
