"""The picture of `elastic.py`: accuracy against bytes, every level of the coded files."""

from pathlib import Path
from typing import Any


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes a PNG; bytes are those of a level's tensors, coded, in a file of their own."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for way in dict.fromkeys(row["way"] for row in rows if "bytes" in row):
        found = [row for row in rows if row["way"] == way and "bytes" in row]
        targets = dict.fromkeys(row["target"] for row in found)
        groups = [[row for row in found if row["target"] == target] for target in targets]
        points = sorted(
            tuple(sum(row[key] for row in group) / len(group) for key in ("bytes", "accuracy")) for group in groups
        )
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=way)
    whole = [row["sizes"]["model.safetensors"] for row in rows if row.get("coding") == "entropy"]
    dense = [row["accuracy"] for row in rows if row["way"] == "dense"]
    axes.plot([sum(whole) / len(whole)], [sum(dense) / len(dense)], "k*", markersize=9, label="the model itself")
    axes.set(xlabel="bytes, coded", ylabel="accuracy, %", title="CIFAR-10 ResNet-20", xlim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
