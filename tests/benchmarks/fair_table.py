"""The results of the fair comparison as Markdown."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from statistics import mean

from fair_choice import (
    AT_CUT,
    AT_END,
    Difference,
    Row,
    chosen,
    cut_rows,
    cut_tries,
    few_tries,
    further_tries,
    level_of,
    matching,
    paired,
    stops,
    unpacked,
    whens,
)
from fair_methods import ALLOCATIONS, COMPENSATIONS, SCORES
from fair_tasks import CALIBRATION_IMAGES, EPOCHS, LEVELS, LRS, MEDIUM_EPOCHS, STEPS, tested_levels
from fair_training import Way

INTRODUCTION = """# Channels, fairly

    python tests/benchmarks/fair.py --data-dir DATA --task TASK --regime REGIME
    python tests/benchmarks/fair.py --table

The last command writes this page from fair.json, which also holds every single run; tasks are {tasks}, regimes
none, short and long. Trained networks lose channels. **In each table every row has the same number of gradient
evaluations and spends them in the way that suits it best**: it cuts at once and trains for all of them, or cuts in
stages, or trains first. Every score has the same allocations between layers, the same compensation and the same
distillation from the dense network (logits, temperature 4, weight 0.9) to choose from.

- **Regimes**: none has {images:,} training images for scores and statistics and trains nothing; short is {short};
  medium is {medium} epochs, long {epochs}. What a score or a compensation takes gradients of, {images:,} images each
  and at each cut, is taken off its training. Forward passes are not counted: a measured allocation takes some hundred
  batches of them.
- **Allocation**: the scores' own scale over the whole network; the same share inside layers; the same share of every
  isomorphic class, that is of groups with equal layers and sizes; measured (`MeasuredImportance`); tilted, scores for
  each MAC times exp(t depth), with the t by which the whole cut and compensated network has the lowest loss; the same
  of measured costs.
- **Compensation**: none; conditioned (`fit_kronecker`, `condition_on_channels`); layer by layer (`laplace.compensate`).
- **Choice**, on validation images with seed 0, for each score and level: {cut} settings of option and allocation,
  conditioned, by the accuracy right after the cut, then {further} more with the best option (no compensation; layer by
  layer with the best allocation and with the tilted ones). Where there is training, then {spending} settings of when to
  cut and the learning rate, at the smallest level, by the accuracy after it. The published weights of the CIFAR
  networks have seen these validation images, no fine-tuning here has; the convnet has not seen its own.
- Batch norm is recalibrated right after the cut in every row alike, where that brings the outputs closer to the dense
  network's. Training normalises by batches, and statistics are measured anew at the end;
  efficientnet_lite0 alone keeps its statistics in training (`freeze_batch_norm`), in every row alike. Channels
  of blocks alone can go from the CIFAR networks.
- **Accuracy** on test images in %, mean over the seeds (how many, where it is not three). Beside it the difference to
  the best control of the column and its standard error, paired by seeds and images, both of which count as samples.
  Controls are the scores without a posterior behind them, *in italics*.
