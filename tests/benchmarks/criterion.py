"""Trained CIFAR-10 ResNets at few weights and few channels: the criterion beside every control at equal cost.

Single weights go gradually while the network is fine-tuned; channels go at once between two fine-tunings. All rows have
the same number of gradient evaluations, the same batches, the same loop. Settings are chosen with seed 0 on the last
10 % of each class of the training images. Finished rows are written at once and skipped when the program runs again.

    python tests/benchmarks/criterion.py --data-dir DATA --kind weights
    python tests/benchmarks/criterion.py --data-dir DATA --kind channels --depth 56
    python tests/benchmarks/criterion.py --data-dir DATA --kind channels --float32 [--depth 56]
    python tests/benchmarks/criterion.py --table
"""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from cifar_resnet import Images, trained_resnet20, trained_resnet56
from common import parser, read, write
from criterion_methods import EXAMPLE, Budget, Method, prepare_channels, prune_channels, prune_weights
from criterion_table import markdown
from torch import Tensor, nn

from bayesprune.prune import recalibrate_batch_norm
from bayesprune.reports import accuracy, count_macs, count_parameters

WEIGHTS = {"20": Budget(0, 240, 0.03), "56": Budget(0, 200, 0.03)}
CHANNELS = {"20": Budget(150, 200, 0.01), "56": Budget(100, 150, 0.01)}
LEARNING_RATES = {"weights": (0.01, 0.03), "channels": (0.003, 0.01, 0.03)}
L1S, GROUP_REGS, POWERS = (1e-5, 1e-4, 3e-4, 1e-3), (1e-4, 1e-3, 1e-2), (0.5, 1.0, 2.0)
SPARSITIES, MACS = (0.8, 0.9, 0.95), (0.5, 0.4)
KINDS = ("weights", "channels")
CALIBRATION_BATCHES, TEST_IMAGES = 20, 5_000
SETTINGS: dict[str, dict[str, Any]] = {
    kind: {depth: asdict(budget) for depth, budget in budgets.items()}
    for kind, budgets in (("weights", WEIGHTS), ("channels", CHANNELS))
}
OURS, VARIATIONAL = Method("ours", "snr 0.5"), Method("ours, variational", "snr 1", std="per_channel")
WEIGHT_METHODS = (
    Method("ours, conditioned on zero", "snr 0.5", conditioned=2),
    Method("magnitude, conditioned on zero", "magnitude", conditioned=2),
    OURS,
    Method("ours, variational", "snr 2", std="per_weight"),
    Method("magnitude", "magnitude"),
    Method("magnitude after L1", "magnitude"),
    Method("LAMP", "lamp"),
    Method("Taylor", "taylor"),
    Method("diagonal OBD", "obd"),
    Method("random", "random"),
)
CHANNEL_METHODS = (
    replace(VARIATIONAL, name="ours, variational, conditioned on zero", conditioned=16),
    VARIATIONAL,
    replace(VARIATIONAL, name="ours, variational, power 0.5", score="snr 0.5"),
    replace(VARIATIONAL, name="variational training, mean^2 / s", score="snr 0"),
    Method("ours, conditioned on zero", "snr 0.5", conditioned=16),
    Method("magnitude, conditioned on zero", "magnitude", conditioned=16),
    OURS,
    Method("magnitude", "magnitude"),
    Method("magnitude, no normaliser", "magnitude, no normaliser"),
    Method("magnitude after L1", "magnitude"),
    Method("LAMP", "lamp"),
    Method("Taylor", "taylor"),
    Method("diagonal OBD", "snr 2"),
    Method("no stds, mean^2 / s", "snr 0"),
    Method("torch-pruning Hessian", "hessian"),
    Method("DepGraph, group norm", "magnitude"),
    Method("random", "random"),
)
WARM = Method("ours, SNR^2 at temperature 10", "snr 2", "rank_one", temperature=10.0, relative_std=0.3, std_lr=0.05)
WARM_CONDITIONED = replace(WARM, name=f"{WARM.name}, conditioned on zero", conditioned=16)
PRECISE_METHODS = (
    WARM,
    Method("magnitude", "magnitude"),
    Method("no stds, mean^2 / s", "snr 0"),
    VARIATIONAL,
    WARM_CONDITIONED,
    replace(WARM, name="training at temperature 10, mean^2 / s", score="snr 0"),
)
"""What ran in float32, channels alone."""
DEEP = {
    "weights": (
        "ours, conditioned on zero",
        "magnitude, conditioned on zero",
        "ours",
        "magnitude",
        "magnitude after L1",
        "diagonal OBD",
        "random",
    ),
    "channels": (
        "ours, variational, conditioned on zero",
        "ours, variational",
        "ours, variational, power 0.5",
        "variational training, mean^2 / s",
        "magnitude, conditioned on zero",
        "magnitude",
        "diagonal OBD",
        "no stds, mean^2 / s",
        "DepGraph, group norm",
        "random",
    ),
    "float32": (WARM.name, "magnitude", "no stds, mean^2 / s", WARM_CONDITIONED.name),
}
ONCE = {
    "weights": ("ours, variational", "Taylor", "random"),
    "channels": ("LAMP", "random", "torch-pruning Hessian", WARM_CONDITIONED.name),
}  # behind at seed 0
DEEP_LEVELS = {"weights": (0.95,), "channels": (0.5,)}


