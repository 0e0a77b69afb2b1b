"""The page of `bits.py`."""

import json
from pathlib import Path
from typing import Any

TEXT = """# Bytes against error

Written by `python tests/benchmarks/bits.py --table` from bits.json, the results of the same program; run it with
`--data-dir` and `--work` to make the rows again.

Every row rounds the same network of its seed, pruned by the posterior as in [MNIST](mnist.md) (784-300-100-10 to 1 %
of its weights, LeNet-5 to 0.357 %) and trained on. Nothing is trained after the rounding, but in [the last
table](#training-after-rounding). Error in percent on the 10,000 test images. Bytes of our rows (posterior, one width,
falling widths, coded) are those of `model.safetensors` on the disk with its header of some 300 bytes; those of
k-means + Huffman and of 8 bit + LZMA are of the code alone.

- **pruned, float32, coded**: `save(coding="entropy")` without any rounding.
- **posterior**: `quantize(model, bytes=...)`, steps out of the stds that pruning left; **compensated** with
  {examples:,} training images: layers are fitted one after the other to what they gave before rounding, and the weights
  of a row make up for each other; **each layer alone** does the latter alone, with the inputs that it had before.
- **one width**, **falling widths**: `quantize(model, bits=...)`, the same for all layers, or one bit more for the first
  layer and one less for the last; then the same coding.
- **k-means + Huffman**: the recipe of HAC and sHAC (Marino et al., 2022), k means of the non-zero weights of a layer;
  Huffman codes for all weights, zeros among them, or for those that are not zero, with their indices, whichever is
  shorter; biases in float16.
- **8 bit + LZMA**: one grid of 255 places for each tensor, and LZMA at its strongest.

"times" is against the float32 weights of the network before it was pruned. Entropy and KL / ln 2 are of the posterior's
rows: of the integers, and what the posterior under the standard prior is worth.

![Error against bytes](bits.png)

**Read it with these in mind.** The sizes are those of the tensors' file; `bayesprune.json` beside it, which names
shapes and classes, is not in them. Of two ways to round, to the nearest place and by error and code length together,
the first was taken, for all rows alike; [below](#to-the-nearest-place-or-by-error-and-length) is why.
"""


ROUNDING = """## To the nearest place, or by error and length

`python tests/benchmarks/bits_rounding.py` rounds the networks of 784-300-100-10 to the same bytes in both ways. By
error and length, a weight goes to the k of its grid of step D with the least 6 (w / D - k)^2 + s length(k), the length
in nats; s = 1 is the rate at which the steps trade likelihood for bytes, s = 0 the nearest place. Judged on the last
{held_out:,} training images: the compensation did not see them, but the networks were trained on them, so the errors
are lower than those above. Error in percent and cross entropy in nats, the mean of three seeds.

{table}

No s is better than 0 by more than such images and networks tell apart, a tenth of a point; s = 1 is worse wherever
bytes are short, and so is s = 0.5 without compensation. So weights go to the nearest place, which needs no histogram.
"""

TRAINING = """## Training after rounding

`python tests/benchmarks/bits_training.py`: the networks of 784-300-100-10, rounded with compensation. Every row but
"rounded" trains for {epochs} epochs more, on images moved by up to a pixel, the learning rate falling to zero. It is
chosen for each way from {rates} with seed 0, by the cross entropy on the last {held_out:,} training images, which
those runs train without. Error in percent on the 10,000 test images; bytes are those of the file of tensors.

- **rounded, then straight-through**: `quantize`, then `bits.StraightThrough`: what is zero for rounding stays zero.
- **falling widths, straight-through**: from the weights before rounding, with the steps of the rounded copy, {extra}
  bits more at the start and none after 60 % of the steps; weights that are zero for rounding may return.
- **trained on, then rounded**: the same training without any rounding, then `quantize`.

{table}
"""


def page(settings: dict[str, Any], rows: list[dict[str, Any]], directory: Path = Path("docs/benchmarks")) -> str:
    """All tables.

    Args:
        settings: Of the rows.
        rows: Of `bits.py`.
        directory: Where the results of `bits_rounding.py` and `bits_training.py` are.
    """
    parts = [TEXT.format(examples=settings["batches"] * settings["batch"])]
    for network in dict.fromkeys(row["network"] for row in rows):
        parts.append(_table(network, [row for row in rows if row["network"] == network]))
    if (rounding := directory / "bits_rounding.json").exists():
        found = json.loads(rounding.read_text(encoding="utf-8"))
        parts.append(ROUNDING.format(held_out=found["settings"]["held_out"], table=_rounding(found["runs"])))
    if (training := directory / "bits_training.json").exists():
        found = json.loads(training.read_text(encoding="utf-8"))
        rates = ", ".join(f"{rate:g}" for rate in found["settings"].pop("rates"))
        parts.append(TRAINING.format(**found["settings"], rates=rates, table=_training(found["runs"])))
    return "\n".join(parts)


def _training(rows: list[dict[str, Any]]) -> str:
    lines = ["| asked for | | bytes | error, % | learning rate |", "|---|---|---|---|---|"]
    final = [row for row in rows if row["section"] == "final"]
    for key in dict.fromkeys((row.get("bytes"), row.get("bits"), row["way"]) for row in final):
        found = [row for row in final if (row.get("bytes"), row.get("bits"), row["way"]) == key]
        errors = [row["error"] for row in found]
        each = ", ".join(f"{error:.2f}" for error in errors)
        size = sum(row["bytes_on_disk"] for row in found) / len(found)
        asked = f"{key[0]:,} bytes" if key[0] else f"{key[1]} bits"
        shown = f"{sum(errors) / len(errors):.2f} ({each})"
        rate = f"{found[0]['lr']:g}" if found[0]["lr"] else ""
        lines.append(f"| {asked} | {key[2]} | {size:,.0f} | {shown} | {rate} |")
    return "\n".join(lines)


def _rounding(rows: list[dict[str, Any]]) -> str:
    strengths = sorted({row["strength"] for row in rows})
    lines = [
        "| | bytes | " + " | ".join(f"s = {its:g}" for its in strengths) + " |",
        "|---|---|" + "---|" * len(strengths),
    ]
    for compensated, size in dict.fromkeys((row["compensated"], row["size"]) for row in rows):
        cells = []
        for strength in strengths:
            key = (compensated, size, strength)
            found = [row for row in rows if (row["compensated"], row["size"], row["strength"]) == key]
            error, nats = (sum(row[name] for row in found) / len(found) for name in ("error", "nats"))
            cells.append(f"{error:.2f}, {nats:.4f}")
        lines.append(f"| {'compensated' if compensated else 'alone'} | {size:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
