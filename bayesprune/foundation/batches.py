"""Batches of data, whatever their form: which part of one a model's forward takes, and what its labels are.

A batch is

- a tensor of inputs;
- a tuple or list of inputs and a target: (x, y), or (x1, x2, y) for a forward of several arguments, or ((x1, x2), y);
- a mapping of keyword arguments, with labels or without;
- of a detector a list of images, with a list of mappings beside it that are the targets.

What is meant is read off the signature of the model's forward.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

LABELS = ("labels", "label", "label_ids", "targets", "target")
"""Keys of a mapping that are no inputs, unless the forward cannot do without them."""

IGNORED_LABEL = -100
"""The label that does not count, of torch's and transformers' losses."""

_IMAGE_DIM = 3  # of an image by itself; a batch of them has one more


class Batch(NamedTuple):
    """The arguments that a forward takes of a batch, and the labels: None where there are none."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any

    def run(self, model: Callable[..., Any]) -> Any:
        """The model's output."""
        return model(*self.args, **self.kwargs)

    @property
    def num_examples(self) -> int:
        """Number of examples: the first dimension of the first tensor, or the images in a list.

        Raises:
            ValueError: there is no tensor with a batch dimension.
        """
        found = next(_counts((*self.args, *self.kwargs.values())), None)
        if found is None:
            raise ValueError(
                "the inputs hold no tensor with a batch dimension; expected one, such as torch.randn(1, 3, 224, 224)."
            )
        return found


def split(model: Callable[..., Any], batch: Any) -> Batch:
    """Splits a batch into the arguments of the model's forward and the labels; a function counts as a forward.

    Of a tuple the last item is the target, unless the forward cannot do without it; items that it has no room for are
    left out. A mapping is taken by its keys. Where the forward knows none of them, the only tensor beside the labels is
    the input, or, of several, the mapping itself.

    Raises:
        ValueError: the batch is empty, or its keys are not those of the forward.
    """
    takes = _Forward(model)
    if isinstance(batch, Mapping):
        return takes.by_key(batch, None)
    if not _is_sequence(batch):
        return Batch((batch,), {}, None)
    if not len(batch):
        raise ValueError("a batch is empty; expected inputs, or inputs and a target.")
    if takes.is_one_argument(batch, None):
        return Batch((list(batch),), {}, None)
    count = int(min(len(batch), max(1, takes.most), max(1, takes.least, len(batch) - 1)))
    if len(batch) < 3 and (isinstance(batch[0], Mapping) or _is_sequence(batch[0])):
        count = 1  # the inputs are together
    labels = batch[count] if count < len(batch) else None
    if count > 1:
        return Batch(tuple(batch[:count]), {}, labels)
    if isinstance(batch[0], Mapping):
        return takes.by_key(batch[0], labels)
    return Batch(takes.arguments(batch[0], labels), {}, labels)


def takes_labels(model: Callable[..., Any]) -> bool:
    """Whether the forward has an argument `labels`, as those of transformers that give a loss."""
    return "labels" in _Forward(model).names


def given(model: nn.Module, inputs: Any) -> Batch:
    """Example inputs, which have no labels, as the forward takes them.

    A tensor is one argument, a tuple or list several (but the list of images of a detector is one), a mapping those of
    its keys.

    Raises:
        TypeError: there are none.
    """
    if inputs is None or isinstance(inputs, str):
        raise TypeError(
            f"the inputs are a {type(inputs).__name__}; expected a tensor, a sequence of positional arguments or a "
            "mapping of keyword arguments."
        )
    if isinstance(inputs, Mapping):
        return Batch((), dict(inputs), None)
    return Batch(_Forward(model).arguments(inputs, None), {}, None)


def first_example(model: Callable[..., Any], batch: Any) -> Any:
    """The first example of a batch as example inputs: the arguments of the forward, or a mapping of them.

    Raises:
        ValueError: as for `split`.
    """
    found = split(model, batch)
    args, kwargs = (tree_map(lambda v: v[:1] if isinstance(v, Tensor) and v.dim() else v, part) for part in found[:2])
    if kwargs:
        return kwargs
    return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args