"""
TITLES = {
    "resnet20": "ResNet-20, CIFAR-10",
    "resnet56": "ResNet-56, CIFAR-10",
    "convnet": "Six convolutions, Fashion-MNIST: no setting was ever chosen on it",
}


def markdown(rows: Sequence[Row]) -> str:
    """The whole page."""
    lines = [introduction()]
    for task in LEVELS:
        dense = next((row for row in rows if row.get("dense") == task), None)
        if dense is None:
            continue
        lines += [f"## {TITLES.get(task, f'{task}, photographs')}", ""]
        lines += [f"Dense: {dense['accuracy']:.1%} of {dense['images']:,} test images.{tried(rows, task)}", ""]
        lines += section(rows, "none", task, "No training", is_distilled=False)
        lines += grids(rows, task)
        for regime in ("short", "medium", "long"):
            lines += section(rows, regime, task, f"{regime.capitalize()}, distilled", is_distilled=True)
            weights = {row["run"]["features"] for row in matching(rows, task=task, regime=regime)}
            for features in sorted(weights - {0.0}):
                title = f"{regime.capitalize()}, distilled, outputs of blocks compared with the weight {features:g}"
                lines += section(rows, regime, task, title, is_distilled=True, features=features)
            lines += section(rows, regime, task, f"{regime.capitalize()}, cross-entropy alone", is_distilled=False)
            lines += without_number(rows, regime, task, dense)
    return "\n".join(lines).rstrip() + "\n"


def introduction() -> str:
    """What was done, in words."""
    short = ", ".join(f"{steps} batches for {name}" for name, steps in STEPS.items())
    tries = cut_tries("magnitude", "resnet20")
    spending = len(whens("magnitude")) + len(LRS["resnet20"]) - 1
    return INTRODUCTION.format(
        tasks=", ".join(LEVELS),
        images=CALIBRATION_IMAGES,
        short=short,
        epochs=EPOCHS,
        medium=MEDIUM_EPOCHS,
        cut=len(tries),
        further=len(further_tries(tries[0])),
        spending=spending,
    )


def tried(rows: Sequence[Row], task: str) -> str:
    """A sentence where settings were chosen from fewer than the page says."""
    level = LEVELS[task][-1]
    numbers = {len(cut_rows(rows, "none", task, score, level)) for score in SCORES} - {0}
    few = len(few_tries("magnitude", task))
    if numbers == {few}:
        said = f" Settings were chosen from {few}: three allocations with a score's first option, layer by layer."
        is_long = bool(matching(rows, task=task, regime="long"))
        return said + (f" The long regime cuts at once and has the learning rate {LRS[task][0]:g}." if is_long else "")
    return ""


def section(
    rows: Sequence[Row], regime: str, task: str, title: str, *, is_distilled: bool, features: float = 0.0
) -> list[str]:
    """Every score in its chosen way."""
    levels = tested_levels(task, regime)
    found = {
        (score, level): chosen_rows(rows, regime, task, score, level, is_distilled=is_distilled, features=features)
        for score in SCORES
        for level in levels
    }
    found = {key: its for key, its in found.items() if its}
    if not found:
        return []
    controls = {level: best_control(found, level) for level in levels}
    means = {key: accuracy(its) for key, its in found.items()}
    highest = {level: max((means[key] for key in means if key[1] == level), default=0.0) for level in levels}
    scores = {score for score, _ in found}
    order = sorted(scores, key=lambda score: [-means.get((score, level), 0.0) for level in reversed(levels)])
    has_training = regime != "none"
    heads = [f"{level:g} of the MACs | to the best control | way" for level in levels]
    heads = [head.replace(" | to", " | at once | to") if has_training else head for head in heads]
    lines = [f"### {title}", "", f"| | {' | '.join(heads)} |", "|---" * (1 + (3 + has_training) * len(levels)) + "|"]
    for score in order:
        cells = [f"*{score}*" if SCORES[score].is_control else f"**{score}**"]
        for level in levels:
            its = found.get((score, level), [])
            cells.append(shown(its, is_best=means.get((score, level)) == highest[level]))
            if has_training:
                cells.append(f"{100 * mean(row['at_once'] for row in its):.1f}" if its else "")
            control = controls[level]
            cells.append(against(its, found[control, level]) if its and control and score != control else "")
            cells.append(described(its) if its else "")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def without_number(rows: Sequence[Row], regime: str, task: str, dense: Row) -> list[str]:
    """What the posterior says removed, beside scores without a training before the cut at the same MACs."""
    lines: list[str] = []
    for score in SCORES:
        its = stops(rows, regime, task, score)
        if not its:
            continue
        left = [f"{mean(row[what] / dense[what] for row in its):.3f}" for what in ("macs", "params")]
        cells = [f"**{score}**", *left, shown(its, is_best=False)]
        lines.append(f"| {' | '.join(cells)} | {100 * mean(row['at_once'] for row in its):.1f} | |")
        for other in (other for other in SCORES if not SCORES[other].phase):
            same = [found for row in its if (found := at_its_macs(rows, row, other, dense["macs"]))]
            if same:
                cells = [f"{other}, in its own way to as many MACs", "", "", shown(same, is_best=False)]
                lines.append(f"| {' | '.join(cells)} | | {against(its, same)} |")
    if not lines:
        return []
    heads = ["| | of the MACs | of the parameters | accuracy | right after the cut | ours to it |", "|---" * 6 + "|"]
    title = f"### {regime.capitalize()}, no number given: an SNR below one, or a closed gate, is removed"
    return [title, "", *heads, *lines, ""]


def at_its_macs(rows: Sequence[Row], stopped: Row, score: str, dense_macs: int) -> Row | None:
    """The row of a score at the MACs at which another one stopped by itself, of the same seed."""
    run = stopped["run"]
    key = {name: run[name] for name in ("task", "regime", "seed", "part", "at")}
    return next(iter(matching(rows, **key, score=score, level=level_of(stopped, dense_macs))), None)


def chosen_rows(
    rows: Sequence[Row], regime: str, task: str, score: str, level: float, *, is_distilled: bool, features: float
) -> list[Row]:
    """The test rows of a score's chosen way, by seed."""
    way = chosen(rows, regime, task, score, level)
    if way is None or (regime == "none" and SCORES[score].phase):
        return []
    way = way if regime == "none" else replace(way, distilled=is_distilled, features=features)
    at = AT_CUT if regime == "none" else AT_END
    its = matching(rows, task=task, regime=regime, level=level, part="test", at=at, **asdict(way))
    return sorted(its, key=lambda row: row["run"]["seed"])


