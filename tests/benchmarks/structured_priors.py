"""Priors with learned scales on MNIST: units of a 784-100-50-10 network removed in one shot, with no retraining.

Every prior trains the same network from scratch, on the same 10,000 images in the same order, with the full KL. Units
are then ranked by SNRImportance and removed until so many of the parameters are left. Each finished run is written at
once and skipped when the program runs again.

    python tests/benchmarks/structured_priors.py --data-dir DATA
    python tests/benchmarks/structured_priors.py --table
"""

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import parser, read, write
from mnist import load
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.priors import ARD, DependencyGroup, Gaussian, Horseshoe, Prior
from bayesprune.prune import dependency_groups

SETTINGS = {"images": 10_000, "epochs": 12, "batch": 200, "lr": 4e-3, "std_lr": 4e-2, "warmup_steps": 100}
TARGETS = (0.5, 0.3, 0.2, 0.15)
Groups = Sequence[DependencyGroup]
PRIORS: dict[str, Callable[[Groups], Prior]] = {
    "Gaussian": lambda groups: Gaussian(),
    "ARD layer": lambda groups: ARD("layer"),
    "ARD channel": lambda groups: ARD("channel"),
    "ARD input channel": lambda groups: ARD("input_channel"),
    "ARD dependency groups": ARD,
    "Horseshoe dependency groups": lambda groups: Horseshoe(groups, "auto"),
}


def run(name: str, seed: int, data: Any) -> dict[str, Any]:
    """Errors in percent on the validation images: of the whole network, and with fewer and fewer parameters."""
    torch.manual_seed(seed)
    x, y = data.images[: SETTINGS["images"]].flatten(1), data.labels[: SETTINGS["images"]]
    model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    bp.to_variational(model)
    example = x[:1]
    prior = PRIORS[name](dependency_groups(model, example))
    seconds = train(model, x, y, prior, SETTINGS, temperature=1.0)
    errors, units = {"1": error(model, data)}, {}
    for target in TARGETS:
        smaller = copy.deepcopy(model)
        bp.prune_channels(smaller, example, target=f"params={target}")
        errors[str(target)] = error(smaller, data)
        units[str(target)] = [smaller[0].out_features, smaller[2].out_features]
    return {"prior": name, "seed": seed, "errors": errors, "units": units, "seconds": round(seconds, 1)}


def train(model: nn.Module, x: Tensor, y: Tensor, prior: Prior, settings: dict[str, Any], temperature: float) -> float:
    """Adam on the variational objective; the seconds that it took."""
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"])
    num_steps = settings["epochs"] * -(-len(x) // settings["batch"])
    bp.attach(
        optimizer,
        model,
        num_data=len(x),
        prior=prior,
        temperature=temperature,
        num_steps=num_steps,
        warmup=settings["warmup_steps"] / num_steps,
        std_lr=settings["std_lr"],
        max_noise_cost=None,
    )
    begin = time.perf_counter()
    for _ in range(settings["epochs"]):
        for index in torch.randperm(len(x)).split(settings["batch"]):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return time.perf_counter() - begin


@torch.no_grad()
def error(model: nn.Module, data: Any) -> float:
    predicted = model.eval()(data.test_images.flatten(1)).argmax(1)
    return round(100 * float((predicted != data.test_labels).double().mean()), 2)


def table(runs: list[dict[str, Any]]) -> str:
    """Errors by prior and by the share of the parameters that is left, one number a seed."""
    shares = ["1", *map(str, TARGETS)]
    lines = ["| prior | " + " | ".join(f"{100 * float(share):g} %" for share in shares) + " |"]
    lines.append("|" + "---|" * (len(shares) + 1))
    for name in PRIORS:
        found = [one for one in runs if one["prior"] == name]
        cells = [" / ".join(f"{one['errors'][share]:.1f}" for one in found) for share in shares]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__.splitlines()[0], "docs/benchmarks/structured_priors.json")
    options = options.parse_args()
    runs = read(options.out, SETTINGS)
    if not options.table:
        torch.set_num_threads(1)
        data = load(options.data_dir, "MNIST", validation=True)
        for seed in options.seeds:
            for name in PRIORS:
                if not any(one["prior"] == name and one["seed"] == seed for one in runs):
                    runs.append(run(name, seed, data))
                    print(runs[-1], flush=True)
                    write(options.out, SETTINGS, runs)
    print(table(runs))


if __name__ == "__main__":
    main()
