"""The page and the plot of the speed tables, made from the results file alone."""

from pathlib import Path
from typing import Any

import speed_profile
from speed_ways import AGAIN, DETERMINISTIC, NETWORKS, OF_SCALING, SCALES

Run = dict[str, Any]

OPENING, CLOSING = "<!-- steps: written by tests/benchmarks/speed.py -->", "<!-- end of steps -->"
CHEAP = ("rank_one, local_reparameterization", "per_channel, local_reparameterization")
TARGETS = {  # of a step on the MLP, ResNet-18 and the encoder, and of the memory
    CHEAP[0]: (1.25, 1.2, 1.2, 1.15),
    CHEAP[1]: (1.25, 1.2, 1.2, 1.15),
    "per_weight, weight_sampling": (2.0, 1.5, 1.2, 2.1),
    "per_weight, local_reparameterization": (2.2, 2.1, 2.1, 2.1),
}

INTRODUCTION = """# Speed and memory

Written by `python tests/benchmarks/speed.py --table` from speed.json, the results of the same program. What to make of
it stands in [what it costs](../speed.md).

One thread of a processor. A step is zero_grad, forward, loss, backward, the hook of `attach`, and Adam, fused for every
row but IVON's, which is an optimizer of its own. All ways of a network take turns in one process, in an order drawn
anew each round; a number is the median over rounds of the processor time over that of the deterministic step in the
same round, quartiles in brackets. `deterministic, once more` is the same network a second time: what the method itself
is worth. Dropout is off, all stds are trained.

**hook** and **optimizer** are shares of the row's own step: of adding the KL and moving the stds, and of Adam moving
the means. **evaluation** is a forward pass without noise, **a draw** one with noise, or of mean and variance; both over
the deterministic forward. A library whose layers always draw has no evaluation. **memory** is that of parameters,
buffers, the optimizers' state and the most that a step allocates on top of them (gradients, saved activations) by
torch's allocator, over that of the deterministic network.

Where the time of a step goes was taken by torch's profiler from the kernels it runs; between them lie Python, torch's
own dispatch, and the profiler, which makes small networks slower. Noise is part of the passes: it is read from a table.
"""


def page(runs: list[Run], settings: dict[str, Any]) -> str:
    """The results as Markdown."""
    parts = [INTRODUCTION]
    nets = [run for run in runs if not _is_scaling(run)]
    if {run["name"] for run in nets if not run["compiled"]} >= set(NETWORKS):
        parts.append(_summary({run["name"]: run for run in nets if not run["compiled"]}))
    parts += [_network(run) for run in nets]
    if scaling := [run for run in runs if _is_scaling(run)]:
        parts.append(_scaling(scaling))
    versions = {package: number for run in nets for package, number in run["peers"].items()}
    values = ", ".join(f"{name} {value}" for name, value in (settings | versions).items())
    return "\n".join([*parts, f"Settings: {values}.", ""])


def with_overview(text: str, runs: list[Run]) -> str:
    """A page with the steps of all ways between its marks, as it is where a network has not been measured."""
    nets = {run["name"]: _rows(run) for run in runs if run["name"] in NETWORKS and not run["compiled"]}
    if set(nets) != set(NETWORKS):
        return text
    lines = ["| | MLP | ResNet-18 | BERT encoder | memory |", "|---|---|---|---|---|"]
    names = dict.fromkeys(name for rows in nets.values() for name in rows if name not in (DETERMINISTIC, AGAIN))
    for name in names:
        found = [rows.get(name) for rows in (nets[network] for network in NETWORKS)]
        cells = ["fails" if row is None else f"{row['step']['ratio']:.2f}" for row in found]
        pairs = zip(found, nets.values(), strict=True)
        memory = max(_memory(row, rows[DETERMINISTIC]) for row, rows in pairs if row is not None)
        lines.append(f"| {name} | {' | '.join(cells)} | {memory:.2f} |")
    before, opening, rest = text.partition(OPENING)
    _, closing, after = rest.partition(CLOSING)
    if not (opening and closing):
        raise ValueError(f"the page lacks its marks; expected {OPENING} and {CLOSING}.")
    return "\n".join([f"{before}{opening}", "", *lines, "", f"{closing}{after}"])


def _is_scaling(run: Run) -> bool:
    return run["name"].split()[0] in SCALES


def _rows(run: Run) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in run["rows"]}


