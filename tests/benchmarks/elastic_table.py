"""The page of `elastic.py` and `elastic_trained.py`."""

import json
from pathlib import Path
from typing import Any

SINGLE = "levels of single weights"

TEXT = """# One file, ten sizes

Written by `python tests/benchmarks/elastic.py --table` from elastic.json, the results of the same program; run it with
`--data-dir` and `--work` to make the rows again.

A CIFAR-10 ResNet-20 with its published weights, and ten levels of it between 0.9 and 0.4 of its MACs, from 1,024
training images, no labels, nothing trained. Accuracy in percent on the first 500 test images of each class.

- **levels**: `bp.elastic.levels(model, x, targets, data=...)`, saved beside the model in one directory and loaded by
  `bp.load(directory, "macs=0.5")`. One ranking and one division between layers serve all levels; the weights that stay
  are fitted for each level, and what that moves them by is rounded.
- **levels, means as they are**: the same with `fit=False`: a level has its own statistics of batch norm, nothing else.
- **cut one by one**: `prune_channels(model, x, target, data=...)` for each size, with a division between layers of its
  own and weights that nothing rounds: ten files.
{single}
![Accuracy against bytes of every level](elastic.png)

The bytes of a level are here those of its tensors, entropy-coded, in a file of their own; the levels of one directory
share most of them.
"""

OF_SINGLE = """\
- **levels of single weights**: `bp.elastic.levels(model, None, ["weights=0.5", ...], data=...)` with the labels of the
  same images: stds by `fit_laplace`, ranked by `SNRScore`.
"""

TRAINED = """## Trained at a level drawn each step

`python tests/benchmarks/elastic_trained.py`, with the results in elastic_trained.json: MNIST's 784-300-100-10 with
levels of single weights. Every way starts from the same dense network of its seed and trains for {epochs} epochs with
Adam, from a learning rate of {rate:g} down to zero, which was not chosen; **one by one** trains so long for each level.
Error in percent on the 10,000 test images, {seeds}.

- **levels, not trained**: `bp.elastic.levels`, from 1,024 training images.
- **levels, one drawn each step**: the same levels, trained together by `bp.elastic.LevelDraws`.
- **LCS, a point**, **LCS, a line** (Nunez et al., 2021): the largest weights of each layer, ranked anew in each step,
  the sparsity rising over the first 80 % of them; one set of weights, or two of which each level is a mixture.

{table}
"""


def page(rows: list[dict[str, Any]], directory: Path = Path("docs/benchmarks")) -> str:
    """All tables.

    Args:
        rows: Of `elastic.py`.
        directory: Where the results of `elastic_trained.py` are.
    """
    by_units = [row for row in rows if row["way"] != SINGLE]
    single = _single(rows)
    text = TEXT.format(single=OF_SINGLE if single else "")
    parts = [text, _accuracies(by_units), single, _files(rows)]
    if (trained := directory / "elastic_trained.json").exists():
        parts.append(_trained(json.loads(trained.read_text(encoding="utf-8"))))
    return "\n".join(part for part in parts if part)


def _single(rows: list[dict[str, Any]]) -> str:
    """Levels of single weights; nothing where there are none."""
    found = [row for row in rows if row["way"] == SINGLE and "accuracy" in row]
    lines = ["## Single weights", "", "| | accuracy | bytes | CPU seconds to load |", "|---|---|---|---|"]
    for target in dict.fromkeys(row["target"] for row in found):
        keys = ("accuracy", "bytes", "load_cpu_seconds")
        accuracy, size, seconds = (_mean(_of(rows, SINGLE, target, key)) for key in keys)
        lines.append(f"| {target} | {accuracy:.2f} | {size:,.0f} | {seconds:.2f} |")
    return "\n".join(lines) + "\n" if found else ""


def _trained(found: dict[str, Any]) -> str:
    settings, rows = found["settings"], found["runs"]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lines = ["| | " + " | ".join(ways) + " |", "|---|" + "---|" * len(ways)]
    for target in ("1", *settings["targets"]):
        cells = []
        for way in ways:
            errors = [row["errors"][target] for row in rows if row["way"] == way and target in row["errors"]]
            cells.append(f"{_mean(errors):.2f}" if errors else "")
        lines.append(f"| {'the model itself' if target == '1' else target} | " + " | ".join(cells) + " |")
    number = len({row["seed"] for row in rows})
    seeds = "one seed" if number == 1 else f"the mean of {number} seeds"
    return TRAINED.format(epochs=settings["epochs"], rate=settings["rate"], seeds=seeds, table="\n".join(lines))


def _accuracies(rows: list[dict[str, Any]]) -> str:
    ways = list(dict.fromkeys(row["way"] for row in rows if "accuracy" in row and row["way"] != "dense"))
    targets = list(dict.fromkeys(row["target"] for row in rows if "accuracy" in row and row["way"] != "dense"))
    dense = [row["accuracy"] for row in rows if row["way"] == "dense"]
    lines = [
        "## Accuracy",
        "",
        "| | " + " | ".join(ways) + " | CPU seconds to load |",
        "|---|" + "---|" * (len(ways) + 1),
    ]
    if dense:
        lines.append(f"| the model itself | {_mean(dense):.2f} |" + " |" * len(ways))
    gaps: dict[str, list[float]] = {way: [] for way in ways}
    for target in targets:
        cells = []
        for way in ways:
            found = _of(rows, way, target, "accuracy")
            cells.append(f"{_mean(found):.2f}" if found else "")
            separate = _of(rows, "cut one by one", target, "accuracy")
            if found and separate:
                gaps[way].append(_mean(separate) - _mean(found))
        seconds = _of(rows, ways[0], target, "load_cpu_seconds")
        lines.append(f"| {target} | " + " | ".join(cells) + f" | {f'{_mean(seconds):.2f}' if seconds else ''} |")
    shown = [f"{_mean(gap):.2f}" if gap else "" for gap in gaps.values()]
    lines.append("| mean gap to those cut one by one, points | " + " | ".join(shown) + " | |")
    return "\n".join(lines) + "\n"


def _files(rows: list[dict[str, Any]]) -> str:
    """Sizes, and how much larger the levels make the directory."""
    names = {"model.safetensors": "the model", "levels.safetensors": "all levels", "bayesprune.json": "bayesprune.json"}
    head = "| | coding | " + " | ".join(f"{shown}, bytes" for shown in names.values())
    lines = ["## Bytes", "", f"{head} | all over the model | all over the model, not coded |", "|---|" + "---|" * 6]
    plain = max((row["sizes"]["model.safetensors"] for row in rows if row["target"] == "file"), default=0)
    for way, coding in dict.fromkeys((row["way"], row["coding"]) for row in rows if row["target"] == "file"):
        found = [row["sizes"] for row in rows if (row["way"], row.get("coding", "")) == (way, coding)]
        found = [its for its in found if its]
        cells = [f"{_mean([its[name] for its in found]):,.0f}" for name in names]
        ratio = _mean([sum(its.values()) / its["model.safetensors"] for its in found])
        whole = _mean([sum(its.values()) / plain for its in found])
        lines.append(f"| {way} | {coding or 'none'} | " + " | ".join(cells) + f" | {ratio:.2f} | {whole:.2f} |")
    return "\n".join(lines) + "\n"


def _of(rows: list[dict[str, Any]], way: str, target: str, key: str) -> list[float]:
    return [row[key] for row in rows if row["way"] == way and row["target"] == target and key in row]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
