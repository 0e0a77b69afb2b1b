"""The page of `elastic.py`."""

from typing import Any

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
"""


def page(rows: list[dict[str, Any]]) -> str:
    """Both tables."""
    return "\n".join([TEXT, _accuracies(rows), _files(rows)])


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
