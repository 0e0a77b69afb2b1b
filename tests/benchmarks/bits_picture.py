"""The picture of `bits.py`: error against bytes, the mean over the seeds."""

from pathlib import Path
from typing import Any

SHOWN = ("posterior, compensated", "one width, compensated", "one width", "k-means + Huffman", "8 bit + LZMA")
NETWORK = "MNIST 784-300-100-10"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes a PNG."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for method in SHOWN:
        found = [row for row in rows if row["method"] == method and row["network"] == NETWORK]
        settings = dict.fromkeys(row.get("setting") for row in found)
        groups = [[row for row in found if row.get("setting") == setting] for setting in settings]
        points = sorted(
            tuple(sum(row[key] for row in group) / len(group) for key in ("bytes", "error")) for group in groups
        )
        axes.plot(*zip(*points, strict=True), marker="o", label=method)
    axes.set(xlabel="bytes", ylabel="test error, %", ylim=(1.4, 3.0), title=NETWORK)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