class Benchmark:
    """The rows of the results file, and what they are made from."""

    def __init__(self, data_dir: Path, out: Path, settings: dict[str, Any], precision: torch.dtype) -> None:
        self.precision = precision
        self.out, self.settings, self.rows = out, settings, read(out, settings)
        cifar = data_dir / "cifar10"
        self.train = Images(cifar, "train", slice(0, -500))
        self.dense = {"20": trained_resnet20(data_dir), "56": trained_resnet56(data_dir)}
        validation, test = Images(cifar, "train", slice(-500, None)), Images(cifar, "test", slice(None))
        order = torch.Generator().manual_seed(0)
        self.images = {
            "validation": chosen(validation, 2_000, order),
            "test": chosen(test, TEST_IMAGES, order),
        }
        self.prepared: dict[tuple[str, Method, int, float], Any] = {}

    def run(self, kind: str, depth: str, seeds: list[int]) -> None:
        for number, net in self.dense.items():
            images = self.images["test"]
            self.row({"dense": number}, lambda net=net, images=images: {"accuracy": accuracy(net, images)})
        budgets, make = (WEIGHTS, self.weights) if kind == "weights" else (CHANNELS, self.channels)
        levels = SPARSITIES if kind == "weights" else MACS
        is_precise = self.precision == torch.float32
        if depth == "20" and not is_precise:
            self.select(kind, budgets[depth], make)
        methods = PRECISE_METHODS if is_precise else self.chosen_methods(kind)
        if depth == "56":
            levels = DEEP_LEVELS[kind]
            methods = [method for method in methods if method.name in DEEP["float32" if is_precise else kind]]
        for seed in seeds:
            self.prepared.clear()
            for level in levels:
                for method in methods if seed == 0 else [m for m in methods if m.name not in ONCE[kind]]:
                    make(depth, method, level, seed, "test", budgets[depth])

    def select(self, kind: str, budget: Budget, make: Callable[..., None]) -> None:
        """Runs what the choices need, on the validation images."""
        level = 0.9 if kind == "weights" else 0.5
        for lr in LEARNING_RATES[kind]:
            for method in (OURS, Method("magnitude", "magnitude")):
                make("20", method, level, 0, "validation", replace(budget, lr=lr))
        for power in POWERS:
            make("20", replace(OURS, score=f"snr {power:g}"), level, 0, "validation", budget)
        for l1 in L1S:
            make("20", Method("magnitude after L1", "magnitude", l1=l1), level, 0, "validation", budget)
        for method in WEIGHT_METHODS[:2] if kind == "weights" else ():
            make("20", method, level, 0, "validation", budget)
        for reg in GROUP_REGS if kind == "channels" else ():
            method = Method("DepGraph, group norm", "magnitude", group_reg=reg)
            make("20", method, level, 0, "validation", budget)

    def chosen_methods(self, kind: str) -> list[Method]:
        """The methods of a table, penalties as they were best on the validation images."""

        def tuned(method: Method) -> Method:
            runs = [row for row in self.rows if row["run"].get("part") == "validation"]
            runs = [row for row in runs if row["run"]["method"]["name"] == method.name]
            best = max(runs, key=lambda row: row["accuracy"], default=None)
            is_penalty = method.name in ("magnitude after L1", "DepGraph, group norm")
            return Method(**best["run"]["method"]) if best and is_penalty else method

        return [tuned(method) for method in (WEIGHT_METHODS if kind == "weights" else CHANNEL_METHODS)]

    def weights(self, depth: str, method: Method, sparsity: float, seed: int, part: str, budget: Budget) -> None:
        def make() -> dict[str, Any]:
            torch.manual_seed(seed)
            batches = self.train.random(budget.total, seed, augment=True)
            model = prune_weights(self.dense[depth], method, sparsity, batches, budget)
            self.recalibrate(model, seed)
            kept = sum(int((p != 0).sum()) for p in model.parameters() if p.dim() > 1)
            return {"accuracy": accuracy(model, self.images[part]), "kept": kept}

        self.row(self.key("weights", depth, method, sparsity, seed, part, budget), make)

    def channels(self, depth: str, method: Method, macs: float, seed: int, part: str, budget: Budget) -> None:
        def make() -> dict[str, Any]:
            torch.manual_seed(seed)
            key = (depth, replace(method, name="", score="", conditioned=0), seed, budget.lr)
            if key not in self.prepared:
                batches = self.train.random(budget.before, seed, augment=True)
                dense = self.dense[depth]
                self.prepared[key] = prepare_channels(dense, method, batches, budget, self.precision)[0]
            batches = self.train.random(budget.after, seed + 1_000, augment=True)
            cut, tuned, _ = prune_channels(self.prepared[key], method, macs, batches, budget, self.precision)
            for model in (cut, tuned):
                self.recalibrate(model, seed)
            images, dense = self.images[part], count_macs(self.dense[depth], EXAMPLE).macs
            return {
                "at_once": accuracy(cut, images),
                "accuracy": accuracy(tuned, images),
                "macs": count_macs(tuned, EXAMPLE).macs / dense,
                "params": count_parameters(tuned).total / count_parameters(self.dense[depth]).total,
            }

        self.row(self.key("channels", depth, method, macs, seed, part, budget), make)

    def key(
        self, kind: str, depth: str, method: Method, level: float, seed: int, part: str, budget: Budget
    ) -> dict[str, Any]:
        names = {"kind": kind, "depth": depth, "method": asdict(method), "level": level, "seed": seed, "part": part}
        return names | {"lr": budget.lr, "precision": str(self.precision).removeprefix("torch.")}

    def recalibrate(self, model: nn.Module, seed: int) -> None:
        recalibrate_batch_norm(model, self.train.random(CALIBRATION_BATCHES, seed + 100, augment=True))

    def row(self, run: dict[str, Any], make: Any) -> None:
        if any(row["run"] == run for row in self.rows):
            return
        start = time.perf_counter()
        self.rows.append({"run": run} | make() | {"seconds": round(time.perf_counter() - start)})
        write(self.out, self.settings, self.rows)
        print(self.rows[-1], flush=True)


