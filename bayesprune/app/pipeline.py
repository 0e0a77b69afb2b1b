"""The main job as one function: train or load, convert, learn stds where they decide, remove, fine-tune, save, report.

A budget of MACs or parameters is met by channels that calibration data rank (`prune_channels`), at once: what a
training before the cut costs is better spent after it (docs/criterion.md). Single weights and thresholds read the stds.
"""

import copy
import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.utils.data import DataLoader

from bayesprune import gates
from bayesprune.app.data import Loaders
from bayesprune.app.lost import check_images, what_was_lost, with_scores
from bayesprune.app.recipe import Recipe
from bayesprune.app.tasks.task import LoggedProgress, Progress, Task, Training
from bayesprune.bits import quantize
from bayesprune.convert import conversion_table, to_deterministic, to_variational
from bayesprune.elastic import Level, levels
from bayesprune.foundation import defaults
from bayesprune.foundation.batches import check_batches, device_of, first_example, on_device
from bayesprune.foundation.model import undone_on_error
from bayesprune.laplace.calibration import length_of
from bayesprune.layers import named_posteriors
from bayesprune.prediction.predict import sampling
from bayesprune.prune import freeze_batch_norm, prune_channels, prune_weights, signal_to_noise, smallest_within
from bayesprune.prune.graph.group import GRANULARITY
from bayesprune.prune.graph.removal import restore_point
from bayesprune.reports import ACCURACY, ExtraTable, HistoryPoint, Metric, Report, count_parameters, report
from bayesprune.storage import save
from bayesprune.storage.base import describe
from bayesprune.train import Distillation, distillation

_BATCHES = 16  # that say how exactly weights have to be known


class Compressed(NamedTuple):
    """The smaller model, and its report, which the main process alone has."""

    model: nn.Module
    report: Report | None


def compress(
    model: nn.Module,
    data: Mapping[str, Iterable[Any]],
    target: str | None = "macs=0.5",
    *,
    out: str | Path,
    tolerance: float | None = None,
    num_epochs: int = 3,
    lr: float = 1e-4,
    metric: Metric = ACCURACY,
    **options: Any,
) -> Compressed:
    """Cuts, fine-tunes, saves and reports a trained model, as `bayesprune compress` does; needs accelerate.

    A target of MACs or parameters is met at once, from calibration data; single weights and thresholds read stds that a
    variational fine-tuning learns first. The dense model teaches the smaller one (`distillation`). What decides is
    measured on the validation batches; the test batches give the report's figures.

    Args:
        model: A trained classifier, or causal language model, on its device; changed in place, but for a search. An
            error on the way leaves it as it was, of which a copy is kept meanwhile.
        data: Batches under "train", a DataLoader, "validation" and "test", in any form that
            `bayesprune.foundation.batches` names, with labels.
        target: What is kept: "macs=0.5", "params=0.5", "snr=1" or "weights=0.2". None searches for the smallest model
            within the tolerance, by MACs, or by weights with `by="weights"`.
        out: Directory for the model and its report; `bayesprune.load` or the library's own call reads it.
        tolerance: With a target of None, the largest accepted loss: by so much accuracy may fall, or by such a part of
            itself perplexity rise.
        num_epochs: Epochs of each fine-tuning.
        lr: Its highest learning rate, of AdamW and one cycle.
        metric: `reports.ACCURACY`, or `reports.PERPLEXITY` of a causal language model.
        **options: Further fields of the recipe: `granularity`, `uniform`, `distill`, `std`, `estimator`,
            `relative_std`, `by`; `gates=True` lets gates choose single weights; `bits` rounds the fine-tuned weights
            (`quantize`) and trains them on for as long again, held to their grids (`bits.StraightThrough`), which
            `train_rounded=False` leaves out; `coding="entropy"` saves them in fewer bytes, `levels=("macs=0.7",)`
            saves smaller versions beside them, as fractions of the result, and `corruptions=True` adds to the report
            what was lost on corrupted test images.

    Raises:
        TypeError: the data are no mapping, or of no batches, or the metric is none.
        ValueError: an option is out of range, a split is missing, the training data have no length, labels are no class
            numbers of the model, or both target and tolerance are given.
        InfeasibleTargetError: the target or a level cannot be reached. Nothing was trained, unless a level is out of
            reach of what a search has found; then the result is in `out`, without levels and report.

    Examples:
        >>> import tempfile, torch, bayesprune as bp
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> examples = TensorDataset(torch.randn(64, 8), torch.randint(3, (64,)))
        >>> data = {split: DataLoader(examples, 16) for split in ("train", "validation", "test")}
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3))
        >>> with tempfile.TemporaryDirectory() as out:
        ...     small, report = bp.compress(model, data, "macs=0.5", out=out, num_epochs=1)
        >>> small[0].out_features
        20
    """
    from accelerate import Accelerator

    from bayesprune.app.tasks.loop import LoaderTask, check_launch

    if not isinstance(data, Mapping):
        raise TypeError(f"data is a {type(data).__name__}; expected a mapping of train, validation and test.")
    if missing := [split for split in ("train", "validation", "test") if split not in data]:
        raise ValueError(f"data has no {missing[0]!r} batches; expected a mapping of train, validation and test.")
    if not isinstance(metric, Metric):
        raise TypeError(f"metric is {metric!r}; expected bp.reports.ACCURACY or bp.reports.PERPLEXITY.")
    if Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"out is {str(out)!r}, which is a file; expected a directory, or a path where none is yet.")
    if (target is None) == (tolerance is None):
        raise ValueError(f"got target={target!r} and tolerance={tolerance!r}; expected one of them.")
    chosen = {"granularity": GRANULARITY, "std": None, "estimator": defaults.ESTIMATOR}
    recipe = Recipe(target, tolerance, num_epochs, lr, lr, **(chosen | options))
    train = data["train"]
    if not isinstance(train, DataLoader):
        raise ValueError(f"the training batches are a {type(train).__name__}; expected a torch.utils.data.DataLoader.")
    examples: Any = train.dataset
    if not isinstance(examples, Sized):
        raise ValueError(
            f"the training data are a {type(examples).__name__} without a length; expected a dataset with `__len__`, "
            "the number of examples, by which the posterior weighs data against prior."
        )
    described = f"{len(examples):,} training examples"
    loaders = Loaders(train, data["validation"], data["test"], len(examples), described)
    accelerator = Accelerator(cpu=device_of(model).type == "cpu", device_placement=False)
    check_launch(accelerator, None)
    _check_batches(loaders)
    example = first_example(model, next(iter(loaders.validation)))
    task = LoaderTask(loaders, accelerator, metric=metric, example_inputs=example)
    task.score(model, "test")  # which comes last: what cannot be measured is told now
    with undone_on_error(restore_point(model)):
        return run(model, task, recipe, Path(out), LoggedProgress(), name=type(model).__name__, is_trained=True)


