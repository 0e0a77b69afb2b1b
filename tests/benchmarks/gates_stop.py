"""LeNet-5 on MNIST without a number: channel gates decide how many units stay, controls then keep as many.

Every row of a seed starts from the same dense network and has as many gradients of as many images. Gates train with the
network for half of them; what is rather closed than open leaves, and what is left trains on. The controls keep as many
units of each layer, at once, and train for all of them. Nothing is chosen: a Gaussian slab, temperature 1, which is the
posterior, and 10, which asks for a smaller network. Finished rows are skipped when the program runs again.

    python tests/benchmarks/gates_stop.py --data-dir DATA
    python tests/benchmarks/gates_stop.py --table

DATA holds MNIST/raw/*.gz.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bits import error
from common import parser, read, spread, write
from mnist import load
from mnist_methods import Data, Network, Phase, lenet5, network, train
from torch import Tensor, nn

import bayesprune as bp
from bayesprune import gates

Row = dict[str, Any]
EPOCHS = 36
DENSE = Phase(2, 2e-3, shift=1)
GATED = Phase(EPOCHS / 2, 2e-3, end=0.5, ramp=0.3, std_lr=1e-2, shift=1)
LR = 3e-3
GATES_LR = 0.02
SETTINGS = {"epochs": EPOCHS, "lr": LR, "gates_lr": GATES_LR}
CONTROLS = ("magnitude", "random")
TEMPERATURES = (1.0, 10.0)
EXAMPLE = torch.zeros(1, 1, 28, 28)


def layers_of(model: nn.Module) -> list[Any]:
    """The four layers with weights."""
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def by_gates(dense: nn.Module, data: Data, temperature: float) -> tuple[nn.Module, list[Tensor]]:
    """The network after the training with gates, and which units are rather open."""
    model = bp.to_variational(copy.deepcopy(dense)).to(memory_format=torch.channels_last)
    assert isinstance(model, nn.Sequential), "in place"
    gates.add_channel_gates(model, EXAMPLE, lr=GATES_LR)
    train(Network(model, bp.priors.Gaussian(), 0, None), data, replace(GATED, temperature=temperature))
    kept = [(probability > 0.5).nonzero()[:, 0] for probability in gates.inclusion_probabilities(model).values()]
    return bp.to_deterministic(model), kept


def by_score(dense: nn.Module, method: str, widths: Sequence[int]) -> list[Tensor]:
    """The units with the largest sums of squares of all their weights, or any."""
    layers, found = layers_of(dense), []
    for layer, reader, width in zip(layers, layers[1:], widths, strict=False):
        rows = layer.weight.detach().square().flatten(1).sum(1)
        columns = reader.weight.detach().square().transpose(0, 1).reshape(len(rows), -1).sum(1)
        scores = torch.rand(len(rows)) if method == "random" else rows + columns
        found.append(scores.topk(width).indices.sort().values)
    return found


@torch.no_grad()
def cut(model: nn.Module, kept: Sequence[Tensor]) -> nn.Sequential:
    """The smaller network of these units."""
    small, units_of = nn.Sequential(*copy.deepcopy(model).children()), iter([*kept, torch.arange(10)])
    read, size = torch.zeros(1, dtype=torch.long), 1
    for index, old in enumerate(small):
        if not isinstance(old, nn.Linear | nn.Conv2d):
            continue
        values, units = old.state_dict(), next(units_of)
        block = old.weight.shape[1] // size  # 16 inputs for each filter behind the flattening
        columns = (read[:, None] * block + torch.arange(block)).flatten()
        shape = len(columns), len(units)
        new = nn.Conv2d(*shape, 5) if isinstance(old, nn.Conv2d) else nn.Linear(*shape)
        new.load_state_dict({"weight": values["weight"][units][:, columns], "bias": values["bias"][units]})
        small[index], read, size = new, units, len(old.weight)
    return small


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
            found = self.row(key | {"method": "gates"}, lambda at=temperature: self.stopped(dense, at))
            for method in CONTROLS:
                make = partial(self.control, dense, method, found["widths"])
                self.row(key | {"method": method}, make)

    def stopped(self, dense: nn.Module, temperature: float) -> Row:
        """Gates, the cut, and the training after it."""
        model, kept = by_gates(dense, self.data, temperature)
        before, small = error(model, self.data), cut(model, kept)
        return {"gated": before} | self.trained(small, EPOCHS / 2)

    def control(self, dense: nn.Module, method: str, widths: list[int]) -> Row:
        """The cut, and the training after it."""
        return self.trained(cut(dense, by_score(dense, method, widths)), EPOCHS)

    def trained(self, small: nn.Sequential, epochs: float) -> Row:
        at_once, net = error(small, self.data), network(small, prior=None)
        train(net, self.data, Phase(epochs, LR, shift=1))
        done = bp.to_deterministic(net.model)
        widths = [len(layer.weight) for layer in layers_of(done)[:-1]]
        weights = sum(layer.weight.numel() for layer in layers_of(done))
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
        for method in ("gates", *CONTROLS):
            found = sorted((row for row in own if row["method"] == method), key=lambda row: row["seed"])
            if not found:
                continue
            units = ", ".join("-".join(map(str, row["widths"])) for row in found)
            weights = ", ".join(f"{row['weights']:,}" for row in found)
            said = f"**{method}**" if method == "gates" else method
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
