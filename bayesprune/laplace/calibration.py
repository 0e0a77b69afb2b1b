"""One pass over calibration data: what goes into each layer, and the gradient of each example's loss at what comes out.

Nothing is trained, no `.grad` is touched, and the model runs in evaluation mode, at its means.
"""

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.batches import (
    Batch,
    check_labels,
    logits_of,
    named_tensor,
    split,
    takes_labels,
    with_examples,
)
from bayesprune.foundation.model import eval_mode, requires_grad
from bayesprune.foundation.numbers import as_loss
from bayesprune.foundation.progress import progress_bar
from bayesprune.layers import VariationalLayer, variational_layers
from bayesprune.layers.drawn import DrawnLayer

Loss = Callable[[nn.Module, Any], Tensor]
"""loss(model, batch): a scalar, the mean over the batch's examples of each one's negative log-likelihood in nats."""


class Call(NamedTuple):
    """One run of a layer on a batch of N examples.

    Attributes:
        layer: The layer.
        inputs: What went in, (B, ...) with B a multiple of N; an example's rows stand together.
        gradients: d loss_n / d output of each example n, of the output's shape.
        operation: What it computed, a function of inputs, weight and bias.
    """

    layer: VariationalLayer
    inputs: Tensor
    gradients: Tensor
    operation: Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Recorded(NamedTuple):
    """The calls of one batch by the layer's name, and what of it the forward took."""

    calls: dict[str, list[Call]]
    inputs: Batch

    @property
    def num_examples(self) -> int:
        """Number of examples in the batch."""
        return self.inputs.num_examples


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy in nats of a batch of inputs and class numbers.

    With it the Fisher information is the *empirical* one, of the data's own labels. On data that a network fits to the
    last example it is close to zero nearly everywhere.

    Raises:
        ValueError: the batch has no labels, or one that is no class, or the model does not give an example one vector
            of two logits or more.
    """
    found = split(model, batch)
    if not isinstance(found.labels, Tensor):
        kind = type(found.labels).__name__
        raise ValueError(
            f"the labels of a batch are {kind}; expected a tensor of class numbers, or pass another loss=."
        )
    logits = _of_classes(_logits(model, found))
    check_labels(found.labels, logits.shape[1])
    return F.cross_entropy(logits, found.labels if found.labels.is_floating_point() else found.labels.long())


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The mean loss that a model gives for the batch's labels where its forward takes them, else `cross_entropy`.

    Raises:
        ValueError: as of `cross_entropy`.
    """
    found = split(model, batch)
    if isinstance(found.labels, Tensor) and takes_labels(model):
        output = model(*found.args, **{**found.kwargs, "labels": found.labels})
        if (loss := named_tensor(output, "loss")) is not None:
            return loss.mean()
    return cross_entropy(model, batch)


def sampled_cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """The same with labels drawn from the model's own predictions, by torch's global generator.

    With it the Fisher information is the true one in expectation, equal to the Gauss-Newton matrix of the
    cross-entropy (Kunstner et al., 2019), and needs no labels: those of the batch are ignored. Of a model that gives
    every token a prediction it is the sum over the tokens of an example that its attention mask does not hide.

    Raises:
        ValueError: the model gives neither one vector of two logits or more for an example nor one for each of its
            tokens, or they are not finite.
    """
    found = split(model, batch)
    logits = _of_classes(predictions(model, found))
    with torch.no_grad():
        if bool(logits.log_softmax(1).isnan().any()):
            raise ValueError(
                "the model's logits are NaN or infinite on these data; expected finite numbers. Look for NaN and "
                "infinity in the data and in the weights."
            )
        labels = torch.distributions.Categorical(logits=logits.detach().float()).sample()
    return F.cross_entropy(logits, labels, reduction="sum") / found.num_examples


def output_metric(model: nn.Module, batch: Any) -> Tensor:
    """Sum of a model's logits under random signs, by torch's global generator; the mean over the batch's examples.

    Its squared gradients are, in expectation, those of all logits added up: the Gauss-Newton matrix of half the squared
    change of the logits. So it says how much a weight moves what the model puts out, and does not fade where the model
    is sure of its predictions, as the Fisher information does.

    Raises:
        ValueError: the model's logits have neither the shape (examples, classes) nor (examples, tokens, classes).
    """
    found = split(model, batch)
    logits = predictions(model, found)
    return (random_signs(logits) * logits).sum() / found.num_examples


