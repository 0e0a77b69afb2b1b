"""Training after rounding: the networks of `bits.py`, held to their grids while they train on, and their controls.

    python tests/benchmarks/bits_training.py --data-dir DATA --work WORK

Networks, sizes and batches are those of `bits.py`. Every row but "rounded" trains for the same number of steps, on
images moved by up to a pixel as after the last cut, the learning rate falling to zero. The learning rate of each way
is chosen with seed 0 at the first size, on the last 5,000 training images, which those runs train without; the networks
themselves were trained on them, in all rows alike.
"""

import copy
import time
from pathlib import Path
from typing import Any

import bits_networks as networks
import common
import torch
import torch.nn.functional as F
from bits import BATCH, HEADER, LEVELS, NUM_BATCHES, error, file_size
from bits_rounding import HELD_OUT, NETWORK, judged
from mnist import Benchmark
from mnist_methods import BATCH as TRAINING_BATCH
from mnist_methods import Data, _batches, _shifted
from torch import nn

import bayesprune as bp
from bayesprune.bits import Quantization, StraightThrough, WidthSchedule

ROUNDED, AFTER, FALLING, BEFORE = (
    "rounded",
    "rounded, then straight-through",
    "falling widths, straight-through",
    "trained on, then rounded",
)
ASKED = ({"bytes": 2700}, {"bits": 3}, {"bytes": 3000}, {"bits": 2})
RATES = (3e-4, 1e-3, 3e-3)
EPOCHS = 3
FALL = WidthSchedule(extra=3, end=0.6)
SETTINGS = {"network": NETWORK, "rates": list(RATES), "epochs": EPOCHS, "held_out": HELD_OUT, "extra": FALL.extra}


def train(model: nn.Module, data: Data, lr: float, report: Quantization | None, fall: WidthSchedule | None) -> None:
    """Trains the means on; with a report, held to its grids."""
    num_steps = EPOCHS * (len(data.labels) // TRAINING_BATCH)
    means = [parameter for name, parameter in model.named_parameters() if not name.endswith("log_std")]
    optimizer = torch.optim.Adam(means, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    rounding = None
    if report is not None:
        rounding = StraightThrough(optimizer, model, report, schedule=fall, num_steps=num_steps)
    model.train()
    for chosen in _batches(len(data.labels), num_steps):
        loss = F.cross_entropy(model(_shifted(data.images[chosen], 1)[:, None]), data.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    if rounding is not None:
        rounding.finish()


class Bench:
    """The rows of the results file."""

    def __init__(self, options: Any) -> None:
        self.out, self.rows = options.out, common.read(options.out, SETTINGS)
        self.benchmark = Benchmark(options.work / "none.json", options.work, Path(options.data_dir))
        self.data = networks.data_of(self.benchmark, NETWORK)
        images, labels = self.data.images, self.data.labels
        parts = (images[:, None].split(BATCH), labels.split(BATCH))
        self.batches = list(zip(*parts, strict=True))[:NUM_BATCHES]
        self.seen = Data(images[:-HELD_OUT], labels[:-HELD_OUT], images[-HELD_OUT:], labels[-HELD_OUT:])

    def start(self, seed: int) -> nn.Module:
        """The network before rounding."""
        return networks.with_all_inputs(networks.pruned(self.benchmark, NETWORK, LEVELS[NETWORK], seed))

    def row(self, key: dict[str, Any], make: Any) -> dict[str, Any]:
        """The row of a key, measured where it is not there."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        start = time.process_time()
        row = key | make()
        self.rows.append(row | {"cpu_seconds": round(time.process_time() - start, 1)})
        common.write(self.out, SETTINGS, self.rows)
        print(time.strftime("%H:%M:%S"), self.rows[-1], flush=True)
        return self.rows[-1]

    def made(self, way: str, asked: dict[str, int], seed: int, lr: float, data: Data) -> nn.Module:
        """The network of a row."""
        model = self.start(seed)
        torch.manual_seed(seed + 200)
        if way == BEFORE:
            train(model, data, lr, None, None)
        wish = {"bytes": asked["bytes"] - HEADER} if "bytes" in asked else asked
        rounded = copy.deepcopy(model)
        report = bp.quantize(rounded, self.batches, compensate="alone", **wish)
        if way in (ROUNDED, BEFORE):
            return rounded
        model = rounded if way == AFTER else model
        train(model, data, lr, report, FALL if way == FALLING else None)
        return model

    def rate(self, way: str) -> float:
        """The learning rate with the least cross entropy on images held out."""
        if way == ROUNDED:
            return 0.0
        nats, asked = {}, ASKED[0]
        for lr in RATES:
            key = {"section": "choice", "way": way, **asked, "seed": 0, "lr": lr}

            def measured(lr: float = lr) -> dict[str, Any]:
                return judged(self.made(way, asked, 0, lr, self.seen), self.seen.test_images, self.seen.test_labels)

            nats[lr] = self.row(key, measured)["nats"]
        return min(nats, key=nats.__getitem__)

    def measure(self, way: str, asked: dict[str, int], seed: int) -> None:
        """A row of the table."""

        def measured() -> dict[str, Any]:
            lr = self.rate(way)
            model = self.made(way, asked, seed, lr, self.data)
            return {"lr": lr, "bytes_on_disk": file_size(model), "error": error(model, self.data)}

        self.row({"section": "final", "way": way, **asked, "seed": seed}, measured)


def main() -> None:
    """Runs what the results file does not have yet."""
    options = networks.options_of("Training after rounding.", "docs/benchmarks/bits_training.json")
    torch.set_num_threads(1)
    bench = Bench(options)
    for asked in ASKED:
        for seed in options.seeds:
            for way in (ROUNDED, AFTER, FALLING, BEFORE):
                bench.measure(way, asked, seed)


if __name__ == "__main__":
    main()
