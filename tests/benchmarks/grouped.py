"""Channels, groups, or both: trained ResNets at half of their MACs, without training, with the time that it takes.

Channels leave by `prune_channels`, groups come by `prune_groups`, both from the same 1,024 training images; "both" cuts
channels to 0.7 and makes groups for the rest. Times are those of forwards on 64 images that take turns, on one thread.
Finished rows are skipped when the program runs again.

    python tests/benchmarks/grouped.py --data-dir DATA --task resnet20
    python tests/benchmarks/grouped.py --table
"""

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import parser, read, write
from fair_tasks import Batch, Task, is_right, task
from torch import nn

import bayesprune as bp
from bayesprune.foundation.latency import seconds_in_turn
from bayesprune.prune import prune_groups

LEVEL, OF_CHANNELS = 0.5, 0.7
SETTINGS = {"level": LEVEL, "of_channels": OF_CHANNELS}
NAMES = ("resnet20", "resnet56")


def channels(of: Task, model: nn.Module, batches: list[Batch], level: float = LEVEL, round_to: int = 1) -> None:
    bp.prune_channels(model, of.example, f"macs={level}", data=batches, round_to=round_to)


def groups(of: Task, model: nn.Module, batches: list[Batch], level: float = LEVEL) -> None:
    prune_groups(model, of.example, f"macs={level}", data=batches)


def both(of: Task, model: nn.Module, batches: list[Batch]) -> None:
    channels(of, model, batches, OF_CHANNELS, round_to=8)  # widths that groups divide
    groups(of, model, batches, LEVEL * of.macs(of.dense) / of.macs(model))


def two_groups(of: Task, model: nn.Module, batches: list[Batch]) -> None:
    prune_groups(model, of.example, 2, data=batches)


WAYS: dict[str, Callable[..., None]] = {
    "channels": channels,
    "groups": groups,
    "both": both,
    "2 groups everywhere": two_groups,
}


def row(of: Task, way: str, seed: int) -> dict[str, Any]:
    """Accuracy, MACs and time of one cut model."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    model = copy.deepcopy(of.dense).eval()
    WAYS[way](of, model, of.calibration(seed))
    took = round(time.perf_counter() - start)
    model, dense = bp.to_deterministic(model), bp.to_deterministic(copy.deepcopy(of.dense))
    images = of.images["test"][0][0][:64]
    before, after = (statistics.median(times) for times in seconds_in_turn([dense, model], images, num_repeats=20))
    accuracy = float(is_right(model, of.images["test"]).double().mean())
    found = {"accuracy": accuracy, "macs": of.macs(model) / of.macs(of.dense), "time": after / before, "seconds": took}
    return {"task": of.name, "way": way, "seed": seed} | found


def page(rows: list[dict[str, Any]]) -> str:
    """The page of the documentation."""
    lines = ["# Channels and groups", "", *(__doc__ or "").strip().splitlines(), ""]
    lines.append("Accuracy on 5,000 test images in %, means over the seeds (how many, where it is not three).")
    for name in NAMES:
        of = [row for row in rows if row["task"] == name]
        if not of:
            continue
        lines += ["", f"## {name}", "", "| | accuracy | MACs left | time of a forward |", "|---|---|---|---|"]
        for way in WAYS:
            its = [row for row in of if row["way"] == way]
            if its:
                mean = {key: statistics.mean(row[key] for row in its) for key in ("accuracy", "macs", "time")}
                count = "" if len(its) == 3 else f" ({len(its)})"
                lines.append(
                    f"| {way} | {100 * mean['accuracy']:.1f}{count} | {mean['macs']:.2f} | {mean['time']:.2f} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing, and writes the page."""
    options = parser(__doc__ or "", "docs/benchmarks/grouped.json")
    options.add_argument("--task", choices=NAMES, default="resnet20")
    options.add_argument("--only", choices=WAYS, nargs="+", default=list(WAYS))
    args = options.parse_args()
    torch.set_num_threads(1)
    if not args.table:
        of = task(args.task, Path(args.data_dir))
        for seed in args.seeds:
            for way in args.only:
                rows = read(args.out, SETTINGS)
                if not any((r["task"], r["way"], r["seed"]) == (of.name, way, seed) for r in rows):
                    rows.append(row(of, way, seed))
                    write(args.out, SETTINGS, rows)
                    print(time.strftime("%H:%M:%S"), rows[-1], flush=True)
    args.out.with_suffix(".md").write_text(page(read(args.out, SETTINGS)), encoding="utf-8")


if __name__ == "__main__":
    main()