def random_signs(values: Tensor) -> Tensor:
    """A sign for each of the values, by torch's global generator."""
    return torch.randint(0, 2, values.shape, device=values.device).to(values) * 2 - 1


def predictions(model: nn.Module, batch: Batch) -> Tensor:
    """Logits (predictions, classes) of a batch: one for each example, or for each token that is not masked.

    Raises:
        ValueError: the model's logits are of another shape.
    """
    logits = logits_of(batch.run(model))
    if logits.dim() not in (2, 3):
        raise ValueError(
            f"the model gives {tuple(logits.shape)} logits; expected (examples, classes) or (examples, tokens, "
            "classes). Pass loss=, a function of model and batch that gives the mean over examples of the sum of each "
            "one's label losses."
        )
    return unmasked(logits, batch)


def unmasked(logits: Tensor, batch: Batch) -> Tensor:
    """Logits (..., classes) as (predictions, classes), without those that the batch's `attention_mask` hides."""
    mask = batch.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
        return logits[mask.bool()]
    return logits.reshape(-1, logits.shape[-1])


def as_predictions(logits: Tensor) -> Tensor:
    """What `total_divergence` compares, (predictions, classes): log probabilities; a single output stays as it is."""
    return logits if logits.shape[1] == 1 else logits.log_softmax(1)


def total_divergence(before: Tensor, now: Tensor) -> float:
    """The sum over predictions of KL(before || now) in nats, or of half the squared error of a single output."""
    if before.shape[1] == 1:
        return 0.5 * float((now - before).square().sum())
    return float(F.kl_div(now, before, log_target=True, reduction="sum"))


def counted_positions(batch: Batch, num_positions: int) -> Tensor | None:
    """A mask of the positions that count, (N, T), by the batch's `attention_mask`; None for all.

    Args:
        batch: What the forward took.
        num_positions: T, at which each example meets a layer. A mask of another shape says nothing of them.
    """
    mask = batch.kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != (batch.num_examples, num_positions):
        return None
    return mask.bool()


def check_sums(name: str, number: int, sums: Iterable[Tensor]) -> None:
    """Refuses sums over the positions of a layer that none went into, or that are not finite.

    Raises:
        ValueError: so it is.
    """
    if not number:
        raise ValueError(
            f"the attention_mask of every batch hides all positions at which {name} runs; expected one that is 1 "
            "where a token counts."
        )
    if not all(bool(total.isfinite().all()) for total in sums):
        raise ValueError(
            f"the inputs, outputs or gradients of {name or 'the model'} are not finite on these data; expected finite "
            "numbers. Look for NaN and infinity in the data and in the weights."
        )


Visit = Callable[[str, Call, Batch], None]
"""visit(name, call, batch): takes note of one call of the layer of this name."""


def visit_calls(
    model: nn.Module,
    loader: Iterable[Any],
    visit: Visit,
    *,
    loss: Loss | None = None,
    num_batches: int | None = None,
    total: int | None = None,
) -> Iterator[Batch]:
    """Each batch once all calls in it were visited, the last first. Batches are moved to the model's device.

    A call is visited in the backward pass, as soon as its gradients are there, and what it holds is let go after that.

    Args:
        model: A variational model whose layers take the examples along their first dimension.
        loader: Batches of inputs and labels, in any form that `bayesprune.foundation.batches` names.
        visit: Called with every call whose output the loss depends on.
        loss: The loss; None is `sampled_cross_entropy`.
        num_batches: No more batches than these; None takes all.
        total: How many there will be, for the progress bar.

    Raises:
        TypeError: the loss is no number, or has no gradient.
        ValueError: there was no batch.
        UnsupportedModelError: the inputs of a layer do not divide into the batch's examples.
    """
    loss = sampled_cross_entropy if loss is None else loss
    batch = None
    batches = with_examples(model, loader, num_batches)
    for batch in progress_bar(batches, "Take gradients", "batch", total=total):
        inputs = split(model, batch)
        with ExitStack() as stack:
            for context in (torch.enable_grad(), eval_mode(model), requires_grad(model, True)):
                stack.enter_context(context)
            anchor = torch.zeros((), requires_grad=True)
            ran = stack.enter_context(_showing(model, anchor, inputs, visit))
            value = loss(model, batch)
            if ran:
                torch.autograd.grad(as_loss(value, "loss"), anchor, allow_unused=True)
        yield inputs
    if batch is None:
        raise ValueError("the loader has no batch; expected an iterable of (inputs, labels).")


