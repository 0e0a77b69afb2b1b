"""Widening and squeezing at few bits (Liu et al., 2020, arXiv:2002.00555), beside the original at as few bits.

A trained MNIST network 784-32-16-10 is to have weights of 2 or 3 bits. The control rounds it and trains it, held to its
grids. The others make it twice as wide first, train it for half of the steps at as many bits, remove units until the
rounded and coded file is no longer than the control's, round again and train for the other half. Units go by the costs
that calibration data say (unit SNR), or by posteriors under group ARD that are trained with the rounded weights.

Every row has as many gradients of as many images, moved by up to a pixel, and one linear fall of the learning rate,
which is chosen for each way and width with seed 0 on the last tenth of the training images, among two (more is worse
for the original). Finished rows are skipped when the program runs again.

    python tests/benchmarks/widen.py --data-dir DATA
    python tests/benchmarks/widen.py --table
"""

import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bits import file_size
from common import parser, read, spread, write
from mnist import load
from mnist_methods import BATCH, Data, Phase, _batches, _shifted, network, train
from torch import nn

import bayesprune as bp
from bayesprune.bits import Quantization, StraightThrough

ORIGINAL, UNIT_SNR, GROUP_ARD = "original", "twice as wide, unit SNR", "twice as wide, group ARD"
WAYS = (ORIGINAL, UNIT_SNR, GROUP_ARD)
WIDTHS = (2, 3)
RATES = (3e-4, 1e-3)
EPOCHS, FACTOR, NUM_TRIALS = 6, 2, 4
CALIBRATION = 4  # batches of 1,000 images
SETTINGS = {"network": "784-32-16-10", "epochs": EPOCHS, "rates": list(RATES), "factor": FACTOR, "batch": BATCH}
Row = dict[str, Any]


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))


def dense(data: Data, seed: int) -> nn.Sequential:
    """The trained network, as ordinary layers that read (N, 784)."""
    torch.manual_seed(seed)
    net = network(layers(), prior=None)
    train(net, data, Phase(6, 2e-3, shift=1))
    return bp.to_deterministic(net.model)  # type: ignore[return-value]


def calibration(data: Data) -> list[Any]:
    """Batches that rounding and unit SNR look at."""
    parts = data.images.flatten(1).split(1000), data.labels.split(1000)
    return list(zip(*parts, strict=True))[:CALIBRATION]


