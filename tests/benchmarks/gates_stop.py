"""LeNet-5 on MNIST without a number: channel gates decide how many units stay, controls then keep as many.

Every row of a seed starts from the same dense network and has as many gradients of as many images. Gates train with the
network for half of them; what is rather closed than open leaves, and what is left trains on. "Sizes of the gates" takes
from them no more than how many units stay: the default of `prune_channels` cuts the dense network to as many, and that
trains for the other half. The controls keep as many units of each layer, at once, and train for all of them. Nothing is
chosen: a Gaussian slab, temperature 1, which is the posterior, and 10, which asks for a smaller network. Finished rows
are skipped when the program runs again.

    python tests/benchmarks/gates_stop.py --data-dir DATA
    python tests/benchmarks/gates_stop.py --table

DATA holds MNIST/raw/*.gz.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from bits import error
from common import parser, read, spread, write
from mnist import load
from mnist_methods import BATCH, Data, Network, Phase, lenet5, network, train
from torch import nn

import bayesprune as bp
from bayesprune import gates
from bayesprune.prune.scores.channels import Importance

Row = dict[str, Any]
EPOCHS = 36
DENSE = Phase(2, 2e-3, shift=1)
GATED = Phase(EPOCHS / 2, 2e-3, end=0.5, ramp=0.3, std_lr=1e-2, shift=1)
LR = 3e-3
GATES_LR = 0.02
SETTINGS = {"epochs": EPOCHS, "lr": LR, "gates_lr": GATES_LR}
GATES, SIZES = "gates", "sizes of the gates"
CONTROLS = {"magnitude": tp.importance.MagnitudeImportance(), "random": tp.importance.RandomImportance()}
NAMES = ("0", "3", "7")
"""The layers whose units leave."""
TEMPERATURES = (1.0, 10.0)
CALIBRATION_IMAGES = 1_024
EXAMPLE = torch.zeros(1, 1, 28, 28)


def by_gates(dense: nn.Module, data: Data, temperature: float) -> nn.Sequential:
    """The network with its gates after their training."""
    model = bp.to_variational(copy.deepcopy(dense)).to(memory_format=torch.channels_last)
    assert isinstance(model, nn.Sequential), "in place"
    gates.add_channel_gates(model, EXAMPLE, lr=GATES_LR)
    train(Network(model, bp.priors.Gaussian(), 0, None), data, replace(GATED, temperature=temperature))
    return model


def cut(model: nn.Sequential, sizes: dict[str, int], **options: Any) -> nn.Sequential:
    """A smaller copy with so many units of each layer."""
    small = copy.deepcopy(model)
    bp.prune_channels(small, EXAMPLE, sizes, **options)
    return bp.to_deterministic(small)


class Benchmark:
    """Rows of the results file, and what they start from."""

    def __init__(self, out: Path, data_dir: Path) -> None:
        self.out, self.data = out, load(data_dir, "MNIST", validation=False)

    def run(self, seed: int) -> None:
        """The gates, then the controls at what they left."""
        torch.manual_seed(seed)
        net = network(lenet5(), prior=None)
        train(net, self.data, DENSE)
        dense = bp.to_deterministic(net.model)
        for temperature in TEMPERATURES:
            key = {"temperature": temperature, "seed": seed}
            found = self.row(key | {"method": GATES}, partial(self.stopped, dense, temperature))
            sizes = dict(zip(NAMES, found["widths"], strict=True))
            self.row(key | {"method": SIZES}, partial(self.from_dense, dense, sizes, seed))
            for method, importance in CONTROLS.items():
                self.row(key | {"method": method}, partial(self.control, dense, sizes, importance))

    def stopped(self, dense: nn.Sequential, temperature: float) -> Row:
        """Gates, the cut, and the training after it."""
        model = by_gates(dense, self.data, temperature)
        open_ = {name: int((found > 0.5).sum()) for name, found in gates.inclusion_probabilities(model).items()}
        small = cut(model, open_, importance=gates.InclusionImportance())
        return {"gated": error(model, self.data)} | self.trained(small, EPOCHS / 2)

    def from_dense(self, dense: nn.Sequential, sizes: dict[str, int], seed: int) -> Row:
        """The dense network cut to the sizes that gates found, with calibration images, and the training after it."""
        order = torch.randperm(len(self.data.images), generator=torch.Generator().manual_seed(seed))
        images = self.data.images[order[:CALIBRATION_IMAGES]].unsqueeze(1).split(BATCH)
        return self.trained(cut(bp.to_variational(copy.deepcopy(dense)), sizes, data=images), EPOCHS / 2)

    def control(self, dense: nn.Sequential, sizes: dict[str, int], importance: Importance) -> Row:
        """The cut, and the training after it."""
        return self.trained(cut(dense, sizes, importance=importance), EPOCHS)

    def trained(self, small: nn.Sequential, epochs: float) -> Row:
        at_once, net = error(small, self.data), network(small, prior=None)
        train(net, self.data, Phase(epochs, LR, shift=1))
        done = bp.to_deterministic(net.model)
        layers = [module for module in done.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        widths = [len(layer.weight) for layer in layers[:-1]]
        weights = sum(layer.weight.numel() for layer in layers)
        return {"widths": widths, "weights": weights, "at_once": at_once, "error": error(done, self.data)}

    def row(self, key: Row, make: Callable[[], Row]) -> Row:
        """One row, made where it is not there."""
        rows = read(self.out, SETTINGS)
        for row in rows:
            if key.items() <= row.items():
                return row
        start = time.perf_counter()
        torch.manual_seed(key["seed"] + 100)
        row = key | make() | {"seconds": round(time.perf_counter() - start)}
        write(self.out, SETTINGS, [*rows, row])
        print(time.strftime("%H:%M:%S"), row, flush=True)
        return row


def page(rows: list[Row]) -> str:
    """The page of the documentation."""
    lines = ["# Where gates stop", "", *(__doc__ or "").strip().splitlines(), ""]
    lines += [
        "Error in percent on the 10,000 test images: the mean with its standard error, and each seed. Units are the",
        "filters of the two convolutions and the units of the dense layer, of 20, 50 and 500 at the start; weights are",
        "those that are left of 430,500.",
    ]
    for temperature in TEMPERATURES:
        own = [row for row in rows if row["temperature"] == temperature]
        lines += ["", f"## Temperature {temperature:g}", ""]
        lines += ["| | units | weights | error right after the cut | error |", "|---|---|---|---|---|"]
        for method in (GATES, SIZES, *CONTROLS):
            found = sorted((row for row in own if row["method"] == method), key=lambda row: row["seed"])
            if not found:
                continue
            units = ", ".join("-".join(map(str, row["widths"])) for row in found)
            weights = ", ".join(f"{row['weights']:,}" for row in found)
            said = method if method in CONTROLS else f"**{method}**"
            lines.append(f"| {said} | {units} | {weights} | {cell(found, 'at_once')} | {cell(found, 'error')} |")
    return "\n".join(lines) + "\n"


def cell(rows: list[Row], key: str) -> str:
    """Mean, its standard error, and each seed."""
    values = [row[key] for row in rows]
    return f"{spread(values, 2, of_mean=True)} ({', '.join(f'{value:.2f}' for value in values)})"


def main() -> None:
    """Runs what is missing, or writes the page."""
    options = parser(__doc__ or "", "docs/benchmarks/gates_stop.json").parse_args()
    torch.set_num_threads(1)
    if not options.table:
        if options.data_dir is None:
            raise SystemExit("--data-dir or BAYESPRUNE_DATA is needed: the folder with MNIST/raw/*.gz.")
        benchmark = Benchmark(options.out, Path(options.data_dir))
        for seed in options.seeds:
            benchmark.run(seed)
    options.out.with_suffix(".md").write_text(page(read(options.out, SETTINGS)), encoding="utf-8")


if __name__ == "__main__":
    main()
