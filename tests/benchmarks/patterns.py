"""N:M patterns chosen by gates, and at once: an MLP 64-96-48-10 on scikit-learn's digits, in half a minute a seed.

Every row of a seed starts from the same dense network and has as many gradients of as many images. Gates learn a
pattern in three quarters of the training, a block as one choice among its patterns or each gate by itself; the other
rows remove weights at once and train on. "OBD" ranks by a diagonal Laplace posterior of the training images
(`fit_laplace`, `SNRScore(power=2)`). The learning rate is chosen for each row on the last 200 training images, as a
mean over all seeds. 500 images are the test. Runs that are in the results file are skipped.

    python tests/benchmarks/patterns.py --seeds 0 1 2 3 4 5
    python tests/benchmarks/patterns.py --table
"""

import copy
from statistics import mean
from typing import Any

import torch
from common import parser, read, spread, write
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bayesprune as bp
from bayesprune import gates
from bayesprune.gates.gate import WeightGate, named_gates

TARGETS = ("2:4", "1:8", "1:16")
METHODS = {
    "patterns": "gates, a block one choice among its patterns",
    "alone": "gates, each by itself",
    "magnitude": "magnitude, at once",
    "OBD": "OBD, at once",
}
LRS = (2e-3, 4e-3, 8e-3)
DENSE_EPOCHS, EPOCHS, BATCH = 40, 30, 64
NUM_TEST, NUM_VALIDATION = 500, 200
SETTINGS = {"dense_epochs": DENSE_EPOCHS, "epochs": EPOCHS, "batch": BATCH, "lrs": LRS}


def split(seed: int, *, validation: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, and those that the error is measured on."""
    x, y = (torch.tensor(values) for values in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order].float() / 16, y[order]
    if validation:
        x, y = x[:-NUM_TEST], y[:-NUM_TEST]
    held = NUM_VALIDATION if validation else NUM_TEST
    return x[:-held], y[:-held], x[-held:], y[-held:]


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, num_steps: int) -> None:
    """Trains with a learning rate that falls linearly to 0."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    order = torch.randperm(len(x))
    for _ in range(num_steps):
        if len(order) < BATCH:
            order = torch.randperm(len(x))
        chosen, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        cross_entropy(model.train()(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()


def dense(x: Tensor, y: Tensor) -> nn.Module:
    """The network that all rows of a seed start from."""
    layers = (nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10))
    model = nn.Sequential(*layers)
    fit(model, torch.optim.Adam(model.parameters(), lr=1e-3), x, y, DENSE_EPOCHS * (len(x) // BATCH))
    return model


def pruned(model: nn.Module, method: str, target: str, lr: float, x: Tensor, y: Tensor) -> nn.Module:
    """The network with the pattern, trained; in place. Without a target it stays dense."""
    num_steps = EPOCHS * (len(x) // BATCH)
    bp.to_variational(model, estimator="mean")
    if method in ("patterns", "alone"):
        gates.add_weight_gates(model, target)
        for _, gate in named_gates(model):
            if isinstance(gate, WeightGate) and method == "alone":
                gate.masks = None
    elif method == "magnitude":
        bp.prune_weights(model, target, score=lambda posterior: posterior.mean.abs())
    elif method == "OBD":
        bp.laplace.fit_laplace(model, [(x, y)])
        bp.prune_weights(model, target, score=bp.prune.SNRScore(power=2))
    optimizer = torch.optim.Adam([p for name, p in model.named_parameters() if "gate" not in name], lr=lr)
    if method in ("patterns", "alone"):
        bp.attach(optimizer, model, num_data=len(x), num_steps=num_steps, temperature=0.0)
    fit(model, optimizer, x, y, num_steps)
    return gates.close(model) if method in ("patterns", "alone") else model


def run(row: dict[str, Any], starts: dict[tuple[int, bool], nn.Module]) -> float:
    """Percent of the held-out images given another label."""
    seed, validation = row["seed"], row["validation"]
    x, y, held, labels = split(seed, validation=validation)
    torch.manual_seed(seed)
    if (seed, validation) not in starts:
        starts[seed, validation] = dense(x, y)
    torch.manual_seed(seed)
    model = pruned(copy.deepcopy(starts[seed, validation]), row["method"], row["target"], row["lr"], x, y)
    with torch.no_grad():
        return round(100 * float((model.eval()(held).argmax(1) != labels).double().mean()), 3)


def errors(runs: list[dict[str, Any]], key: dict[str, Any]) -> list[float]:
    """Of the runs with these entries."""
    return [run["error"] for run in runs if key.items() <= run.items()]


def best_lr(runs: list[dict[str, Any]], method: str, target: str) -> float:
    """The learning rate of the least error on validation images."""
    key = {"method": method, "target": target, "validation": True}
    return min(LRS, key=lambda lr: mean(errors(runs, key | {"lr": lr}) or [100.0]))


def page(runs: list[dict[str, Any]]) -> str:
    """The page of the documentation."""
    lines = ["# N:M patterns", "", *(__doc__ or "").strip().splitlines(), ""]
    num = len({run["seed"] for run in runs})
    lines += [f"Error in percent on {NUM_TEST} test images, mean over {num} seeds with its standard error.", ""]
    lines += ["| | " + " | ".join(TARGETS) + " |", "|---" * (len(TARGETS) + 1) + "|"]
    for method, name in METHODS.items():
        cells = []
        for target in TARGETS:
            key = {"method": method, "target": target, "validation": False, "lr": best_lr(runs, method, target)}
            cells.append(spread(errors(runs, key), 2, of_mean=True) if errors(runs, key) else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    untouched = errors(runs, {"method": "dense", "validation": False, "lr": best_lr(runs, "dense", "")})
    if untouched:
        lines += ["", f"The dense network, trained on for as long: {spread(untouched, 2, of_mean=True)}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing, and writes the page."""
    args = parser(__doc__ or "", "docs/benchmarks/patterns.json").parse_args()
    torch.set_num_threads(1)
    runs = read(args.out, SETTINGS)
    starts: dict[tuple[int, bool], nn.Module] = {}

    def add(row: dict[str, Any]) -> None:
        if not errors(runs, row):
            runs.append(row | {"error": run(row, starts)})
            write(args.out, SETTINGS, runs)
            print(runs[-1], flush=True)

    ways = [("dense", ""), *((method, target) for target in TARGETS for method in METHODS)]
    for method, target in ways if not args.table else ():
        key = {"method": method, "target": target}
        for lr in LRS:
            for seed in args.seeds:
                add(key | {"lr": lr, "seed": seed, "validation": True})
        for seed in args.seeds:
            add(key | {"lr": best_lr(runs, method, target), "seed": seed, "validation": False})
    args.out.with_suffix(".md").write_text(page(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