def run(
    model: nn.Module, task: Task, recipe: Recipe, out: Path, progress: Progress, *, name: str, is_trained: bool
) -> Compressed:
    """Compresses the model and saves it to `out` with a report.

    What decides anything is measured on the validation split; the test split gives the report's two figures.

    Args:
        model: A model for the task; changed in place.
        task: Data, training and metric.
        recipe: What to do.
        out: Directory of the result.
        progress: Hears of every stage.
        name: The model's name, for the report's title.
        is_trained: Whether the model needs no training before it is converted.
    """
    history: list[HistoryPoint] = []

    def validate(candidate: nn.Module, label: str) -> float:
        value, num_parameters = task.score(candidate, "validation"), count_parameters(candidate).nonzero
        if math.isfinite(value):  # as a number in a file of JSON has to be
            history.append(HistoryPoint(num_parameters, value, label))
        progress.say(f"validation {task.metric.shown(value)} with {num_parameters:,} non-zero parameters")
        return value

    if recipe.bits is not None and recipe.train_rounded and task.is_sharded:
        raise ValueError(
            "training cuts the weights over processes (FSDP), where they cannot be held to grids; leave training after "
            "rounding out (train_rounded=False, --no-train-rounded), or launch with DDP or one process."
        )
    _check_feasible(model, task, recipe)
    progress.stage("Use the trained model" if is_trained else "Train the dense model")
    if not is_trained:
        task.train(model, progress, Training(recipe.num_epochs, recipe.train_lr))
    dense = copy.deepcopy(model).eval()
    distill = distillation(dense) if recipe.distill else None
    reference = validate(dense, "dense")

    _convert(model, recipe)
    ratios = None
    if recipe.learns_stds:
        progress.stage("Learn how certain each weight is")
        task.train(model, progress, Training(recipe.num_epochs, recipe.lr, learn_stds=True))
        ratios = signal_to_noise(model)
        progress.say(f"validation {task.metric.shown(task.score(model, 'validation'))}")

    frozen: AbstractContextManager[Any] = nullcontext()
    progress.stage(recipe.removal)
    progress.say(f"layers: {conversion_table(model).summary()}")
    if recipe.target is None:
        model = _smallest(model, task, recipe, progress, reference, validate, distill)
    elif recipe.gates:
        gates.add_weight_gates(model, recipe.goal)
        task.train(model, progress, Training(recipe.num_epochs, recipe.lr, learn_stds=True, temperature=0.0))
        gates.close(model)
        validate(model, "removed")
    elif recipe.removes_weights:
        task.train(model, progress, Training(recipe.num_epochs, recipe.lr, learn_stds=True, target=recipe.goal))
        validate(model, "removed")
    else:
        removal = prune_channels(
            model,
            _example(model, task),
            target=recipe.target,
            granularity=recipe.granularity,
            uniform=recipe.uniform,
            data=task.calibration,
        )
        frozen = freeze_batch_norm(model) if removal.keeps_statistics else frozen
        progress.say(str(removal))
        validate(model, "removed")

    progress.stage("Fine-tune the smaller model")
    tables: tuple[ExtraTable, ...] = ()
    with frozen:
        if not recipe.removes_weights:
            to_deterministic(model)
            task.train(model, progress, Training(recipe.num_epochs, recipe.lr, distill=distill))
        else:
            _fine_tune(model, task, recipe.num_epochs, recipe.lr, progress, distill)  # its masks keep the zeros
            to_deterministic(model)
        tuned = validate(model, "fine-tuned")
        if recipe.bits is not None:
            progress.stage(f"Round the weights to {recipe.bits} bits")
            tables = (_rounded(model, task, recipe, progress, tuned, validate, distill),)

    if not task.is_main:
        return Compressed(model, None)
    progress.stage("Save and report")
    points = [{"nonzero_parameters": p.nonzero_parameters, task.metric.name: p.accuracy} for p in history]
    said = [{"label": p.label, **point} for p, point in zip(history, points, strict=True)]
    is_rebuilt = describe(model, None) is not None  # and its outputs can be compared with those of what is written
    example = _example(model, task) if is_rebuilt else None
    save(model, out, example_inputs=example, history=said, coding=recipe.coding)
    if recipe.levels:  # which may be out of reach of what a search has found
        smaller = _levels(model, task, recipe, progress)
        save(model, out, example_inputs=example, history=said, coding=recipe.coding, levels=smaller)
    with tempfile.TemporaryDirectory() as directory:
        save(dense, directory)  # for its size
        result = report(
            dense,
            model,
            task.example_inputs,
            snr=ratios,
            history=history,
            metric=task.metric,
            paths=(directory, out),
            title=f"{name} on {task.description}",
        )
    result = replace(
        with_scores(result, *(task.score(candidate, "test") for candidate in (dense, model))), tables=tables
    )
    result.save(out)
    task.save_preparation(out)
    if recipe.corruptions:  # which may fail, and then there is the report without
        progress.say("corrupting the test images")
        tables += what_was_lost(dense, model, task, num_batches=_BATCHES)
        result = replace(result, tables=tables)
        result.save(out)
    return Compressed(model, result)