def _summary(runs: dict[str, Run]) -> str:
    """Each target beside what was found."""
    lines = [
        "## The goals",
        "",
        "Step and memory, the goal in brackets; memory is the largest of the three networks.",
        "",
    ]
    lines += ["| | MLP | ResNet-18 | BERT encoder | memory |", "|---|---|---|---|---|"]
    for name, targets in TARGETS.items():
        rows = [(_rows(runs[network]).get(name), _rows(runs[network])[DETERMINISTIC]) for network in NETWORKS]
        if any(row is None for row, _ in rows):
            continue
        found = [row["step"]["ratio"] for row, _ in rows if row]
        found.append(max(_memory(row, base) for row, base in rows if row))
        cells = (f"{value:.2f} ({target})" for value, target in zip(found, targets, strict=True))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _network(run: Run) -> str:
    """Everything of one network."""
    rows = _rows(run)
    base = rows[DETERMINISTIC]
    title = NETWORKS.get(run["name"], run["name"]) + (", compiled" if run["compiled"] else "")
    times = ", ".join(
        f"{base[phase]['ms']:.1f} ms {what}" for phase, what in (("step", "a step"), ("evaluate", "a forward"))
    )
    lines = [f"## {title}", "", f"Deterministic: {times}, {sum(base['memory'].values()):.1f} MiB.", ""]
    lines += ["| | step | hook | optimizer | evaluation | a draw | memory |", "|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        step = row["step"]
        shares = (f"{100 * step[key]:.0f} %" if step.get(key) else "" for key in ("hook", "optimizer"))
        spread = f"{step['ratio']:.2f} ({step['low']:.2f}-{step['high']:.2f})"
        predictions = (f"{row[phase]['ratio']:.2f}" if phase in row else "" for phase in ("evaluate", "draw"))
        lines.append(f"| {name} | {spread} | {' | '.join([*shares, *predictions])} | {_memory(row, base):.2f} |")
    lines += ["", *speed_profile.table(rows)]
    lines += [f"{name} fails: `{reason}`.\n" for name, reason in run["failures"].items()]
    return "\n".join(lines)


def _memory(row: dict[str, Any], base: dict[str, Any]) -> float:
    return sum(row["memory"].values()) / sum(base["memory"].values())


def _scaling(runs: list[Run]) -> str:
    """The step over the deterministic one along each line."""
    by_name = {run["name"]: _rows(run) for run in runs}
    lines = [
        "## Scaling",
        "",
        "A step over the deterministic one. ReLU networks of 4 hidden layers, 512 wide, batch 64,",
    ]
    lines += ["but for what varies.", "", "![cost against layers, width and batch](speed.png)", ""]
    for what, values in SCALES.items():
        found = [value for value in values if f"{what} {value}" in by_name]
        if not found:
            continue
        lines += [f"| {what} | {' | '.join(map(str, found))} |", "|---" * (len(found) + 1) + "|"]
        points = [by_name[f"{what} {value}"] for value in found]
        lines.append(
            f"| {DETERMINISTIC}, ms | " + " | ".join(f"{p[DETERMINISTIC]['step']['ms']:.2f}" for p in points) + " |"
        )
        for name in OF_SCALING:
            cells = (f"{p[name]['step']['ratio']:.2f}" if name in p else "fails" for p in points)
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def plot(runs: list[Run], out: Path) -> None:
    """Bars of all steps above, scaling lines below."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    nets = [run for run in runs if not _is_scaling(run) and not run["compiled"]]
    names = list(dict.fromkeys(row["name"] for run in nets for row in run["rows"] if row["name"] != AGAIN))[::-1]
    figure, axes = pyplot.subplots(2, 3, figsize=(11, 8.5), height_ratios=(1.7, 1), layout="constrained")
    for axis, run in zip(axes[0], nets, strict=False):
        rows = _rows(run)
        ratios = [rows[name]["step"]["ratio"] if name in rows else 0.0 for name in names]
        colors = ["#3b82c4" if "_" in name else "#d9822b" for name in names]
        axis.barh(range(len(names)), ratios, color=colors, height=0.7)
        for position, ratio in enumerate(ratios):
            axis.text(ratio, position, f" {ratio:.2f}" if ratio else " fails", va="center", fontsize=8)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), names if axis is axes[0][0] else [""] * len(names), fontsize=8)
        axis.set_title(NETWORKS.get(run["name"], run["name"]).partition(",")[0].partition("(")[0], fontsize=10)
        axis.margins(x=0.15)
    for axis, (what, values) in zip(axes[1], SCALES.items(), strict=True):
        by_value = {value: _rows(run) for value in values for run in runs if run["name"] == f"{what} {value}"}
        for name in OF_SCALING:
            points = [(value, rows[name]["step"]["ratio"]) for value, rows in by_value.items() if name in rows]
            axis.plot(*zip(*points, strict=True) if points else ((), ()), marker="o", markersize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(what)
        axis.grid(alpha=0.3)
    axes[1][0].set_ylabel("step / deterministic step")
    axes[1][0].legend(fontsize=7)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