def chosen(images: Images, number: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """This many images at random, in batches."""
    index = torch.randperm(len(images.labels), generator=generator)[:number]
    images.images, images.labels = images.images[index], images.labels[index]
    return list(images.batches())


def main() -> None:
    """Runs what is missing of one kind and network, or writes the page from both results files."""
    options = parser(__doc__ or "", "docs/benchmarks/criterion")
    options.add_argument("--kind", choices=KINDS, default="channels")
    options.add_argument("--depth", choices=("20", "56"), default="20")
    options.add_argument("--float32", action="store_true", help="channels in float32: see PRECISE_METHODS")
    args = options.parse_args()
    torch.set_num_threads(1)
    outs = {kind: args.out.with_name(f"{args.out.name}_{kind}.json") for kind in KINDS}
    if args.table:
        rows = [row for kind, out in outs.items() for row in read(out, SETTINGS[kind])]
        args.out.with_suffix(".md").write_text(markdown(rows, SETTINGS, TEST_IMAGES), encoding="utf-8")
    elif args.data_dir is None:
        raise SystemExit("--data-dir or BAYESPRUNE_DATA is needed: the folder with cifar10 and weights.")
    else:
        kind, precision = ("channels", torch.float32) if args.float32 else (args.kind, torch.bfloat16)
        Benchmark(args.data_dir, outs[kind], SETTINGS[kind], precision).run(kind, args.depth, args.seeds)


if __name__ == "__main__":
    main()