def _rounded(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    progress: Progress,
    tuned: float,
    validate: Callable[[nn.Module, str], float],
    distill: Distillation | None,
) -> ExtraTable:
    """Rounds the weights in place, trains them on where asked, and says what each cost; what was no better goes."""
    rounded = quantize(model, itertools.islice(task.calibration, _BATCHES), bits=recipe.bits)
    progress.say(str(rounded))
    label = f"{recipe.bits} bits"
    scores = {"fine-tuned": tuned, label: validate(model, label)}
    remark = f"On validation data. The weights stand on grids of {label}"
    if recipe.train_rounded:
        progress.say("training goes on with the weights held to their grids")
        before = copy.deepcopy(model.state_dict())
        task.train(model, progress, Training(recipe.num_epochs, recipe.lr, distill=distill, rounded=rounded))
        trained = f"{label}, trained on"
        scores[trained] = validate(model, trained)
        remark += ", and were held to them while training went on for as many epochs again (straight-through)"
        gained = (scores[trained] - scores[label]) * (-1 if task.metric.is_lower_better else 1)
        if not gained >= 0:  # NaN is no gain
            model.load_state_dict(before)
            progress.say("that was worse: the rounded weights stay as they were")
            remark += ". That was worse, and the result has the weights of before"
    rows = tuple((name, task.metric.shown(score)) for name, score in scores.items())
    return ExtraTable("Rounded weights", f"{remark}.", ("weights", task.metric.name), rows)


