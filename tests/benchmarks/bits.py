"""Bytes against error: pruned networks rounded by their posterior, and the usual ways beside it.

    python tests/benchmarks/bits.py --data-dir DATA --work WORK
    python tests/benchmarks/bits.py --table

DATA holds MNIST/raw/*.gz. The networks are those of `mnist.py`, pruned by the posterior and trained on, kept in WORK.
Nothing is trained here: every row rounds the same network of its seed. Rows that docs/benchmarks/bits.json has are not
repeated. Bytes of our rows are those of `model.safetensors` on the disk, header included.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bits_networks as networks
import common
import torch
from bits_controls import eight_bits, k_means_huffman
from bits_picture import draw
from bits_table import page
from mnist import Benchmark
from mnist_methods import Data
from torch import nn

import bayesprune as bp

LEVELS = {"MNIST 784-300-100-10": 1.0, "LeNet-5": 0.357}
NUM_BATCHES, BATCH = 8, 1000
HEADER = 300
BYTES = {"MNIST 784-300-100-10": (4000, 3300, 3000, 2700), "LeNet-5": (3000, 2500, 2000, 1700)}
COMPENSATIONS: dict[str, Any] = {"compensated": True, "each layer alone": "alone"}
"""What rows say of the compensation, and what `quantize` is told."""
WIDTHS = (6, 5, 4, 3)
CLUSTERS = (32, 16, 8, 4)
SETTINGS = {"levels": LEVELS, "batches": NUM_BATCHES, "batch": BATCH}


@torch.no_grad()
def error(model: nn.Module, data: Data) -> float:
    """Percent of the test images given another label."""
    model.eval()
    outputs = [model(images[:, None]) for images in data.test_images.split(1000)]
    return round(100 * float((torch.cat(outputs).argmax(1) != data.test_labels).double().mean()), 3)


def file_size(model: nn.Module) -> int:
    """Bytes of the file of tensors that `save` writes of the model without its posterior."""
    with tempfile.TemporaryDirectory() as directory:
        bp.save(bp.to_deterministic(copy.deepcopy(model)), directory, coding="entropy")
        return (Path(directory) / "model.safetensors").stat().st_size


def falling(model: nn.Module, width: int) -> dict[str, int]:
    """Widths that fall with depth: one bit more for the first layer, one less for the last."""
    names = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters()))
    return {name: width + (name == names[0]) - (name == names[-1]) for name in names}


class Rows:
    """The results file."""

    def __init__(self, options: Any) -> None:
        self.out, self.rows = options.out, common.read(options.out, SETTINGS)

    def add(self, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> None:
        """Measures a row that is not there."""
        if any(all(row.get(name) == value for name, value in key.items()) for row in self.rows):
            return
        start = time.process_time()
        row = key | make()
        self.rows.append(row | {"cpu_seconds": round(time.process_time() - start, 1)})
        common.write(self.out, SETTINGS, self.rows)
        self.out.with_suffix(".md").write_text(page(SETTINGS, self.rows), encoding="utf-8")
        print(time.strftime("%H:%M:%S"), self.rows[-1], flush=True)


def measure(rows: Rows, name: str, seed: int, model: nn.Module, data: Data) -> None:
    """All rows of one network."""
    batches = list(zip(data.images[:, None].split(BATCH), data.labels.split(BATCH), strict=True))[:NUM_BATCHES]
    plain = bp.to_deterministic(copy.deepcopy(model))
    key = {"network": name, "seed": seed}

    def rounded(**options: Any) -> dict[str, Any]:
        found = copy.deepcopy(model)
        report = bp.quantize(found, **options)
        lengths = {"entropy_bytes": round(report.entropy_bytes), "kl_bytes": round(report.kl_bytes or 0)}
        return {"bytes": file_size(found), "error": error(found, data)} | lengths

    def dense() -> dict[str, Any]:
        size = 4 * sum(parameter.numel() for parameter in networks.dense(name).parameters())
        return {"bytes": size, "error": error(plain, data)}

    rows.add(key | {"method": "float32, not pruned"}, dense)
    rows.add(
        key | {"method": "pruned, float32, coded"}, lambda: {"bytes": file_size(model), "error": error(plain, data)}
    )
    for size in BYTES[name]:
        rows.add(key | {"method": "posterior", "setting": size}, partial(rounded, bytes=size - HEADER))
    for width in WIDTHS:
        rows.add(key | {"method": "one width", "setting": width}, partial(rounded, bits=width))
        rows.add(key | {"method": "falling widths", "setting": width}, partial(rounded, bits=falling(plain, width)))
    for count in CLUSTERS:
        rows.add(
            key | {"method": "k-means + Huffman", "setting": count},
            partial(_control, k_means_huffman, plain, data, count),
        )
    rows.add(key | {"method": "8 bit + LZMA"}, lambda: _control(eight_bits, plain, data))
    for said, compensate in COMPENSATIONS.items():
        make = partial(rounded, data=batches, compensate=compensate)
        for size in BYTES[name]:
            rows.add(key | {"method": f"posterior, {said}", "setting": size}, partial(make, bytes=size - HEADER))
        for width in WIDTHS[1:]:
            rows.add(key | {"method": f"one width, {said}", "setting": width}, partial(make, bits=width))


def _control(method: Callable[..., int], model: nn.Module, data: Data, *options: Any) -> dict[str, Any]:
    found = copy.deepcopy(model)
    return {"bytes": method(found, *options), "error": error(found, data)}


def main() -> None:
    """Runs what the results file does not have yet, then writes the page."""
    parser = common.parser("Bytes against error.", "docs/benchmarks/bits.json")
    parser.add_argument("--work", type=Path, default=Path("work-bits"), help="folder for networks")
    parser.add_argument("--networks", nargs="+", choices=list(LEVELS), default=list(LEVELS))
    options = parser.parse_args()
    rows = Rows(options)
    if options.table:
        options.out.with_suffix(".md").write_text(page(SETTINGS, rows.rows), encoding="utf-8")
        draw(rows.rows, options.out.with_suffix(".png"))
        return
    if options.data_dir is None:
        parser.error("no data: give --data-dir or set BAYESPRUNE_DATA to the folder that holds MNIST/raw/*.gz")
    torch.set_num_threads(1)
    benchmark = Benchmark(options.work / "none.json", options.work, Path(options.data_dir))
    for seed in options.seeds:
        for name in options.networks:
            net = networks.pruned(benchmark, name, LEVELS[name], seed)
            measure(rows, name, seed, networks.with_all_inputs(net), networks.data_of(benchmark, name))


if __name__ == "__main__":
    main()