def on_device(value: Any, device: torch.device) -> Any:
    """The same value with all tensors in it on this device, however they are nested."""
    if isinstance(value, Mapping):
        return {key: on_device(item, device) for key, item in value.items()}
    if _is_sequence(value):
        items = [on_device(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value.to(device) if hasattr(value, "to") else value


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter; the CPU for a model without parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def check_batches(data: Any, name: str = "data") -> None:
    """Refuses what gives no batches one by one: a single batch, above all.

    Raises:
        TypeError: so it is.
    """
    gives_items = hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    if isinstance(data, Tensor | Mapping | str) or not gives_items:
        raise TypeError(
            f"{name} is a {type(data).__name__}; expected batches: a DataLoader, or a list such as [(inputs, labels)], "
            "in which a single batch stands, too."
        )


def with_examples(model: nn.Module, batches: Iterable[Any], most: int | None = None) -> Iterator[Any]:
    """The batches on the model's device, so many at most, but those that hold no example and so say nothing.

    Raises:
        TypeError: they are a single batch, or no batches.
    """
    check_batches(batches)
    device = device_of(model)
    for batch in islice(batches, most):
        moved = on_device(batch, device)
        if split(model, moved).num_examples:
            yield moved


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: the output itself, or what stands in it as `logits` or `out`.

    Raises:
        TypeError: it has none.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "out"):
        if (found := named_tensor(output, name)) is not None:
            return found
    raise TypeError(f"the model returned {type(output).__name__}; expected a tensor or an output with `.logits`.")


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuses class numbers that no output stands for, which end in an index error, on a GPU far from their cause.

    Args:
        labels: Of a batch; fractions, as of mixed images, are no class numbers.
        num_classes: Number of outputs.

    Raises:
        ValueError: one is below 0 and does not say that it does not count, or is too large.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return
    wrong = labels[(labels != IGNORED_LABEL) & ((labels < 0) | (labels >= num_classes))]
    if wrong.numel():
        raise ValueError(
            f"a batch has the label {int(wrong[0])}, and the model has {num_classes} outputs; expected class numbers "
            f"from 0 to {num_classes - 1}, or {IGNORED_LABEL} for what does not count. Number the classes from 0, or "
            "give the model an output for each."
        )


def named_tensor(output: Any, name: str) -> Tensor | None:
    """What stands in a model's output by this name, as a key or an attribute; None where that is no tensor."""
    found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return found if isinstance(found, Tensor) else None


class _Forward:
    """What a model's forward takes.

    Attributes:
        least: Positional arguments that it cannot do without.
        most: Positional arguments that it has room for.
        names: Of the arguments that can be given by name.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        model = getattr(model, "_orig_mod", model)
        self.model = model
        try:
            parameters = list(inspect.signature(getattr(model, "forward", model)).parameters.values())
        except (TypeError, ValueError):  # of a scripted model
            parameters = []
        kinds = {parameter.kind for parameter in parameters}
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.takes_any_key = not parameters or inspect.Parameter.VAR_KEYWORD in kinds
        self.least = sum(parameter.default is parameter.empty for parameter in positional)
        takes_any = not parameters or inspect.Parameter.VAR_POSITIONAL in kinds
        self.most: float = math.inf if takes_any else len(positional)
        self.names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self._needed = {p.name for p in parameters if p.name in self.names and p.default is p.empty}
        self._first = positional[0].annotation if positional else None

    def arguments(self, inputs: Any, labels: Any) -> tuple[Any, ...]:
        """Positional arguments for these inputs."""
        if not _is_sequence(inputs):
            return (inputs,)
        return (list(inputs),) if self.is_one_argument(inputs, labels) else tuple(inputs)

    def is_one_argument(self, inputs: Sequence[Any], labels: Any) -> bool:
        """Whether a sequence is what one parameter takes: a list of images, say."""
        if not all(isinstance(item, Tensor) for item in inputs) or len({item.dim() for item in inputs}) != 1:
            return False
        if _is_sequence(labels) and labels and all(isinstance(target, Mapping) for target in labels):
            return True
        text = self._first if isinstance(self._first, str) else getattr(self._first, "__name__", str(self._first))
        if re.match(r"(typing\.|collections\.abc\.)?(list|sequence)\b", text, re.IGNORECASE):
            return True
        return inputs[0].dim() == _IMAGE_DIM and self.names[:2] == ["images", "targets"]  # as torchvision calls them

    def by_key(self, batch: Mapping[str, Any], labels: Any) -> Batch:
        """What it takes of a mapping."""
        label_keys = [key for key in LABELS if key in batch]
        labels = next((batch[key] for key in label_keys), None) if labels is None else labels
        # T5 and its like make the inputs of the decoder from the labels.
        decodes = "decoder_input_ids" in self.names and "decoder_input_ids" not in batch
        kept = set(self.names if decodes else self._needed)
        kwargs = {
            key: value
            for key, value in batch.items()
            if (key in self.names or (self.takes_any_key and any(_tensors_in(value))))
            and (key not in label_keys or key in kept)
        }
        if kwargs and self._needed <= kwargs.keys():
            return Batch((), kwargs, labels)
        inputs = [value for key, value in batch.items() if key not in label_keys and isinstance(value, Tensor)]
        if inputs and not kwargs and self.least <= 1 <= self.most:
            return Batch((inputs[0] if len(inputs) == 1 else batch,), {}, labels)
        raise ValueError(
            f"a batch has {', '.join(map(repr, batch))}, and the forward of {type(self.model).__name__} takes "
            f"{', '.join(self.names) or 'nothing by name'}; expected a mapping of its arguments, or a tuple of inputs "
            "and a target."
        )


def _is_sequence(value: Any) -> bool:
    """Whether it is a tuple or list of parts; a `PackedSequence`, which moves as a whole, is not."""
    return isinstance(value, tuple | list) and not hasattr(value, "to")


def _counts(value: Any) -> Iterator[int]:
    if isinstance(value, Tensor):
        if value.dim():
            yield value.shape[0]
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _counts(item)
    elif _is_sequence(value):
        if isinstance(value, list) and value and all(isinstance(i, Tensor) and i.dim() == _IMAGE_DIM for i in value):
            yield len(value)
        for item in value:
            yield from _counts(item)


def _tensors_in(value: Any) -> Iterator[bool]:
    """True for each tensor that a value holds."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if _is_sequence(value):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, Tensor):
        yield True