def _levels(model: nn.Module, task: Task, recipe: Recipe, progress: Progress) -> list[Level]:
    """Smaller versions of the result, each with its score."""
    found = levels(model, _example(model, task), recipe.levels, data=task.calibration, granularity=recipe.granularity)
    for level in found:
        progress.say(f"level {level.target}: validation {task.metric.shown(task.score(level.model, 'validation'))}")
    return found


def _check_batches(loaders: Loaders) -> None:
    """Refuses batches of which there are none, or none any more for the second model that is measured on them.

    Raises:
        ValueError: they are an iterator, or empty.
    """
    for split in ("train", "validation", "test"):
        batches: Any = getattr(loaders, split)
        check_batches(batches, f"data[{split!r}]")
        if isinstance(batches, Iterator):
            raise ValueError(
                f"the {split} batches are a {type(batches).__name__}, which one pass uses up; expected what starts "
                "anew each time, such as a DataLoader or a list."
            )
        if length_of(batches, None) == 0:
            raise ValueError(
                f"there is no {split} batch; expected one at least. A DataLoader with drop_last=True leaves out a last "
                "batch that is not full."
            )


def _convert(model: nn.Module, recipe: Recipe) -> nn.Module:
    estimator = "mean" if recipe.gates else recipe.estimator  # gates held to a target are to learn without noise
    return to_variational(model, std=recipe.structure, relative_std=recipe.relative_std, estimator=estimator)


def _check_feasible(model: nn.Module, task: Task, recipe: Recipe) -> None:
    """What is out of reach is told now, not after the training: the target, the levels, corrupted images."""
    if recipe.corruptions:
        check_images(task.example_inputs)
    trial, example = _convert(copy.deepcopy(model), recipe), _example(model, task)
    if recipe.removes_weights:
        prune_weights(trial, recipe.goal, min_kept=0 if recipe.gates else 1)
    else:
        cut = prune_channels(trial, example, target=recipe.goal, granularity=recipe.granularity, uniform=recipe.uniform)
        if recipe.uniform and cut.config is None and hasattr(model, "config"):
            raise ValueError(
                f"uniform was asked for, but the config of {type(model).__name__} cannot say the sizes it would have "
                f"without {' and '.join(recipe.granularity)}; try --granularity mlp, or leave uniform out: then "
                "`import bayesprune` comes before loading."
            )
    if recipe.levels:
        levels(trial, example, recipe.levels, fit=False, granularity=recipe.granularity)


def _smallest(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    progress: Progress,
    reference: float,
    validate: Callable[[nn.Module, str], float],
    distill: Distillation | None,
) -> nn.Module:
    """The smallest model whose metric is within the tolerance of the reference, the dense model's."""
    assert recipe.tolerance is not None, "a recipe has a target or a tolerance"
    sign = -1 if task.metric.is_lower_better else 1
    # A fraction of the reference where the metric has no scale of its own, as perplexity.
    tolerance = recipe.tolerance * (reference if task.metric.is_lower_better else 1)
    labels = (f"cut {number}" if number else "learned" for number in itertools.count())
    options = {} if recipe.removes_weights else {"granularity": recipe.granularity, "uniform": recipe.uniform}
    found = smallest_within(
        model,
        _example(model, task),
        evaluate=lambda candidate: sign * validate(candidate, next(labels)),
        tolerance=tolerance,
        fine_tune=lambda candidate: _fine_tune(
            candidate, task, max(1, recipe.num_epochs // 2), recipe.lr, progress, distill
        ),
        reference=sign * reference,
        by=recipe.by,
        data=task.calibration,
        **options,
    )
    progress.say(str(found))
    return found.model


def _fine_tune(
    model: nn.Module, task: Task, num_epochs: int, lr: float, progress: Progress, distill: Distillation | None
) -> None:
    stds = [part for p in named_posteriors(model) for part in p.log_std_parts if part.requires_grad]
    for part in stds:
        part.requires_grad_(False)  # DDP waits for the gradient of whatever may have one
    try:
        with sampling(model, "mean"):  # as it will be used; the stds stay as they were learned
            task.train(model, progress, Training(num_epochs, lr, distill=distill))
    finally:
        for part in stds:
            part.requires_grad_(True)


def _example(model: nn.Module, task: Task) -> Any:
    return on_device(task.example_inputs, device_of(model))