def train_rounded(model: nn.Module, data: Data, report: Quantization, lr: float, part: tuple[float, float]) -> None:
    """Trains the means, held to their grids, over this part of all steps, and posteriors where there are some."""
    num_steps = EPOCHS * (len(data.labels) // BATCH)
    first, last = (round(share * num_steps) for share in part)
    means = [parameter for name, parameter in model.named_parameters() if not name.endswith("log_std")]
    optimizer = torch.optim.Adam(means, lr=lr, fused=True)
    if len(means) < len(list(model.parameters())):
        bp.attach(
            optimizer,
            model,
            num_data=len(data.labels),
            prior=bp.priors.ARD(bp.prune.dependency_groups(model, data.images[:1].flatten(1))),
            num_steps=last - first,
            warmup=0.2,
            std_lr=1e-2,
            temperature=1.0,
            max_noise_cost=None,
        )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - (first + step) / num_steps)
    rounding = StraightThrough(optimizer, model, report)
    model.train()
    for chosen in _batches(len(data.labels), last - first):
        optimizer.zero_grad()
        F.cross_entropy(model(_shifted(data.images[chosen], 1).flatten(1)), data.labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    rounding.finish()


def squeezed(model: nn.Module, data: Data, bits: int, num_bytes: int) -> tuple[nn.Module, Quantization]:
    """The widest cut whose rounded, coded file is no longer than so many bytes, by bisection on the parameters kept."""
    batches, found = calibration(data), None
    low, high = 0.1, 1.0
    for _ in range(NUM_TRIALS):
        share = (low + high) / 2
        trial = copy.deepcopy(model)
        has_posterior = any(name.endswith("log_std") for name, _ in trial.named_parameters())
        if not has_posterior:
            bp.to_variational(trial)
        bp.prune_channels(trial, batches[0][0][:1], f"params={share}", data=None if has_posterior else batches)
        bp.to_deterministic(trial)
        report = bp.quantize(trial, batches, bits=bits, compensate="alone")
        if file_size(trial) <= num_bytes:
            found, low = (trial, report), share
        else:
            high = share
    assert found is not None, "a tenth of twice the width is less than the whole"
    return found


def made(way: str, bits: int, lr: float, start: nn.Module, data: Data, seed: int) -> tuple[nn.Module, int]:
    """The network of a row, and the bytes that it was allowed."""
    torch.manual_seed(seed + 100)
    model = copy.deepcopy(start)
    original = copy.deepcopy(start)
    report = bp.quantize(original, calibration(data), bits=bits, compensate="alone")
    num_bytes = file_size(original)
    if way == ORIGINAL:
        train_rounded(original, data, report, lr, (0.0, 1.0))
        return original, num_bytes
    bp.widen(model, data.images[:1].flatten(1), FACTOR)
    if way == GROUP_ARD:
        bp.to_variational(model)
    report = bp.quantize(model, calibration(data), bits=bits, compensate="alone")
    train_rounded(model, data, report, lr, (0.0, 0.5))
    model, report = squeezed(model, data, bits, num_bytes)
    train_rounded(model, data, report, lr, (0.5, 1.0))
    return model, num_bytes


@torch.no_grad()
def error(model: nn.Module, data: Data) -> float:
    """Percent of the held-out images given another label."""
    outputs = model.eval()(data.test_images.flatten(1))
    return round(100 * float((outputs.argmax(1) != data.test_labels).double().mean()), 3)


class Bench:
    """The rows of the results file."""

    def __init__(self, out: Path, data_dir: Path) -> None:
        self.out, self.rows = out, read(out, SETTINGS)
        self.data = {validation: load(data_dir, "MNIST", validation=validation) for validation in (False, True)}
        self.starts: dict[tuple[int, bool], nn.Sequential] = {}

    def start(self, seed: int, validation: bool) -> nn.Sequential:
        """The trained network of a seed."""
        if (seed, validation) not in self.starts:
            self.starts[seed, validation] = dense(self.data[validation], seed)
        return self.starts[seed, validation]

    def row(self, way: str, bits: int, lr: float, seed: int, *, validation: bool) -> Row:
        """The row, measured where it is not there."""
        key = {"way": way, "bits": bits, "lr": lr, "seed": seed, "validation": validation}
        for row in self.rows:
            if key.items() <= row.items():
                return row
        data, start = self.data[validation], self.start(seed, validation)
        begin = time.process_time()
        model, allowed = made(way, bits, lr, start, data, seed)
        units = [module.out_features for module in model if isinstance(module, nn.Linear)]  # type: ignore[union-attr]
        found = {"dense_error": error(start, data), "error": error(model, data), "units": units[:-1]}
        found |= {"bytes": file_size(model), "allowed": allowed, "cpu_seconds": round(time.process_time() - begin, 1)}
        self.rows.append(key | found)
        write(self.out, SETTINGS, self.rows)
        print(time.strftime("%H:%M:%S"), self.rows[-1], flush=True)
        return self.rows[-1]

    def run(self, bits: int, seeds: list[int]) -> None:
        """Chooses the learning rates on validation images, and tests."""
        for way in WAYS:
            tried = [self.row(way, bits, lr, 0, validation=True) for lr in RATES]
            best = min(tried, key=lambda row: row["error"])
            for seed in seeds:
                self.row(way, bits, best["lr"], seed, validation=False)


def page(rows: list[Row]) -> str:
    """The page of the documentation."""
    lines = ["# Widening and squeezing", "", *(__doc__ or "").strip().splitlines(), ""]
    lines.append("Error in percent on the 10,000 test images and bytes of the coded file, means over the seeds.")
    lines += ["", "| bits | way | error | bytes | units | seeds |", "|---|---|---|---|---|---|"]
    for bits in WIDTHS:
        for way in WAYS:
            found = [row for row in rows if (row["way"], row["bits"], row["validation"]) == (way, bits, False)]
            if not found:
                continue
            errors = [row["error"] for row in found]
            units = ", ".join("-".join(map(str, row["units"])) for row in found)
            size = statistics.mean(row["bytes"] for row in found)
            error = spread(errors, 2, of_mean=True)
            lines.append(f"| {bits} | {way} | {error} | {size:,.0f} | {units} | {len(found)} |")
    dense_errors = {row["seed"]: row["dense_error"] for row in rows if not row["validation"]}
    if dense_errors:
        lines += ["", f"Before rounding: {statistics.mean(dense_errors.values()):.2f} %."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing, then writes the page."""
    options = parser("Widening and squeezing.", "docs/benchmarks/widen.json")
    options.add_argument("--widths", type=int, nargs="+", choices=WIDTHS, default=list(WIDTHS))
    args = options.parse_args()
    torch.set_num_threads(1)
    if not args.table:
        if args.data_dir is None:
            options.error("no data: give --data-dir or set BAYESPRUNE_DATA to the folder that holds MNIST/raw/*.gz")
        bench = Bench(args.out, Path(args.data_dir))
        for bits in args.widths:
            bench.run(bits, args.seeds)
    args.out.with_suffix(".md").write_text(page(read(args.out, SETTINGS)), encoding="utf-8")


if __name__ == "__main__":
    main()