def record(
    model: nn.Module, loader: Iterable[Any], *, loss: Loss | None = None, num_batches: int | None = None
) -> Iterator[Recorded]:
    """All calls of every batch, one batch at a time; what holds less is `visit_calls`, whose arguments these are."""
    calls: dict[str, list[Call]] = {}

    def keep(name: str, call: Call, _: Batch) -> None:
        calls.setdefault(name, []).insert(0, call)

    total = length_of(loader, num_batches)
    for inputs in visit_calls(model, loader, keep, loss=loss, num_batches=num_batches, total=total):
        yield Recorded(dict(reversed(calls.items())), inputs)
        calls.clear()


class _Shown(torch.autograd.Function):
    """A copy of a layer's output, whose gradient is shown on its way back.

    The anchor is a number that all of them depend on, so that its gradient is what backward can be asked for: of the
    outputs' own it would keep all to the end.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, _: Tensor, show: Callable[[Tensor], None]) -> Tensor:
        ctx.show = show
        return output.clone()  # an activation in place would otherwise change what is differentiated

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        show, ctx.show = ctx.show, None  # with the layer's inputs
        show(gradients[0])
        return gradients[0], torch.zeros(()), None


@contextmanager
def _showing(model: nn.Module, anchor: Tensor, batch: Batch, visit: Visit) -> Iterator[list[str]]:
    """Inside, backward visits every run of a variational layer; their names are listed."""
    ran: list[str] = []

    def hook(name: str, layer: VariationalLayer) -> Callable[..., Tensor | None]:
        def meet(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Tensor | None:
            if isinstance(layer, DrawnLayer) or not isinstance(output, Tensor):
                return None  # attention and experts, which run their products themselves
            options = dict(kwargs)
            inputs = (args[0] if args else options.pop(next(iter(options)))).detach()

            def operation(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                return layer.operation(x, weight, bias, *args[1:], **options)

            def show(gradient: Tensor) -> None:
                check_examples(name, inputs, batch.num_examples)
                visit(name, Call(layer, inputs, batch.num_examples * gradient, operation), batch)

            ran.append(name)
            return cast("Tensor", _Shown.apply(output, anchor, show))

        return meet

    handles = [layer.register_forward_hook(hook(n, layer), with_kwargs=True) for n, layer in variational_layers(model)]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


def length_of(loader: Iterable[Any], num_batches: int | None) -> int | None:
    """How many batches there are, `num_batches` at most; None where the loader, or its data, do not say."""
    try:
        number = len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # of a DataLoader whose data have none
        number = None
    return number if number is None or num_batches is None else min(number, num_batches)


def check_examples(name: str, inputs: Tensor, num_examples: int) -> None:
    """Refuses inputs of a layer that do not divide into the batch's examples.

    Raises:
        UnsupportedModelError: they do not.
    """
    if inputs.shape[0] % num_examples:
        raise UnsupportedModelError(
            f"{name} has inputs of shape {tuple(inputs.shape)} in a batch of {num_examples} examples; expected the "
            "examples along the first dimension. Leave the layer deterministic with filter_fn."
        )


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's logits (N, classes)."""
    logits = logits_of(batch.run(model))
    if logits.dim() != 2:
        raise ValueError(
            f"the model gives {tuple(logits.shape)} logits; expected (examples, classes). Pass loss=, a function of "
            "model and batch that gives the mean over examples of the sum of each one's label losses."
        )
    return logits


def _of_classes(logits: Tensor) -> Tensor:
    """The logits (predictions, classes), which are those of two classes at least."""
    if logits.shape[1] < 2:
        raise ValueError(
            "the model gives one logit for each prediction, whose cross-entropy is 0 whatever the weights; expected "
            "two or more. Pass loss=, a function of model and batch: the mean over examples of binary cross-entropy or "
            "half the squared error, say, or bp.laplace.output_metric, which needs no labels."
        )
    return logits
