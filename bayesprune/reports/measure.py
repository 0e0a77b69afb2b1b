"""What a model costs and how good it is: parameters, multiply-accumulates, bytes, time, accuracy, perplexity.

One MAC is two FLOPs of `torch.utils.flop_counter`, which counts matrix products, convolutions and attention, and
nothing else: no biases, norms or activations.
"""

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesprune.foundation import macs
from bayesprune.foundation.batches import (
    IGNORED_LABEL,
    check_batches,
    check_labels,
    device_of,
    given,
    logits_of,
    on_device,
    split,
)
from bayesprune.foundation.kinds import EMBEDDING, kind_of
from bayesprune.foundation.latency import seconds_in_turn
from bayesprune.foundation.macs import COUNTER
from bayesprune.foundation.model import eval_mode

ExampleInputs: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
"""A tensor, a sequence of positional arguments, the list of images of a detector, or a mapping of keyword arguments."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and records no gradients; after it, each module has its own mode again."""
    with eval_mode(model), torch.no_grad():
        yield


REPORT_FILES = ("report.json", "report.csv", "report.html")


class ParameterCount(NamedTuple):
    """Parameters of a model, and how many of them are not zero."""

    total: int
    nonzero: int


class MacCount(NamedTuple):
    """Multiply-accumulates of one forward pass on the whole batch, and the counter that found them."""

    macs: int
    batch: int
    counter: str = COUNTER


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass on the whole batch, and the conditions that they hold for."""

    median_seconds: float
    q25_seconds: float
    q75_seconds: float
    num_repeats: int
    device: str
    num_threads: int
    batch: int
    dtype: str

    @property
    def conditions(self) -> tuple[str, int, int, str]:
        """Conditions that must be equal for two latencies to be compared."""
        return self.device, self.num_threads, self.batch, self.dtype


def deterministic_parameters(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of the network that is shipped, shared ones once: the stds of posteriors are left out."""
    for name, parameter in module.named_parameters(recurse=recurse):
        if not name.endswith("_log_std"):
            yield name, parameter


def count_parameters(model: nn.Module) -> ParameterCount:
    """Number of parameters and of non-zero ones; a shared parameter counts once, the stds of posteriors never."""
    total = nonzero = 0
    for _, parameter in deterministic_parameters(model):
        total += parameter.numel()
        nonzero += int(torch.count_nonzero(parameter.detach()))
    return ParameterCount(total, nonzero)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and persistent buffers, uncompressed; stds and masks of posteriors are left out."""
    state = model.state_dict(keep_vars=True)
    companions = {f"{name}_mask" for name in state} | {name for name in state if name.endswith("_log_std")}
    tensors = {
        id(value): value for name, value in state.items() if name not in companions and isinstance(value, Tensor)
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def file_bytes(path: str | Path) -> int:
    """Bytes of a file, or of all files below a directory except the report's own.

    Raises:
        FileNotFoundError: nothing is there.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file or directory {str(path)!r} to measure; save the model there first.")
    if path.is_file():
        return path.stat().st_size
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and f.name not in REPORT_FILES)


def count_macs(model: nn.Module, example_inputs: ExampleInputs) -> MacCount:
    """Multiply-accumulates of one forward pass on the example inputs."""
    return MacCount(sum(macs_by_module(model, example_inputs).values()), given(model, example_inputs).num_examples)


def macs_by_module(model: nn.Module, example_inputs: ExampleInputs) -> dict[str, int]:
    """Multiply-accumulates of one forward pass, by the innermost module that ran the operation; 0 where there are none.

    Attention is counted as its matrix products, the same on every device. The products of `nn.MultiheadAttention`,
    its `out_proj` included, stand under its own name. The model may be in any mode and is left as it was.
    """
    counts = macs.macs_by_module(model, on_device(example_inputs, device_of(model)))
    return {name: counts.get(name, 0) for name, _ in model.named_modules()}


def uncounted_layers(model: nn.Module, counts: Mapping[str, int]) -> list[str]:
    """Layers with a weight matrix but without MACs: they never ran, or the counter does not know their operations."""
    return [
        name
        for name, module in model.named_modules()
        if not any(counts[ancestor] for ancestor in _with_ancestors(name))
        and kind_of(module) != EMBEDDING
        and matrix_of(module) is not None
    ]


def matrix_of(module: nn.Module) -> Tensor | None:
    """A module's own weight matrix, kernel or lookup table; None for norms, containers and what has no weight."""
    own = deterministic_parameters(module, recurse=False)
    return next((parameter for name, parameter in own if "weight" in name and parameter.dim() > 1), None)


def latencies(models: Sequence[nn.Module], example_inputs: ExampleInputs, *, num_repeats: int = 15) -> list[Latency]:
    """Median times of forward passes, the models taking turns so that a machine that slows down slows all of them.

    Uses as many threads as torch does now (`torch.get_num_threads`). A repeat is the mean over 50 ms or one pass.
    """
    if num_repeats < 1:
        raise ValueError(f"num_repeats is {num_repeats}; expected at least 1.")
    num_threads = torch.get_num_threads()
    rounds = seconds_in_turn(models, example_inputs, num_repeats=num_repeats)
    return [
        _latency(seconds, model, num_threads, given(model, example_inputs).num_examples)
        for model, seconds in zip(models, rounds, strict=True)
    ]


