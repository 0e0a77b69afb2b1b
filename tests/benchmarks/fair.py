"""Channels, fairly: every score spends the same gradient evaluations in the way that suits it best.

Of each score its option, its allocation between layers and its compensation are chosen on validation images right after
the cut, with seed 0 and as many tries for each score; where there is training, then the moment of the cut and the
learning rate, by the accuracy after it. Regimes: "none", 1,024 calibration images and no training; "short", about half
an epoch; "medium", two epochs; "long", ten. Batch norm is recalibrated in every row alike. Finished rows are written
at once and skipped when the program runs again; several processes may work on one results file.

    python tests/benchmarks/fair.py --data-dir DATA --task resnet20 --regime none
    python tests/benchmarks/fair.py --data-dir DATA --task resnet20 --regime short
    python tests/benchmarks/fair.py --data-dir DATA --task convnet --regime long [--no-number]
    python tests/benchmarks/fair.py --data-dir DATA --regime medium --no-number --only "channel gates" magnitude
    python tests/benchmarks/fair.py --table
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from common import parser, read, write
from fair_choice import (
    AT_CUT,
    AT_END,
    NO_NUMBER,
    Row,
    best,
    chosen,
    chosen_cut,
    cut_rows,
    cut_tries,
    few_tries,
    further_tries,
    level_of,
    matching,
    packed,
    stops,
    way_of,
    whens,
)
from fair_methods import ALLOCATIONS, ATTENTIVE, COMPENSATIONS, MEASURED_IMAGES, SCORES, Net
from fair_table import markdown
from fair_tasks import CALIBRATION_IMAGES, EPOCHS, LEVELS, LRS, STEPS, is_right, task, tested_levels
from fair_training import PHASES, WHENS, Way, fine_tuned, trained
from torch import nn

from bayesprune.reports import count_parameters

SETTINGS = {
    "calibration_images": CALIBRATION_IMAGES,
    "measured_images": MEASURED_IMAGES,
    "short_steps": STEPS,
    "long_epochs": EPOCHS,
}
STOPS_AFTER = "after three fifths"
"""When what is told no number cuts."""


class Benchmark:
    """The rows of the results file about one network, and what they are made from."""

    def __init__(self, data_dir: Path, out: Path, name: str, *, has_few_tries: bool = False) -> None:
        self.out, self.task, self.has_few_tries = out, task(name, data_dir), has_few_tries
        self.nets: dict[Any, Net] = {}
        self.row({"dense": name}, lambda: self.measured(self.task.dense, "test"))

    @property
    def rows(self) -> list[Row]:
        """All rows that are finished, those of other processes too."""
        return read(self.out, SETTINGS)

    def without_training(self, scores: list[str], seeds: list[int], *, has_grid: bool) -> None:
        """Chooses, tests what was chosen, then, for the grid, its option with every allocation and compensation."""
        name, scores = self.task.name, [score for score in scores if not SCORES[score].phase]
        for level in LEVELS[name]:
            for score in scores:
                self.choose_cut("none", score, level)
        for is_grid in (False, True)[: 1 + has_grid]:
            for seed in seeds:
                for score in scores:
                    for level in LEVELS[name]:
                        way = chosen_cut(self.rows, "none", name, score, level)
                        assert way is not None, "it was chosen above"
                        for other in every_cut(way) if is_grid else [way]:
                            self.measure("none", other, level, seed, "test", AT_CUT)

    def with_training(
        self, regime: str, scores: list[str], seeds: list[int], *, is_distilled: bool, features: float = 0.0
    ) -> None:
        """Chooses the moment of the cut and the learning rate, which few tries leave out in long runs, and tests."""
        name = self.task.name
        for score in scores:
            for level in LEVELS[name]:
                self.choose_cut(regime, score, level)
        for score in scores:
            if not (self.has_few_tries and regime == "long"):
                self.choose_spending(regime, score)
        for seed in seeds:
            for score in scores:
                for level in tested_levels(name, regime):
                    way = chosen(self.rows, regime, name, score, level)
                    assert way is not None, "it was chosen above"
                    way = replace(way, distilled=is_distilled, features=features)
                    self.measure(regime, way, level, seed, "test", AT_END)

    def without_number(self, regime: str, scores: list[str], seeds: list[int]) -> None:
        """Removes what the posterior says after a training, then gives scores without one the same MACs."""
        name = self.task.name
        for score in (its for its in scores if SCORES[its].phase and not SCORES[its].is_control):
            way = Way(score, "", "", "layer by layer", STOPS_AFTER, LRS[name][0], distilled=True)
            if SCORES[score].says_sizes:
                for lr in LRS[name]:
                    self.measure(regime, replace(way, lr=lr), NO_NUMBER, 0, "validation", AT_END)
                key = {"task": name, "regime": regime, "score": score, "part": "validation", "at": AT_END}
                tried = best(matching(self.rows, **key))
                assert tried is not None, "it was measured above"
                way = way_of(tried)
            for seed in seeds:
                self.measure(regime, way, NO_NUMBER, seed, "test", AT_END)
                stopped = next(row for row in stops(self.rows, regime, name, score) if row["run"]["seed"] == seed)
                level = level_of(stopped, self.task.macs(self.task.dense))
                for other in (other for other in scores if not SCORES[other].phase):
                    its = chosen(self.rows, regime, name, other, level)
                    assert its is not None, "it was chosen with a number"
                    self.measure(regime, its, level, seed, "test", AT_END)

    def choose_cut(self, regime: str, score: str, level: float) -> None:
        """Tries options and allocations, then the other compensations with the best option."""
        regime = regime if SCORES[score].phase else "none"
        if self.has_few_tries:
            for way in few_tries(score, self.task.name):
                self.measure(regime, way, level, 0, "validation", AT_CUT)
            return
        tried = cut_tries(score, self.task.name)
        for way in tried:
            self.measure(regime, way, level, 0, "validation", AT_CUT)
        rows = cut_rows(self.rows, regime, self.task.name, score, level)
        best = max(tried, key=lambda way: accuracy_of(rows, way))
        for way in further_tries(best):
            self.measure(regime, way, level, 0, "validation", AT_CUT)

    def choose_spending(self, regime: str, score: str) -> None:
        """Tries when to cut (at once alone, with few tries), then the other learning rates at the best moment."""
        name, level = self.task.name, LEVELS[self.task.name][-1]
        way = chosen_cut(self.rows, regime, name, score, level)
        assert way is not None, "it was chosen before"
        for when in whens(score)[: 1 if self.has_few_tries else None]:
            self.measure(
                regime, replace(way, when=when, lr=LRS[name][0], distilled=True), level, 0, "validation", AT_END
            )
        rows = matching(self.rows, task=name, regime=regime, score=score, level=level, part="validation", at=AT_END)
        rows = [row for row in rows if row["run"]["lr"] == LRS[name][0]]
        when = max(rows, key=lambda row: row["accuracy"])["run"]["when"]
        for lr in LRS[name][1:]:
            self.measure(regime, replace(way, when=when, lr=lr, distilled=True), level, 0, "validation", AT_END)

    def measure(self, regime: str, way: Way, level: float | str, seed: int, part: str, at: str) -> None:
        """One row, at a fraction of the MACs or without a number."""
        run = {"task": self.task.name, "regime": regime, "level": level, "seed": seed, "part": part, "at": at}
        steps = self.task.steps(regime)

        def make() -> Row:
            before = round(WHENS[way.when].before * steps)
            net = self.net(way, before, seed)
            if at == AT_END:
                cut, tuned = fine_tuned(net, way, level if isinstance(level, float) else None, steps - before)
                return {"at_once": self.measured(cut, part)["accuracy"]} | self.measured(tuned, part)
            assert isinstance(level, float), "what has no number is trained on"
            scores = net.allocated(way.score, way.option, way.allocation, way.compensation, level)
            return self.measured(net.cut(scores, way.compensation, level), part)

        self.row({"run": run | asdict(way)}, make)

    def net(self, way: Way, before: int, seed: int) -> Net:
        """The network before the cut, kept for the other rows of the seed that share it."""
        key = (seed, before, *((SCORES[way.score].phase, way.lr, way.distilled) if before else ()))
        if key not in self.nets:
            self.nets = {other: net for other, net in self.nets.items() if other[0] == seed}
            self.nets[key] = trained(self.task, way, before, seed)
        return self.nets[key]

    def measured(self, model: nn.Module, part: str) -> Row:
        """Accuracy and size; of test images, which are right."""
        right = is_right(model, self.task.images[part])
        size = {"macs": self.task.macs(model), "params": count_parameters(model).total}
        found = {"accuracy": float(right.double().mean()), **size}
        return found | ({"images": len(right), "right": packed(right)} if part == "test" else {})

    def row(self, key: Row, make: Callable[[], Row]) -> None:
        """Makes a row that is not there, and adds it to what other processes have written meanwhile."""
        if has_row(self.rows, key):
            return
        start = time.perf_counter()
        made = key | make() | {"seconds": round(time.perf_counter() - start)}
        with locked(self.out):
            rows = self.rows
            if not has_row(rows, key):
                write(self.out, SETTINGS, [*rows, made])
        shown = {name: value for name, value in made.items() if name not in ("right", "images", "params")}
        print(time.strftime("%H:%M:%S"), shown, flush=True)


def has_row(rows: list[Row], key: Row) -> bool:
    """Whether one of the rows holds all of the key."""
    return any(key.items() <= row.items() for row in rows)


def every_cut(way: Way) -> list[Way]:
    """The same with every allocation and compensation."""
    return [
        replace(way, allocation=allocation, compensation=compensation)
        for allocation in ALLOCATIONS
        for compensation in COMPENSATIONS
    ]


def ranks_nothing(score: str) -> bool:
    """Whether it is of gates, which are open or closed."""
    return bool(SCORES[score].phase) and PHASES[SCORES[score].phase].gates is not None


def accuracy_of(rows: list[Row], way: Way) -> float:
    """The accuracy of the row that went this way."""
    (row,) = matching(rows, **asdict(way))
    return row["accuracy"]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process is with a file of the same folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def main() -> None:
    """Runs what is missing of one task and regime, or writes the page."""
    options = parser(__doc__ or "", "docs/benchmarks/fair.json")
    options.add_argument("--task", choices=LEVELS, default="resnet20")
    options.add_argument("--regime", choices=("none", "short", "medium", "long"), default="none")
    options.add_argument("--only", choices=SCORES, nargs="+", default=list(SCORES), help="these scores")
    options.add_argument("--grid", action="store_true", help="every allocation and compensation, without training")
    options.add_argument(
        "--few-tries", action="store_true", help="choose between three allocations, compensated, and cut at once"
    )
    options.add_argument("--no-number", action="store_true", help="remove what the posterior says, no more, no less")
    options.add_argument("--without-distillation", action="store_true", help="test with cross-entropy alone")
    options.add_argument(
        "--features", type=float, default=0.0, metavar="WEIGHT", help="test with the outputs of blocks compared, too"
    )
    args = options.parse_args()
    if not args.no_number:
        args.only = [score for score in args.only if not ranks_nothing(score)]
    if not args.task.startswith("resnet"):
        args.only = [score for score in args.only if score != ATTENTIVE]
    torch.set_num_threads(1)
    if args.table:
        args.out.with_suffix(".md").write_text(markdown(read(args.out, SETTINGS)), encoding="utf-8")
        return
    if args.data_dir is None:
        raise SystemExit("--data-dir or BAYESPRUNE_DATA is needed: the folder with cifar10, photos10 and weights.")
    benchmark = Benchmark(Path(args.data_dir), args.out, args.task, has_few_tries=args.few_tries)
    if args.no_number:
        benchmark.without_number(args.regime, args.only, args.seeds)
    elif args.regime == "none":
        benchmark.without_training(args.only, args.seeds, has_grid=args.grid)
    else:
        is_distilled = not args.without_distillation
        benchmark.with_training(args.regime, args.only, args.seeds, is_distilled=is_distilled, features=args.features)


if __name__ == "__main__":
    main()
