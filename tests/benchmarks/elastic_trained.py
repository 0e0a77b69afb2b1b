"""Levels of single weights, trained: an MNIST 784-300-100-10 at a level drawn each step, and its controls.

    python tests/benchmarks/elastic_trained.py --data-dir DATA --work WORK

DATA holds MNIST/raw/*.gz. Every way starts from the same dense network of its seed (that of `mnist.py`, kept in WORK)
and trains for the same number of steps with the same learning rate, which was not chosen; "one by one" trains so many
steps for each level. LCS (Nunez et al., 2021) keeps in each layer the largest weights, ranked anew in each step, and
lets the sparsity rise over the first 80 % of the steps; its line has two sets of weights, w = (1 - a) w0 + a w1 where
the share a is kept. Finished rows are skipped when the program runs again.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bits_networks as networks
import common
import torch
import torch.nn.functional as F
from bits import error
from elastic import sizes
from mnist import Benchmark
from mnist_methods import BATCH, Data, _batches, _shifted, mlp
from mnist_tasks import TASKS
from torch import Tensor, nn
from torch.func import functional_call

import bayesprune as bp
from bayesprune.elastic import Level, LevelDraws

SHARES = (0.5, 0.2, 0.1, 0.05, 0.02)
TARGETS = tuple(f"weights={share}" for share in SHARES)
EPOCHS, RATE, RAMP = 2, 1e-3, 0.8
UNTRAINED, DRAWN, POINT, LINE, ALONE = (
    "levels, not trained",
    "levels, one drawn each step",
    "LCS, a point",
    "LCS, a line",
    "one by one",
)
SETTINGS = {"targets": list(TARGETS), "epochs": EPOCHS, "rate": RATE, "calibration": 1024}

Weights = dict[str, Tensor]


def steps(parameters: list[nn.Parameter], data: Data) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Images, labels, and the share of the training that is done; each step is taken when the next batch is asked for.

    The gradients of a step are there by then.
    """
    num_steps = EPOCHS * (len(data.labels) // BATCH)
    optimizer = torch.optim.Adam(parameters, lr=RATE, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    for step, chosen in enumerate(_batches(len(data.labels), num_steps)):
        optimizer.zero_grad()
        yield _shifted(data.images[chosen], 1)[:, None], data.labels[chosen], step / num_steps
        optimizer.step()
        schedule.step()


def largest(weights: Weights, share: float) -> Weights:
    """The weights with a share of each layer's, the largest; biases whole."""
    found = {}
    for name, weight in weights.items():
        if weight.dim() > 1:
            number = max(1, round(share * weight.numel()))
            limit = weight.detach().abs().flatten().kthvalue(weight.numel() - number + 1).values
            weight = weight * (weight.detach().abs() >= limit)
        found[name] = weight
    return found


def share_drawn() -> float:
    """LCS: half of the draws are ends."""
    if float(torch.rand(())) < 0.5:
        return (SHARES[-1], 1.0)[int(torch.randint(2, ()))]
    return SHARES[-1] + (1 - SHARES[-1]) * float(torch.rand(()))


def lcs(model: nn.Module, data: Data, *, is_line: bool) -> Callable[[float], Weights]:
    """Trains a line or a point; the weights at each share."""
    ends = [
        {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()} for _ in range(1 + is_line)
    ]

    def at(share: float) -> Weights:
        if not is_line:
            return dict(ends[0])
        return {name: (1 - share) * first + share * ends[1][name] for name, first in ends[0].items()}

    for images, labels, done in steps([p for end in ends for p in end.values()], data):
        share = share_drawn()
        kept = share + (1 - share) * max(0.0, 1 - done / RAMP)
        F.cross_entropy(functional_call(model, largest(at(share), kept), (images,)), labels).backward()
    return lambda share: largest(at(share), share)


def drawn(model: nn.Module, levels: list[Level], data: Data, target: str | None = None) -> list[Level]:
    """Trains in place at a level drawn each step, or at one alone; the levels with its weights."""
    draws = LevelDraws(model, levels)
    model.train()
    for images, labels, _ in steps(list(model.parameters()), data):
        with draws.drawn() if target is None else draws.at(target):
            F.cross_entropy(model(images), labels).backward()
    return draws.levels()


class Bench:
    """The rows of the results file."""

    def __init__(self, options: Any) -> None:
        self.out, self.rows = options.out, common.read(options.out, SETTINGS)
        self.benchmark = Benchmark(options.work / "none.json", options.work, Path(options.data_dir))
        self.task = next(task for task in TASKS if task.name == "MNIST weights")
        self.data = self.benchmark.data(self.task, validation=False)

    def add(self, way: str, seed: int, make: Callable[[], dict[str, Any]]) -> None:
        """Measures a row that is not there."""
        if any((row["way"], row["seed"]) == (way, seed) for row in self.rows):
            return
        torch.manual_seed(seed + 300)
        start = time.process_time()
        row = {"way": way, "seed": seed} | make()
        self.rows.append(row | {"cpu_seconds": round(time.process_time() - start, 1)})
        common.write(self.out, SETTINGS, self.rows)
        print(time.strftime("%H:%M:%S"), self.rows[-1], flush=True)

    def run(self, seed: int) -> None:
        """All rows of a seed."""
        state, _ = self.benchmark.dense(self.task, seed, self.data, validation=False)
        dense = nn.Sequential(nn.Flatten(), *mlp())
        pairs = zip(dense.parameters(), (v for k, v in state.items() if "log_std" not in k), strict=True)
        with torch.no_grad():
            for parameter, value in pairs:
                parameter.copy_(value)
        chosen = torch.randperm(len(self.data.labels), generator=torch.Generator().manual_seed(seed))[:1024]
        batches = [(self.data.images[part][:, None], self.data.labels[part]) for part in chosen.split(64)]
        made = bp.elastic.levels(dense, None, TARGETS, data=batches)

        def errors(whole: nn.Module, levels: list[Level]) -> dict[str, Any]:
            found = {"1": error(whole, self.data)}
            return {"errors": found | {its.target: error(its.model, self.data) for its in levels}}

        def trained() -> dict[str, Any]:
            model = copy.deepcopy(dense)
            levels = drawn(model, made, self.data)
            with tempfile.TemporaryDirectory() as directory:
                bp.save(model, directory, levels=levels)
                return errors(model, levels) | {"sizes": sizes(Path(directory))}

        def of_lcs(*, is_line: bool) -> dict[str, Any]:
            weights_at, model = lcs(dense, self.data, is_line=is_line), copy.deepcopy(dense)
            found = {}
            for target, share in (("1", 1.0), *zip(TARGETS, SHARES, strict=True)):
                model.load_state_dict(weights_at(share))
                found[target] = error(model, self.data)
            return {"errors": found}

        def alone() -> dict[str, Any]:
            found = {}
            for number, level in enumerate(made):
                levels = drawn(copy.deepcopy(dense), made, self.data, level.target)
                found[level.target] = error(levels[number].model, self.data)
            return {"errors": found}

        self.add(UNTRAINED, seed, lambda: errors(dense, made))
        self.add(DRAWN, seed, trained)
        self.add(POINT, seed, lambda: of_lcs(is_line=False))
        self.add(LINE, seed, lambda: of_lcs(is_line=True))
        self.add(ALONE, seed, alone)


def main() -> None:
    """Runs what the results file does not have yet."""
    options = networks.options_of("Levels trained together, and controls.", "docs/benchmarks/elastic_trained.json")
    torch.set_num_threads(1)
    bench = Bench(options)
    for seed in options.seeds:
        bench.run(seed)


if __name__ == "__main__":
    main()