def best_control(found: dict[tuple[str, float], list[Row]], level: float) -> str | None:
    """The control with the highest mean at a level; None where none was run."""
    controls = [score for score, its in found if its == level and SCORES[score].is_control]
    return max(controls, key=lambda score: accuracy(found[score, level]), default=None)


def accuracy(rows: Sequence[Row]) -> float:
    """The mean, in %."""
    return 100 * mean(row["accuracy"] for row in rows)


def difference(rows: Sequence[Row], control: Sequence[Row]) -> Difference | None:
    """To the control, on the seeds that both have."""
    ours, theirs = ({row["run"]["seed"]: row for row in its} for its in (rows, control))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    return paired(*([unpacked(its[seed]["right"], its[seed]["images"]) for seed in seeds] for its in (ours, theirs)))


def against(rows: Sequence[Row], control: Sequence[Row]) -> str:
    found = difference(rows, control)
    return "" if found is None else f"{found.points:+.1f} ± {found.standard_error:.1f}"


def shown(rows: Sequence[Row], *, is_best: bool) -> str:
    """A cell with an accuracy."""
    if not rows:
        return ""
    text = f"**{accuracy(rows):.1f}**" if is_best else f"{accuracy(rows):.1f}"
    return text if len(rows) == 3 else f"{text} ({len(rows)})"


def described(rows: Sequence[Row]) -> str:
    """A way in words."""
    run = rows[0]["run"]
    parts = [run["option"], run["allocation"], *([run["compensation"]] if run["compensation"] != "none" else [])]
    parts += [run["when"], f"{run['lr']:g}"] if run["at"] == AT_END else []
    return ", ".join(filter(None, parts))


def grids(rows: Sequence[Row], task: str) -> list[str]:
    """Every allocation with every compensation, without training: scores under equal conditions."""
    lines: list[str] = []
    for level in LEVELS[task]:
        test = matching(rows, task=task, regime="none", level=level, part="test", at=AT_CUT)
        tried = {score: chosen(rows, "none", task, score, level) for score in SCORES if not SCORES[score].phase}
        ways = {score: way for score, way in tried.items() if way is not None}
        body = []
        for allocation, compensation in product(ALLOCATIONS, COMPENSATIONS):
            cells = [grid_cell(test, way, allocation, compensation) for way in ways.values()]
            if any(cells):
                body.append(f"| {allocation}, {compensation} | {' | '.join(cells)} |")
        if body:
            lines += [f"### No training, {level:g} of the MACs, under equal allocation and compensation", ""]
            lines += ["Each score with the option that was chosen for it.", ""]
            lines += [f"| | {' | '.join(ways)} |", "|---" * (1 + len(ways)) + "|", *body, ""]
    return lines


def grid_cell(test: Sequence[Row], way: Way, allocation: str, compensation: str) -> str:
    found = matching(test, **asdict(replace(way, allocation=allocation, compensation=compensation)))
    return shown(found, is_best=False)
