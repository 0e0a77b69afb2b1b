"""The page of the measurements at scale, made from the results file alone."""

from statistics import median, quantiles
from typing import Any

Run = dict[str, Any]

TITLES = {
    "vit_base_patch16_224": "ViT-B/16",
    "vit_large_patch16_224": "ViT-L/16",
    "convnext_large": "ConvNeXt-L",
    "llama 2": "Llama, 2 layers of 2,048 and 8,192",
    "llama 4": "Llama, 4 layers of 2,048 and 8,192",
    "llama 16": "Llama, 16 layers of 2,048 and 8,192",
}
CHAINS = {
    "files": "Without data, save and load",
    "posterior": "A posterior, and what rests on it",
    "compensation": "Compensation",
    "data": "prune_channels with data",
}
WITHOUT_DATA = ("llama 16",)
"""Models that are not pruned with data, which would take hours: two and four layers say how long."""

_GIB = 2**30

INTRODUCTION = """# Time and memory at scale

Written by `python tests/benchmarks/scale.py`.

Models have random weights in float32, on one thread of a processor, and `{std}` stds: those of single weights take
another 4 bytes a weight wherever the model is held. Calibration data are {images} images of 224 x 224, or {sequences}
sequences of 128 tokens; what is cut is half of the MACs. Seconds are processor time. **held** is what the process has
before a stage, the model and the batches and what it imported, and **grows** by how much more it has in it at most, in
GiB. A stage that is named after a colon is a part of the one before.

A pass over more data takes as much longer; the factorisations take the same.
"""

GROWTH = """## How it grows

**Constant in the number of layers, for each of them**, as the docstrings say: the graph and the cut, the posterior, the
ranking (n^2 numbers are updated some 120 times for n inputs of a block), one fit a layer in compensation (C^3 + R C^2
multiplications for C inputs and R outputs, four times where the damping is chosen by a quarter of the examples, once in
the search over divisions).

**All layers at once** are in memory: the model and, in compensation and in the search, one or two copies of it; of
`fit_kronecker`, 8 (C b + R b) bytes a layer with blocks of b = 1,024 and a copy of the means, 9.6 GB for the Llama of
16 layers (974 million weights); in its backward pass, the activations of one batch. Gradients at layers' outputs are
taken one layer after the other, and the look at all layers that begins a compensation keeps shapes alone. Smaller
batches, and `block_size`, bring the rest down.

**What repeats forwards.** Compensation lets the forwards of all batches wait behind each layer, so that each batch runs
through the model once; the tensors that wait take at most 4 GiB. Where they would take more (ViT-L with 1,024 images in
batches of 32, for one), layers get forwards of their own from the start, in up to 64 passes over the data, or over a
quarter of it: that grows with the square of the number of layers up to there. Fewer examples avoid it, down to 32
positions for each input of a layer. `prune_one_shot(scope="global")` collects moments in one pass over the data for
each GiB of them, two or three a block in the Llama, beside two forwards of up to 256 examples a layer.

**The largest single pieces.** `prune_channels` with data tries four to seven divisions of the budget, each a
compensation. One layer of 4,096 inputs and outputs takes `prune_one_shot` [66 s](../laplace.md), above all for some
sixty products of its weights with a matrix of 4,096 x 4,096. `save` builds the dense model once to compare, `load` to
fill it.
"""


def page(runs: list[Run], settings: dict[str, Any]) -> str:
    """The results as Markdown."""
    images, sequences = settings["images"], settings["sequences"]
    said = {"images": images[0] * images[1], "sequences": sequences[0] * sequences[1], "std": settings["std"]}
    lines = [INTRODUCTION.format(**said), *_missing(runs)]
    for name in dict.fromkeys((*TITLES, *(run["name"] for run in runs))):
        found = [run for run in runs if run["name"] == name and run["chain"] in CHAINS]
        if found:
            lines += [f"## {TITLES.get(name, name)}", ""]
            lines += [f"{found[0]['parameters'] / 1e6:,.0f} million parameters.", ""]
        for run in sorted(found, key=lambda run: list(CHAINS).index(run["chain"])):
            lines += [f"### {CHAINS[run['chain']]}", "", *_table(run), ""]
    lines += [GROWTH]
    lines += _imports(next((run for run in runs if run["chain"] == "imports"), None))
    return "\n".join([*lines, f"Settings: {', '.join(f'{key} {value}' for key, value in settings.items())}.", ""])


def _missing(runs: list[Run]) -> list[str]:
    """What the program would measure if it went on."""
    done = {(run["name"], run["chain"]) for run in runs} | {(name, "data") for name in WITHOUT_DATA}
    texts = []
    for name, title in TITLES.items():
        if left := [chain for chain in CHAINS if (name, chain) not in done]:
            texts.append(f"{title.partition(' of ')[0]} ({', '.join(left)})")
    return [f"Not measured yet, by the program's names: {'; '.join(texts)}.", ""] if texts else []


def _table(run: Run) -> list[str]:
    lines = ["| | seconds | held, GiB | grows, GiB |", "|---|---|---|---|"]
    for row in run["stages"]:
        held, grown = row["held"] / _GIB, (row["peak"] - row["held"]) / _GIB
        lines.append(f"| {row['name']} | {row['seconds']:.1f} | {held:.1f} | {grown:.2f} |")
    return lines


def _imports(run: Run | None) -> list[str]:
    if run is None:
        return []
    seconds = run["seconds"]
    ratios = [mine / base for mine, base in zip(seconds["bayesprune"], seconds["torch"], strict=True)]
    spread = ""
    if len(ratios) > 1:
        low, _, high = quantiles(ratios, n=4, method="inclusive")
        spread = f" ({low:.2f}-{high:.2f})"
    ours, torch = (median(seconds[name]) for name in ("bayesprune", "torch"))
    return [
        "## Import",
        "",
        f"`import bayesprune` takes {median(ratios):.2f}{spread} times the processor time of `import torch`, which it",
        f"contains: {ours:.2f} s and {torch:.2f} s, medians of {len(ratios)} fresh processes of each that took turns.",
        "transformers, timm and torch-pruning are imported when they are first used.",
        "",
    ]
