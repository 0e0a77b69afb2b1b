"""Scales of norms with a posterior or without, on the digits of scikit-learn: channels removed in one shot.

Every way trains the same network of three convolutions with batch norm from scratch, on the same 1,000 images in the
same order. Channels are then ranked by SNRImportance and removed until so many of the parameters are left; batch norm
is measured anew, and nothing is trained again. Each finished run is written at once and skipped when the program runs
again.

    python tests/benchmarks/norm_scales.py
    python tests/benchmarks/norm_scales.py --table
"""

import copy
from typing import Any

import torch
from common import parser, read, write
from sklearn.datasets import load_digits
from structured_priors import train
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.priors import ARD, Gaussian
from bayesprune.prune import dependency_groups, recalibrate_batch_norm

SETTINGS = {"images": 1_000, "epochs": 60, "batch": 100, "lr": 4e-3, "std_lr": 4e-2, "warmup_steps": 100}
TEMPERATURES = (1.0, 0.1)
TARGETS = (0.5, 0.3, 0.2, 0.1, 0.05)
PRIORS = ("Gaussian", "ARD channel", "ARD dependency groups")


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def run(prior: str, norm_scales: bool, temperature: float, seed: int, data: tuple[Tensor, ...]) -> dict[str, Any]:
    """Errors in percent on the other 797 images: of the whole network, and with fewer and fewer parameters."""
    torch.manual_seed(seed)
    x, y, *test = data
    model = bp.to_variational(network(), norm_scales=norm_scales)
    groups = dependency_groups(model, x[:1])
    priors = {"Gaussian": Gaussian(), "ARD channel": ARD("channel"), "ARD dependency groups": ARD(groups)}
    seconds = train(model, x, y, priors[prior], SETTINGS, temperature)
    errors, channels = {"1": error(recalibrate_batch_norm(model, [x]), *test)}, {}
    for target in TARGETS:
        smaller = copy.deepcopy(model)
        bp.prune_channels(smaller, x[:1], target=f"params={target}")
        errors[str(target)] = error(recalibrate_batch_norm(smaller, [x]), *test)
        channels[str(target)] = [layer.out_channels for layer in smaller if isinstance(layer, nn.Conv2d)]
    found = {"prior": prior, "norm_scales": norm_scales, "temperature": temperature, "seed": seed}
    return {**found, "errors": errors, "channels": channels, "seconds": round(seconds, 1)}


@torch.no_grad()
def error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return round(100 * float((model.eval()(x).argmax(1) != y).double().mean()), 2)


def digits() -> tuple[Tensor, ...]:
    """Images and labels to train with, and the others."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[: SETTINGS["images"]], order[SETTINGS["images"] :]
    return images[train], labels[train], images[test], labels[test]


def table(runs: list[dict[str, Any]]) -> str:
    """Errors by way and by the share of the parameters that is left, one number a seed."""
    shares = ["1", *map(str, TARGETS)]
    lines = ["| temperature | prior | scales of norms | " + " | ".join(f"{100 * float(s):g} %" for s in shares) + " |"]
    lines.append("|" + "---|" * (len(shares) + 3))
    for temperature in TEMPERATURES:
        for prior in PRIORS:
            for norm_scales in (False, True):
                wanted = (prior, norm_scales, temperature)
                found = [one for one in runs if (one["prior"], one["norm_scales"], one["temperature"]) == wanted]
                cells = [" / ".join(f"{one['errors'][share]:.1f}" for one in found) for share in shares]
                way = f"| {temperature:g} | `{prior}` | {'posterior' if norm_scales else 'fixed'} | "
                lines.append(way + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__.splitlines()[0], "docs/benchmarks/norm_scales.json").parse_args()
    runs = read(options.out, SETTINGS)
    ways = [(p, n, t, seed) for seed in options.seeds for t in TEMPERATURES for p in PRIORS for n in (False, True)]
    if not options.table:
        torch.set_num_threads(1)
        data = digits()
        for way in ways:
            if not any((one["prior"], one["norm_scales"], one["temperature"], one["seed"]) == way for one in runs):
                runs.append(run(*way, data))
                print(runs[-1], flush=True)
                write(options.out, SETTINGS, runs)
    print(table(runs))


if __name__ == "__main__":
    main()
