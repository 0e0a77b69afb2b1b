"""The results of the criterion benchmark as Markdown."""

from collections import defaultdict
from collections.abc import Callable
from statistics import mean
from typing import Any

from common import spread

INTRODUCTION = """# CIFAR-10, the criterion beside its controls

    python tests/benchmarks/criterion.py --data-dir DATA --kind weights
    python tests/benchmarks/criterion.py --data-dir DATA --kind channels
    python tests/benchmarks/criterion.py --data-dir DATA --float32
    python tests/benchmarks/criterion.py --table

and the first three again with `--depth 56`. The last command writes this page from `criterion_weights.json` and
`criterion_channels.json`, which also hold every single run.

**The controls of the channel tables are handicapped**: every row trains before the cut, which only a posterior needs.
[The fair comparison](fair.md) replaces them; they stay as a record of what was run.

Two ResNets trained elsewhere lose single weights or channels. **All rows of a table have the same number of gradient
evaluations**, each on the same 64 images in the same order, the same optimizer (SGD, momentum 0.9, learning rate by
cosine to 0, bfloat16 products, or float32 where a heading says so), the same masks and selection, and batch norm
recalibrated by forward passes; what a score needs beside the training's own gradients is taken off its fine-tuning.

- **ours**: plain training with `laplace.RunningLaplace`, a diagonal Laplace posterior from the training's own
  gradients, at no extra pass; `SNRScore(0.5)` for weights, `SNRImportance(0.5)` for channels.
- **ours, variational**: training by weight sampling with the KL at temperature 0.1; SNR of per-weight stds for
  weights, `SNRImportance(1)` of per-channel stds for channels.
- **ours, SNR^2 at temperature 10**: weight sampling with rank-one stds that start at 0.3 of each layer's root mean
  square and move by 0.05 a step, and the KL at temperature 10: noise about as large as what is removed, and stds that
  come near their fixed point. `SNRImportance(2)`.
- **conditioned on zero**: at each removal the weights that are left are moved by `fit_kronecker` and
  `condition_on_zeros` (in 10 cuts of two batches, 20 training steps fewer) or `condition_on_channels` (16 batches, 16
  steps fewer). A pass that fits the factors counts as one gradient evaluation here and takes longer: training with 10
  such cuts took about twice the time.
- magnitude after L1: an L1 penalty on the weights until the removal ends, its weight chosen below. LAMP: Lee et al.,
  2021. Taylor: |weight x gradient|, of the moving average for weights, torch-pruning's of 4 batches for channels.
  Diagonal OBD: weight^2 x the same running squared gradient that ours takes. Hessian: torch-pruning's, with the squares
  of 256 images summed (its own sum keeps the last alone), which is paid for. DepGraph: torch-pruning's group-norm
  regulariser in the training before the removal, its weight chosen below.

Settings were chosen with seed 0 on 2,000 training images that no fine-tuning here saw (the published weights did). The
exponents of our scores came from trials on the ResNet-20 and those images, seeds 0 to 2. That conditioning pays during
gradual removal was first seen in six runs on 4,000 test images, then on the validation images; its number of cuts and
batches was set before the runs of the tables. Methods far behind with seed 0 were not repeated: they have one seed.
"""


def markdown(rows: list[dict[str, Any]], settings: dict[str, Any], test_images: int) -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    dense = {row["run"]["dense"]: row["accuracy"] for row in rows if "dense" in row["run"]}
    for depth in ("20", "56"):
        test = [row for row in rows if row["run"].get("part") == "test" and row["run"]["depth"] == depth]
        if not test:
            continue
        before, after, lr = (settings["weights"][depth][key] for key in ("before", "after", "lr"))
        lines += [f"## ResNet-{depth}, single weights", ""]
        lines += [
            f"Dense: {dense[depth]:.2%} on {test_images:,} test images. {after} gradient evaluations, from {lr:g}."
        ]
        lines += ["Accuracy in %, mean ± standard deviation over the seeds; the best of each column is bold.", ""]
        lines += _table([r for r in test if r["run"]["kind"] == "weights"], "{:.0%} removed", {"": "accuracy"})
        before, after, lr = (settings["channels"][depth][key] for key in ("before", "after", "lr"))
        lines += [f"## ResNet-{depth}, channels", ""]
        lines += [f"{before} gradient evaluations before the removal, {after} after it, each time from {lr:g}."]
        lines += ["Only the inner channels of blocks can go (shortcuts slice and pad). By the MACs that are left.", ""]
        columns = {", at once": "at_once", ", fine-tuned": "accuracy", ", parameters": "params"}
        channels = [row for row in test if row["run"]["kind"] == "channels"]
        for precision, heading in (("bfloat16", []), ("float32", [f"## ResNet-{depth}, channels, in float32", ""])):
            if found := [row for row in channels if row["run"]["precision"] == precision]:
                lines += [*heading, *_table(found, "{:.0%}", columns)]
    return "\n".join([*lines, *_selection(rows)])


def _table(rows: list[dict[str, Any]], level_format: str, columns: dict[str, str]) -> list[str]:
    levels = sorted({row["run"]["level"] for row in rows}, key=lambda level: abs(level - 0.5))
    cells: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for column in columns.values():
            cells[row["run"]["method"]["name"]][row["run"]["level"], column].append(100 * row[column])
    keys = [(level, column) for level in levels for column in columns.values()]
    best = {key: max(mean(found[key]) for found in cells.values() if key in found) for key in keys}
    best |= {key: float("nan") for key in keys if key[1] == "params"}  # no merit of its own
    titles = [level_format.format(level) + suffix for level in levels for suffix in columns]
    last = next(key for key in reversed(keys) if key[1] == "accuracy")
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(keys) + 1) + "|"]
    for name, found in sorted(cells.items(), key=lambda item: -mean(item[1].get(last, [0.0]))):
        shown = [_cell(found.get(key, []), best[key]) for key in keys]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return [*lines, ""]


def _cell(values: list[float], best: float) -> str:
    if not values:
        return ""
    shown = spread(values) + (" (one seed)" if len(values) == 1 else "")
    return f"**{shown}**" if mean(values) == best else shown


def _selection(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["## Selection: validation accuracy in %, seed 0, ResNet-20", ""]
    lines += ["| | setting | 90 % of the weights removed | half of the MACs |", "|---|---|---|---|"]
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in (row for row in rows if row["run"].get("part") == "validation"):
        found[row["run"]["method"]["name"], _setting(row["run"])][row["run"]["kind"]] = 100 * row["accuracy"]
    show: Callable[[dict[str, float], str], str] = lambda cells, kind: f"{cells[kind]:.1f}" if kind in cells else ""  # noqa: E731
    for (name, setting), cells in sorted(found.items()):
        lines.append(f"| {name} | {setting} | {show(cells, 'weights')} | {show(cells, 'channels')} |")
    return [*lines, ""]


def _setting(run: dict[str, Any]) -> str:
    method = run["method"]
    parts = [f"learning rate {run['lr']:g}"]
    parts += [f"power {method['score'].split()[1]}"] if method["score"].startswith("snr") else []
    parts += [f"L1 {method['l1']:g}"] if method["l1"] else []
    parts += [f"regulariser {method['group_reg']:g}"] if method["group_reg"] else []
    return ", ".join(parts)
