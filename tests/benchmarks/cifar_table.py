"""The results of the CIFAR-10 benchmark as Markdown."""

from collections import defaultdict
from statistics import mean
from typing import Any

from common import spread

INTRODUCTION = """# CIFAR-10, ResNet-20 at half its MACs

Written by `python tests/benchmarks/cifar.py --table` from `cifar.json`, which also holds every single run.

**The controls of this table are handicapped**: every row trains before the cut, which only a posterior needs.
[The fair comparison](fair.md) replaces it; it stays as a record of what was run.

A ResNet-20 trained elsewhere ({test:.2%} on the 10,000 test images, {macs:.1f} M MACs, {params:,} parameters) is
fine-tuned for {before} steps of {batch} images (variational, or plain for the controls), loses channels until
{kept:.0%} of the MACs are left, has its batch norm recalibrated, and is fine-tuned plainly up to {total} gradient
evaluations in all; those that a Taylor score takes ({taylor}) count.
Both fine-tunings: {optimizer}, from {lr_before:g} and {lr_after:g}.

Every score but "tp pruner" goes through `bp.prune_channels`, so selection and budget are the same code; "tp pruner" is
torch-pruning's `BasePruner` with its own selection inside each layer, the ratio of channels searched for the nearest to
half the MACs. (On the dense network its global selection leaves the same widths as `prune_channels` does with its
magnitude.) The network's shortcuts (slice and pad) leave only the inner channels of each block to be removed.
"power 0" is our score without the stds, on the same network as the chosen one: (mean / s)^2, with s the layer's root
mean square (for powers below 1 the score has been another since).

`global` ranks all channels together, `uniform` removes the same fraction of every layer. "on plain": removed from the
plainly fine-tuned network; "on per_weight" and so on: from the variational network with that structure of stds.

Settings (structure, power, speed of the stds, the controls' normaliser, second learning rate) were chosen on 5,000
training images, the last 10 % of each class, which no fine-tuning here saw. The published weights did see them
({validation:.2%} right before anything is done), so they tell networks after the removal apart less well than unseen
images would. The test images were used for the table below alone.
"""

LEGEND = """**default**: what a user gets without options. **chosen**: best on the validation images, one for each kind
of selection. More settings were tried for SNR (16) than for magnitude and Taylor (2 each, both of them in this table
for `global` on plain), and none for "tp pruner" and random. Two kinds of control were added after test results had
been seen, and nothing was chosen by them: "power 0", and the normaliser that the selection had not taken.

What is equal is the MACs. Parameters differ where a score keeps the late, wide layers and cuts the early ones, and
`uniform` rows are a little below the target, because all layers lose a channel at the same level.
"""


def markdown(results: dict[str, Any]) -> str:
    """The whole page."""
    if "chosen" not in results:
        return "# CIFAR-10, ResNet-20\n\nThe selection has not finished; there is no table yet.\n"
    dense, settings, chosen = results["dense"], results["settings"], results["chosen"]
    introduction = INTRODUCTION.format(
        test=dense["test"],
        validation=dense["validation"],
        macs=dense["macs"] / 1e6,
        params=dense["params"],
        before=settings["steps_before"],
        total=settings["steps_before"] + settings["steps_after"],
        batch=settings["batch"],
        kept=settings["macs_kept"],
        taylor=settings["taylor_batches"],
        optimizer=settings["optimizer"],
        lr_before=settings["lr_before"],
        lr_after=chosen["lr_after"],
    )
    return "\n".join([introduction, *_final(results), *_reload(results), *_selection(results), *_tuned(results)])


def _final(results: dict[str, Any]) -> list[str]:
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in results.get("rows", []):
        if row["section"] == "final":
            runs[row["name"]].append(row)
    ranked = sorted(runs.items(), key=lambda item: -_mean(item[1], "after_fine_tuning"))
    lines = [
        "## Test accuracy, best first",
        "",
        "Mean ± standard deviation over the seeds, in %.",
        "",
        "| score | selection | after removal | after fine-tuning | MACs kept | parameters kept | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in ranked:
        score, _, selection = name.rpartition(", ")
        lines.append(
            f"| {score}{_marks(rows[0], results['chosen'])} | {selection} | {_spread(rows, 'after_removal')} "
            f"| {_spread(rows, 'after_fine_tuning')} | {_mean(rows, 'macs'):.1%} | {_mean(rows, 'params'):.1%} "
            f"| {len(rows)} |"
        )
    return [*lines, "", LEGEND]


def _reload(results: dict[str, Any]) -> list[str]:
    if (reload := results.get("reload")) is None:
        return []
    text = (
        f"`bp.save` of the chosen SNR network of seed 0 ({reload['name']}), `bp.load` in a fresh process: largest "
        f"difference of the logits of all test images {reload['max_difference']}, accuracy {reload['accuracy']:.2%}, "
        f"{reload['bytes']:,} bytes."
    )
    return ["## Saved and loaded", "", text, ""]


def _selection(results: dict[str, Any]) -> list[str]:
    rows = [row for row in results["rows"] if row["section"] == "selection"]
    lines = [
        "## Selection: accuracy on the validation images, seed 0",
        "",
        "| score | selection | after removal | second learning rate | after fine-tuning |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        score, _, selection = row["name"].rpartition(", ")
        tuned = (
            "| | |" if row["lr_after"] is None else f"| {row['lr_after']:g} | {100 * row['after_fine_tuning']:.2f} |"
        )
        lines.append(f"| {score} | {selection} | {100 * row['after_removal']:.2f} {tuned}")
    return [*lines, ""]


def _tuned(results: dict[str, Any]) -> list[str]:
    text = (
        "Accuracy on the validation images after the first fine-tuning. The times are from a shared machine, one "
        "thread, and are no comparison of speed."
    )
    head = ["| network | seed | accuracy | seconds a step |", "|---|---|---|---|"]
    lines = [
        f"| {row['name']} | {row['seed']} | {100 * row['validation']:.2f} | {row['seconds_per_step']:.2f} |"
        for row in results.get("tuned", [])
    ]
    return ["## Before the removal", "", text, "", *head, *lines, ""]


def _marks(row: dict[str, Any], chosen: dict[str, Any]) -> str:
    tuning, removal = row["tuning"], row["removal"]
    marks = []
    if removal["score"] == "snr":
        default = {"std": "per_weight", "temperature": 0.1, "std_lr": 0.01}
        marks += ["default"] if tuning == default and removal["power"] == 1 and not removal["uniform"] else []
        winner = chosen["uniform" if removal["uniform"] else "global"]
        marks += ["chosen"] if winner == {"tuning": tuning, "removal": removal} else []
    return "".join(f" **{mark}**" for mark in marks)


def _mean(rows: list[dict[str, Any]], value: str) -> float:
    return mean(row[value] for row in rows)


def _spread(rows: list[dict[str, Any]], value: str) -> str:
    values = [100 * row[value] for row in rows]
    return spread(values, 2)
