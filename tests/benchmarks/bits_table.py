"""The page of `bits.py`."""

from typing import Any

TEXT = """# Bytes against error

Written by `python tests/benchmarks/bits.py --table` from bits.json, the results of the same program; run it with
`--data-dir` and `--work` to make the rows again.

Every row rounds the same network of its seed, pruned by the posterior as in [MNIST](mnist.md) (784-300-100-10 to 1 % of
its weights, LeNet-5 to 0.357 %) and trained on. Nothing is trained after the rounding, in no row. Error in percent on
the 10,000 test images. Bytes of our rows (posterior, one width, falling widths, coded) are those of
`model.safetensors` on the disk with its header of some 300 bytes; those of k-means + Huffman and of 8 bit + LZMA are of
the code alone.

- **pruned, float32, coded**: `save(coding="entropy")` without any rounding.
- **posterior**: `quantize(model, bytes=...)`, steps out of the stds that pruning left; **compensated** with
  {examples:,} training images, so that the weights of a row make up for each other.
- **one width**, **falling widths**: `quantize(model, bits=...)`, the same for all layers, or one bit more for the first
  layer and one less for the last; then the same coding.
- **k-means + Huffman**: the recipe of HAC and sHAC (Marino et al., 2022), k means of the non-zero weights of a layer;
  Huffman codes for all weights, zeros among them, or for those that are not zero, with their indices, whichever is
  shorter; biases in float16.
- **8 bit + LZMA**: one grid of 255 places for each tensor, and LZMA at its strongest.

"times" is against the float32 weights of the network before it was pruned. Entropy and KL / ln 2 are of the posterior's
rows: of the integers, and what the posterior under the standard prior is worth.
"""


def page(settings: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """All tables."""
    parts = [TEXT.format(examples=settings["batches"] * settings["batch"])]
    for network in dict.fromkeys(row["network"] for row in rows):
        parts.append(_table(network, [row for row in rows if row["network"] == network]))
    return "\n".join(parts)


def _table(network: str, rows: list[dict[str, Any]]) -> str:
    lines = [
        f"## {network}",
        "",
        "| | asked for | bytes | times | error, % | entropy | KL / ln 2 |",
        "|---|" + "---|" * 6,
    ]
    dense = next(row["bytes"] for row in rows if row["method"] == "float32, not pruned")
    for method, setting in dict.fromkeys((row["method"], row.get("setting")) for row in rows):
        found = [row for row in rows if (row["method"], row.get("setting")) == (method, setting)]
        size = sum(row["bytes"] for row in found) / len(found)
        errors = [row["error"] for row in found]
        mean = sum(errors) / len(errors)
        each = ", ".join(f"{error:.2f}" for error in errors)
        lengths = [
            f"{sum(row[key] for row in found) / len(found):,.0f}" if key in found[0] else ""
            for key in ("entropy_bytes", "kl_bytes")
        ]
        asked = "" if setting is None else f"{setting:,}"
        shown = f"{mean:.2f} ({each})"
        lines.append(
            f"| {method} | {asked} | {size:,.0f} | {dense / size:,.0f} | {shown} | {lengths[0]} | {lengths[1]} |"
        )
    return "\n".join(lines) + "\n"
