"""Distillation: a smaller model recovers by the outputs of the larger one that it was cut from.

Hinton, Vinyals and Dean, 2015, arXiv:1503.02531. Two things differ. What an output stands for may be independent labels
or values as well as classes. And the teacher may be a posterior: then the student learns from the predictive
distribution, as in Bayesian dark knowledge (Balan et al., 2015, arXiv:1506.04416). Features that are compared, as the
hints of Romero et al., 2015, arXiv:1412.6550, are outputs of whole blocks, whose width no cut inside them changes.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesprune.foundation import defaults
from bayesprune.foundation.batches import IGNORED_LABEL, Batch, logits_of, on_device, split
from bayesprune.foundation.model import bare_model, tensors_in
from bayesprune.foundation.text import first_names
from bayesprune.prediction.predict import Classification, Prediction

Likelihood = Literal["categorical", "bernoulli", "gaussian"]
_MAPS = 4  # dimensions of (N, C, H, W)


def distillation(
    teacher: nn.Module | Callable[..., Any],
    *,
    temperature: float = defaults.DISTILLATION_TEMPERATURE,
    weight: float = defaults.DISTILLATION_WEIGHT,
    likelihood: Likelihood = "categorical",
    features: float | Mapping[str, float] = 0.0,
) -> "Distillation":
    """A loss that makes one model learn from another: `loss = distill(model(x), x, task_loss)`.

    Args:
        teacher: The model as it was before anything was removed. It is copied as it is now, and the copy stays frozen
            and in evaluation mode, so that the model itself may be cut afterwards; it is a part of no state dict. Or a
            function: it is called as it is, without gradients, with what the model's forward takes of a batch, and
            gives logits or an output with `.logits` (the logarithms of probabilities are logits), or what a posterior
            predicts, `bp.predict(...)` or its `.classify()`: of classes the student then gets the predictive
            distribution, of labels and values the mean.
        temperature: What the logits of both are divided by, above 0. A high one shows more of how the teacher ranks
            the classes that it thinks wrong.
        weight: Share of the loss that the teacher has, above 0; the task's loss has the rest. At 1 no labels are
            needed.
        likelihood: What an output stands for. "categorical": classes, along the second dimension of maps (N, C, H, W)
            and the last of everything else. "bernoulli": labels that are independent of each other, by sigmoids.
            "gaussian": values, as of a regression; its term is the mean squared error, which no temperature changes.
            Outputs (N,) are one label or value for each of N examples.
        features: Weight, at least 0, of the error in the outputs of the blocks that student and teacher share, relative
            to their squared norm and a mean over the blocks whose outputs have the same shape in both. Blocks are the
            numbered ones that hold other modules, such as `layers.0`; a dictionary names others, each with its weight.
            The training then runs inside `with distill.watch(model):`.

    Raises:
        TypeError: the teacher cannot be called, or a function is to give features.
        ValueError: a number is out of range, the likelihood is none of those named, or the teacher has none of the
            blocks.
    """
    if not callable(teacher):
        kind = type(teacher).__name__
        raise TypeError(f"distillation got a {kind} as teacher; expected a model, or a function that gives logits.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature!r}; expected what logits are divided by, above 0.")
    if not 0 < weight <= 1:
        raise ValueError(f"weight is {weight!r}; expected the teacher's share of the loss, above 0 and at most 1.")
    if likelihood not in _DIVERGENCES:
        raise ValueError(f"likelihood is {likelihood!r}; expected one of {', '.join(_DIVERGENCES)}.")
    if isinstance(teacher, nn.Module):
        teacher = copy.deepcopy(bare_model(teacher)).eval().requires_grad_(False)
        teacher.zero_grad(set_to_none=True)
    return Distillation(teacher, temperature, weight, likelihood, _block_weights(teacher, features))


@dataclass(frozen=True)
class Distillation:
    """The loss of a student; made by `distillation`, whose arguments its attributes are."""

    teacher: Callable[..., Any]
    temperature: float
    weight: float
    likelihood: Likelihood
    features: Mapping[str, float] = field(default_factory=dict)
    _of_teacher: "_Outputs" = field(default_factory=lambda: _Outputs(), repr=False, compare=False)
    _of_student: "_Outputs" = field(default_factory=lambda: _Outputs(), repr=False, compare=False)

    def watch(self, student: nn.Module) -> ExitStack:
        """Keeps the outputs of the student's blocks for `features`, until the context ends or is closed.

        Where no features are compared, nothing happens.

        Examples:
            >>> import torch
            >>> from torch import nn
            >>> import bayesprune as bp
            >>> block = lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU())
            >>> model, images = nn.Sequential(block(), block(), nn.Linear(8, 3)), torch.randn(4, 8)
            >>> distill = bp.distillation(model, weight=1.0, features=0.1)
            >>> with distill.watch(model):
            ...     loss = distill(model(images), images)
            >>> abs(loss.item()) < 1e-5  # the two are equal
            True

        Args:
            student: The model that learns, wrapped or not. It is compiled after this call, or not at all.

        Raises:
            ValueError: it has none of the blocks.
        """
        hooks = ExitStack()
        if self.features:
            assert isinstance(self.teacher, nn.Module), "another teacher has no features"
            modules = dict(bare_model(student).named_modules())
            shared = [name for name in self.features if name in modules]
            if not shared:
                raise ValueError(
                    f"{type(student).__name__} has none of the blocks whose outputs are compared "
                    f"({first_names(list(self.features))}); expected the model that was cut from the teacher."
                )
            for name in shared:
                for module, kept in (
                    (modules[name], self._of_student),
                    (self.teacher.get_submodule(name), self._of_teacher),
                ):
                    hooks.callback(module.register_forward_hook(partial(kept.keep, name)).remove)
            hooks.callback(self._of_student.clear)
        return hooks

    def __call__(self, outputs: Any, batch: Any, task_loss: Tensor | None = None) -> Tensor:
        """weight * (T^2 * KL(teacher || student) + features' error) + (1 - weight) * task loss, a scalar in nats.

        The divergence is a mean over positions: over examples, over tokens, over pixels. Positions that the batch
        labels with -100 or masks by `attention_mask` do not count. Where the outputs are those of a causal language
        model, a position counts by the label of the token after it, which it predicts.

        Args:
            outputs: What the student gave for this batch: logits, or an output with `.logits`.
            batch: The inputs, with labels beside them or without, in any form of `bayesprune.foundation.batches`. It
                is moved to the device of the outputs, and so is a teacher that is a model.
            task_loss: The loss on the labels, a mean; not needed where the weight is 1.

        Raises:
            TypeError: the task's loss is no tensor.
            ValueError: student and teacher give outputs of different shapes, or the teacher probabilities where outputs
                are no classes; the outputs have a single class, the task's loss is missing, or features are to be
                compared and there are none.
        """
        if task_loss is None and self.weight < 1:
            raise ValueError(f"the teacher has {self.weight:g} of the loss; expected task_loss for the rest of it.")
        if not isinstance(task_loss, Tensor | float | int | None):
            raise TypeError(
                f"task_loss is a {type(task_loss).__name__}; expected a tensor, the mean loss on the labels: of an "
                "output of transformers its `.loss`."
            )
        return self.mixed(self.divergences(outputs, batch), task_loss)

    def mixed(self, divergences: Tensor, task_loss: Tensor | None, num_terms: Tensor | float | None = None) -> Tensor:
        """The loss of these divergences, whose sum is divided by `num_terms`; None is how many there are."""
        term = self.weight * divergences.sum() / (max(1, divergences.numel()) if num_terms is None else num_terms)
        return term if task_loss is None or self.weight == 1 else term + (1 - self.weight) * task_loss

    def divergences(self, outputs: Any, batch: Any) -> Tensor:
        """T^2 * KL(teacher || student) + features' error at the P positions that count, (P,).

        The gradient is that of the student alone. The features' error is the same number at each position.

        Raises:
            ValueError: as for the loss.
        """
        logits = logits_of(outputs)
        dim = 1 if logits.dim() == _MAPS and self.likelihood == "categorical" else logits.dim() - 1
        with torch.no_grad():
            if isinstance(self.teacher, nn.Module):
                self.teacher.to(logits.device)
            inputs = split(self.teacher, on_device(batch, logits.device))
            target = self._logits(inputs.run(self.teacher), dim)
        logits = logits.movedim(dim, -1).to(target.dtype)
        if logits.shape != target.shape:
            raise ValueError(
                f"the student gives outputs of shape {tuple(logits.shape)} and the teacher {tuple(target.shape)}, "
                "classes last; expected the same: a student whose last layer was not cut, and the same inputs for both."
            )
        if self.likelihood == "categorical" and (logits.dim() < 2 or logits.shape[-1] == 1):
            raise ValueError(
                f"the outputs {tuple(logits.shape)} have one class, of which there is one distribution; pass "
                'distillation(..., likelihood="gaussian") for values, or "bernoulli" for yes or no.'
            )
        if logits.dim() == 1:  # one label or value each
            logits, target = logits[:, None], target[:, None]
        counted = _counted(outputs, inputs, logits.shape[:-1])
        if counted is not None:
            logits, target = logits[counted], target[counted]
        found = _DIVERGENCES[self.likelihood](logits, target, self.temperature).flatten()
        return found + self._feature_error(inputs) if self.features else found

    def _feature_error(self, batch: Batch) -> Tensor:
        """Mean over blocks of weight * |student - teacher|^2 / |teacher|^2, without the tokens that are masked."""
        errors = []
        has_encoder = any("encoder" in name.split(".") for name in self.features)
        for name, ours in self._of_student.items():
            if name in self._of_teacher and ours.shape == self._of_teacher[name].shape:
                ours, theirs = ours.float(), self._of_teacher[name].float()
                is_decoder = has_encoder and "decoder" in name.split(".")
                attended = batch.kwargs.get("decoder_attention_mask" if is_decoder else "attention_mask")
                if isinstance(attended, Tensor) and attended.shape == ours.shape[:-1]:
                    ours, theirs = ours[attended != 0], theirs[attended != 0]
                error = (ours - theirs).square().sum() / theirs.square().sum().clamp_min(
                    torch.finfo(torch.float32).tiny
                )
                errors.append(self.features[name] * error)
        self._of_student.clear()
        self._of_teacher.clear()
        if not errors:
            raise ValueError(
                f"features are to be compared ({first_names(list(self.features))}), and student and teacher gave no "
                "outputs of equal shape there; expected the student's forward inside `with distill.watch(student):`, "
                "which stands before torch.compile, and blocks that kept their width."
            )
        return torch.stack(errors).mean()

    def _logits(self, answer: Any, dim: int) -> Tensor:
        """The teacher's answer as logits, classes last."""
        if isinstance(answer, Classification):
            if self.likelihood != "categorical":
                raise ValueError(
                    f"the teacher gives probabilities of classes, and the likelihood is {self.likelihood!r}; expected "
                    "what bp.predict returns, of which the mean is taken, or logits."
                )
            return answer.probabilities.log()
        if isinstance(answer, Prediction) and self.likelihood == "categorical":
            samples = None if answer.samples is None else answer.samples.movedim(dim + 1, -1)
            draws = Prediction(answer.mean.movedim(dim, -1), answer.variance.movedim(dim, -1), samples)
            return self.temperature * draws.classify(temperature=self.temperature).probabilities.log()
        logits = answer.mean if isinstance(answer, Prediction) else logits_of(answer)
        return logits.movedim(dim, -1).to(torch.promote_types(logits.dtype, torch.float32))


class _Outputs(dict[str, Tensor]):
    """The outputs that modules gave in the last forward, by name; a copy of a model that is watched has its own."""

    def keep(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """The hook of a module."""
        found = next(tensors_in(output), None)
        if found is not None:
            self[name] = found

    def __deepcopy__(self, memo: Any) -> "_Outputs":
        return _Outputs()


def _block_weights(teacher: Any, features: float | Mapping[str, float]) -> dict[str, float]:
    """The weight of each block whose outputs are compared, by name."""
    given: dict[str, float] = dict(features) if isinstance(features, Mapping) else {"": features}
    if not all(weight >= 0 for weight in given.values()):
        raise ValueError(f"features is {features!r}; expected weights of the error in blocks' outputs, at least 0.")
    if not any(given.values()):
        return {}
    if not isinstance(teacher, nn.Module):
        raise TypeError("features are compared with those of a model; got a function as teacher.")
    modules = dict(teacher.named_modules())
    if not isinstance(features, Mapping):
        blocks = [name for name in modules if name.rpartition(".")[2].isdigit() and any(modules[name].children())]
        given = dict.fromkeys(blocks, features)
    if not given or not given.keys() <= modules.keys():
        raise ValueError(
            f"features is {features!r}; expected names of modules of {type(teacher).__name__}, and a number only where "
            "it has numbered blocks that hold other modules, such as `layers.0`."
        )
    return given


def _counted(outputs: Any, batch: Batch, positions: torch.Size) -> Tensor | None:
    """Which positions count, a mask of their shape; None where nothing in the batch says that one does not."""
    labels = batch.labels
    if "shift_labels" in batch.kwargs:
        labels = batch.kwargs["shift_labels"]
    elif isinstance(labels, Tensor) and labels.dim() > 1 and "CausalLM" in type(outputs).__name__:
        labels = F.pad(labels[..., 1:], (0, 1), value=IGNORED_LABEL)
    has_encoder = hasattr(outputs, "encoder_last_hidden_state")
    attended = batch.kwargs.get("decoder_attention_mask" if has_encoder else "attention_mask")
    masks = []
    if isinstance(labels, Tensor) and labels.dtype.is_signed and not labels.is_floating_point():
        masks.append(labels != IGNORED_LABEL)
    if isinstance(attended, Tensor):
        masks.append(attended != 0)
    masks = [mask for mask in masks if mask.shape == positions]
    return torch.stack(masks).all(0) if masks else None


def _of_classes(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL of softmaxes: (..., C) to (...)."""
    expected = (teacher / temperature).softmax(-1)
    terms = F.kl_div((logits / temperature).log_softmax(-1), expected, reduction="none")
    return temperature**2 * terms.masked_fill_(expected == 0, 0.0).sum(-1)  # impossible for both: 0 times infinity


def _of_labels(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL of sigmoids, a mean over the labels, as of their loss: (..., C) to (...)."""
    expected = (teacher / temperature).sigmoid()
    entropy = torch.special.entr(expected) + torch.special.entr(1 - expected)
    losses = F.binary_cross_entropy_with_logits(logits / temperature, expected, reduction="none")
    return temperature**2 * (losses - entropy).mean(-1)


def _of_values(values: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Squared errors, a mean over the values, as of their loss: (..., C) to (...)."""
    return (values - teacher).square().mean(-1)


_DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "categorical": _of_classes,
    "bernoulli": _of_labels,
    "gaussian": _of_values,
}