def latency(model: nn.Module, example_inputs: ExampleInputs, *, num_repeats: int = 15) -> Latency:
    """Median time of a forward pass; to compare models, time them together with `latencies`."""
    return latencies([model], example_inputs, num_repeats=num_repeats)[0]


def accuracy(model: nn.Module, loader: Iterable[Any], device: torch.device | str | None = None) -> float:
    """Top-1 accuracy as a fraction, in eval mode, over batches of inputs and labels.

    Args:
        loader: Batches in any form that `bayesprune.foundation.batches` names: (inputs, labels), or mappings with
            `labels`, say. Labels are class numbers of shape (N,), or -100 for what does not count, as in torch's loss.
        device: Where the batches go; by default where the model is.

    Raises:
        ValueError: the loader has no label that counts, the model has no output for each class, or the labels are no
            class numbers, or do not have the shape of the predictions.
    """
    check_batches(loader, "the loader")
    device = device_of(model) if device is None else torch.device(device)
    correct = total = 0
    with evaluating(model):
        for batch in loader:
            logits, labels = _predicted(model, batch, device)
            check_classes(logits)
            predictions = logits.argmax(dim=1)
            if predictions.shape != labels.shape:
                raise ValueError(
                    f"labels have shape {tuple(labels.shape)}, predictions {tuple(predictions.shape)}; expected one "
                    "class number for each prediction, with the classes along dimension 1. For a causal language model "
                    "take `perplexity`; for another model of tokens pass an `evaluate` of your own."
                )
            check_labels(labels, logits.shape[1])
            correct += (predictions == labels).sum()  # which no prediction is where a label does not count
            total += (labels != IGNORED_LABEL).sum()
    if not total:
        raise ValueError(
            "the loader gave no examples, or none whose label counts (is not -100); pass one that starts anew each "
            "time, such as a DataLoader."
        )
    return int(correct) / int(total)


def check_classes(scores: Tensor) -> None:
    """Refuses scores that are not (N, C, ...) of two classes or more: the largest of one says nothing.

    Raises:
        ValueError: they are not.
    """
    if scores.dim() < 2 or scores.shape[1] < 2:
        raise ValueError(
            f"the model's outputs have shape {tuple(scores.shape)}; expected one output for each class, (N, C). For a "
            "model with one logit, pass an `evaluate` of your own, or give it an output for either class."
        )


def perplexity(model: nn.Module, loader: Iterable[Any], device: torch.device | str | None = None) -> float:
    """exp of the mean negative log-likelihood of the next token, in eval mode, over batches of inputs and labels.

    Args:
        model: A causal language model: its logits at each position are those of the token after it.
        loader: Batches as for `accuracy`; labels are the tokens themselves, of shape (N, T), or -100 for a token that
            does not count. The first token of each sequence never counts.
        device: Where the batches go; by default where the model is.

    Raises:
        ValueError: the loader has no token that counts, or one that the model has no output for, or the model is no
            causal language model.
    """
    check_batches(loader, "the loader")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} has an encoder and a decoder, whose logits are of the label at their own "
            "position; expected a causal language model, whose are of the next one. Pass an `evaluate` of your own."
        )
    device = device_of(model) if device is None else torch.device(device)
    nats = torch.zeros((), dtype=torch.float64)
    num_tokens = 0
    with evaluating(model):
        for batch in loader:
            logits, labels = _predicted(model, batch, device)
            if logits.dim() != 3 or labels.shape != logits.shape[:2]:
                raise ValueError(
                    f"logits have shape {tuple(logits.shape)}, labels {tuple(labels.shape)}; expected those of a "
                    "causal language model, (N, T, C) and (N, T). For a classifier take `accuracy`."
                )
            logits, following = logits[:, :-1], labels[:, 1:].long()
            check_labels(following, logits.shape[-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), following.flatten(), reduction="sum")
            nats += loss.double().cpu()
            num_tokens += int((following != IGNORED_LABEL).sum())
    if not num_tokens:
        raise ValueError("the loader gave no token to predict; pass sequences of two tokens or more, and their labels.")
    return float((nats / num_tokens).exp())


def _predicted(model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits and labels of a batch, on this device."""
    found = split(model, on_device(batch, device))
    if not isinstance(found.labels, Tensor):
        raise ValueError(
            f"the labels of a batch are {type(found.labels).__name__}; expected a tensor. For a detector, or another "
            "model whose targets are no class numbers, pass an `evaluate` of your own."
        )
    return logits_of(found.run(model)), found.labels


def _with_ancestors(name: str) -> Iterator[str]:
    """The module's name and those of the modules around it, the model itself left out."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _latency(seconds: Sequence[float], model: nn.Module, num_threads: int, batch: int) -> Latency:
    quantiles = torch.tensor(seconds, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    q25, median, q75 = quantiles.tolist()
    floating = (p.dtype for _, p in deterministic_parameters(model) if p.is_floating_point())
    dtype = str(next(floating, torch.get_default_dtype())).removeprefix("torch.")
    device = _device_name(device_of(model))
    return Latency(median, q25, q75, len(seconds), device, num_threads, batch, dtype)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    return device.type
