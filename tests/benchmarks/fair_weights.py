"""Single weights, fairly: trained ResNets lose 90 and 95 % of their weights, without training and with the same.

What is fitted is fitted by the same code, from 1,024 training images: "magnitude, fitted" is `prune_one_shot` with the
largest weights of each layer in place of its own choice, its sparsities divided between layers in the same way. In the
regime short each row is taught by the dense network (logits, temperature 4, weight 0.9) for as many batches, and
removes weights in the way that suits it best: at once, in stages, or gradually. That and the learning rate are chosen
on 2,000 validation images with seed 0, among as many settings for each row. Finished rows are written at once and
skipped when the program runs again.

    python tests/benchmarks/fair_weights.py --data-dir DATA --task resnet20 --regime none
    python tests/benchmarks/fair_weights.py --data-dir DATA --task resnet56 --regime short
    python tests/benchmarks/fair_weights.py --table
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import parser, read, write
from criterion_methods import DECAY
from cuts import largest_weights
from fair_choice import packed, paired, unpacked
from fair_tasks import Task, is_right, task
from fair_training import RECALIBRATION_BATCHES, distillation
from torch import nn

import bayesprune as bp
from bayesprune.laplace import RunningLaplace
from bayesprune.prune import PruneSchedule, SNRScore, prune_one_shot, recalibrate_batch_norm
from bayesprune.prune.scores.weights import magnitude

Row = dict[str, Any]
STEPS = {"resnet20": 240, "resnet56": 200}
KEPT = 0.05
"""Of the weights, in the regime short."""
KEPT_AT_ONCE = (0.1, 0.05)
"""In the regime none."""
STAGE = 0.15
"""Of the steps, between one cut and the next."""
LRS = (0.03, 0.01)
SETTINGS = {"steps": STEPS, "kept": KEPT, "kept_at_once": KEPT_AT_ONCE, "learning_rates": LRS}


@dataclass(frozen=True)
class Way:
    """A row: what ranks, how it removes, and the learning rate."""

    score: str
    when: str
    lr: float
    kept: float = KEPT


SHOTS = {"at once": 1, "in 3 stages": 3}
GRADUAL = {"until 0.5": 0.5, "until 0.7": 0.7}
"""The share of the steps at which a gradual removal ends, which began after a tenth."""
SCORES: dict[str, tuple[str, ...]] = {
    "one shot": tuple(SHOTS),
    "magnitude, fitted": tuple(SHOTS),
    "running Laplace": tuple(GRADUAL),
    "magnitude": tuple(GRADUAL),
}
CONTROLS = ("magnitude, fitted", "magnitude")


def cut(model: nn.Module, way: Way, kept: float, calibration: list[Any]) -> None:
    """Removes weights in place, the others moving to make up for them."""
    if way.score == "one shot":
        prune_one_shot(model, calibration, f"weights={kept}")
        return
    with largest_weights():
        prune_one_shot(model, calibration, f"weights={kept}")


def trained(of: Task, way: Way, seed: int) -> tuple[nn.Module, nn.Module | None]:
    """The network at the end, and right after its last cut where it is cut in shots."""
    torch.manual_seed(seed)
    model, calibration = copy.deepcopy(of.dense), of.calibration(seed)
    if not way.lr:
        cut(model.eval(), way, way.kept, calibration)
        return model, None
    total = STEPS[of.name]
    batches, loss = of.draw(total, seed + 1_000, True), distillation(of.dense)
    optimizer = of.optimizer([p for n, p in model.named_parameters() if not n.endswith("log_std")], lr=way.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / total))
    num_cuts, at_cut = SHOTS.get(way.when, 0), None
    cuts = {round(STAGE * number * total): KEPT ** ((number + 1) / num_cuts) for number in range(num_cuts)}
    remove: Callable[[int], None] = gradual(model, optimizer, way, total, of) if way.when in GRADUAL else lambda _: None
    for step, (images, labels) in enumerate(islice(batches, total)):
        if step in cuts:
            model.eval()
            cut(model, way, cuts[step], calibration)
            at_cut = copy.deepcopy(model)
        model.train()
        optimizer.zero_grad()
        loss(model, images, labels).backward()
        optimizer.step()
        schedule.step()
        remove(step + 1)
    recalibrate_batch_norm(model, of.draw(RECALIBRATION_BATCHES, seed + 100, True))
    return model.eval(), at_cut


def gradual(
    model: nn.Module, optimizer: torch.optim.Optimizer, way: Way, total: int, of: Task
) -> Callable[[int], None]:
    """What removes weights after so many steps."""
    schedule = PruneSchedule(f"weights={KEPT}", begin=0.1, end=GRADUAL[way.when], num_updates=30)
    laplace, score = None, magnitude
    if way.score == "running Laplace":
        laplace = RunningLaplace(optimizer, model, num_data=of.num_data, batch_size=of.batch_size, decay=DECAY)
        score = SNRScore(0.5)

    def remove(step: int) -> None:
        removal = schedule.removal_after(step, total)
        if removal is not None:
            if laplace is not None:
                laplace.update()
            bp.prune_weights(model, f"weights={1 - removal}", score=score)

    return remove


def sparsity(model: nn.Module) -> float:
    """The fraction of the weights of linear layers and convolutions that is zero."""
    weights = [m.get_parameter("weight") for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return float(sum((w == 0).sum() for w in weights)) / sum(w.numel() for w in weights)


def measured(of: Task, way: Way, seed: int, part: str) -> Row:
    """One run."""
    start = time.perf_counter()
    model, at_cut = trained(of, way, seed)
    right = is_right(model, of.images[part])
    row: Row = {"task": of.name, "seed": seed, "part": part, **asdict(way)}
    row |= {"accuracy": float(right.double().mean()), "sparsity": sparsity(bp.to_deterministic(model))}
    if at_cut is not None:
        row["at_cut"] = float(is_right(at_cut, of.images[part]).double().mean())
    if part == "test":
        row |= {"images": len(right), "right": packed(right)}
    row["seconds"] = round(time.perf_counter() - start)
    print(time.strftime("%H:%M:%S"), {key: value for key, value in row.items() if key != "right"}, flush=True)
    return row


def chosen(rows: list[Row], name: str, score: str) -> Way | None:
    """The setting with the best accuracy on validation images."""
    tried = [r for r in rows if (r["task"], r["score"], r["part"]) == (name, score, "validation")]
    best = max(tried, key=lambda row: row["accuracy"], default=None)
    return None if best is None else Way(best["score"], best["when"], best["lr"])


def run(of: Task, regime: str, out: Path, seeds: list[int], scores: list[str]) -> None:
    """Chooses, where there is something to choose, and tests."""

    def add(way: Way, seed: int, part: str) -> None:
        key = {"task": of.name, "seed": seed, "part": part, **asdict(way)}
        if not any(key.items() <= row.items() for row in read(out, SETTINGS)):
            row = measured(of, way, seed, part)
            write(out, SETTINGS, [*read(out, SETTINGS), row])

    if regime == "none":
        for seed in seeds:
            for kept in KEPT_AT_ONCE:
                for score in (score for score in scores if "at once" in SCORES[score]):
                    add(Way(score, "at once", 0.0, kept), seed, "test")
        return
    for score in scores:
        for when in SCORES[score]:
            for lr in LRS:
                add(Way(score, when, lr), 0, "validation")
    for seed in seeds:
        for score in scores:
            way = chosen(read(out, SETTINGS), of.name, score)
            assert way is not None, "it was chosen above"
            add(way, seed, "test")


def page(rows: list[Row]) -> str:
    """The page of the documentation."""
    lines = ["# Single weights, fairly", "", *(__doc__ or "").strip().splitlines(), ""]
    lines += [
        "Accuracy on 5,000 test images in %, mean over the seeds (how many, where it is not three). Beside it the",
        "difference to the best control and its standard error, paired by seeds and images. Controls are *in italics*.",
    ]
    for name in STEPS:
        for kept in KEPT_AT_ONCE:
            at_once = [row for row in rows if not row["lr"]]
            lines += section(at_once, f"{name}, {1 - kept:.0%} removed, no training", task=name, kept=kept)
        tuned = [row for row in rows if row["lr"]]
        lines += section(tuned, f"{name}, {1 - KEPT:.0%} removed, {STEPS[name]} batches", task=name)
    return "\n".join(lines) + "\n"


def section(rows: list[Row], title: str, **key: Any) -> list[str]:
    """The table of a task in one regime; nothing without rows."""
    tests = [row for row in rows if row["part"] == "test" and key.items() <= row.items()]
    found = {score: of for score in SCORES if (of := [row for row in tests if row["score"] == score])}
    if not found:
        return []
    lines = ["", f"## {title}", "", "| | accuracy | right after the cut | to the best control | way |"]
    lines.append("|---|---|---|---|---|")
    best = max((s for s in found if s in CONTROLS), key=lambda s: mean(found[s]), default=None)
    for score in sorted(found, key=lambda s: -mean(found[s])):
        of = found[score]
        count = "" if len(of) == 3 else f" ({len(of)})"
        cuts = [row["at_cut"] for row in of if "at_cut" in row]
        at_cut = f"{100 * sum(cuts) / len(cuts):.1f}" if cuts else ""
        shown = f"*{score}*" if score in CONTROLS else f"**{score}**"
        difference = "" if best is None or score in CONTROLS else against(of, found[best])
        way = f"{of[0]['when']}, {of[0]['lr']}" if of[0]["lr"] else of[0]["when"]
        lines.append(f"| {shown} | {100 * mean(of):.1f}{count} | {at_cut} | {difference} | {way} |")
    return lines


def against(rows: list[Row], control: list[Row]) -> str:
    """The difference over the seeds that both have, with its standard error."""
    by_seed = [{row["seed"]: unpacked(row["right"], row["images"]) for row in of} for of in (rows, control)]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    ours, others = ([of[seed] for seed in seeds] for of in by_seed)
    points, error = paired(ours, others)
    return f"{points:+.1f} ± {error:.1f}"


def mean(rows: list[Row]) -> float:
    """Mean accuracy."""
    return sum(row["accuracy"] for row in rows) / len(rows)


def main() -> None:
    """Runs what is missing, or writes the page."""
    options = parser(__doc__ or "", "docs/benchmarks/fair_weights.json")
    options.add_argument("--task", choices=STEPS, default="resnet56")
    options.add_argument("--regime", choices=("none", "short"), default="none")
    options.add_argument("--only", choices=SCORES, nargs="+", default=list(SCORES), help="these rows")
    args = options.parse_args()
    torch.set_num_threads(1)
    if args.table:
        args.out.with_suffix(".md").write_text(page(read(args.out, SETTINGS)), encoding="utf-8")
        return
    if args.data_dir is None:
        raise SystemExit("--data-dir or BAYESPRUNE_DATA is needed: the folder with cifar10 and weights.")
    run(task(args.task, Path(args.data_dir)), args.regime, args.out, args.seeds, args.only)


if __name__ == "__main__":
    main()
