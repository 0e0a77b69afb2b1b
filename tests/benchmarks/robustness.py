"""What ResNets lose on corrupted CIFAR-10 images when single weights go in one shot, by three criteria.

    python tests/benchmarks/robustness.py --data-dir DATA --network resnet20
    python tests/benchmarks/robustness.py --table

No training: all methods have the same 1,024 calibration images and recalibrated batch norms. Levels that
docs/benchmarks/robustness.json has are not repeated.
"""

import copy
import gzip
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from cifar_resnet import Images, _normalised, trained_resnet20, trained_resnet56
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.prune.scores.weights import magnitude
from bayesprune.robustness import CORRUPTIONS, excess_error, prune_potential, robustness

NETWORKS = {"resnet20": trained_resnet20, "resnet56": trained_resnet56}
TITLES = {"resnet20": "ResNet-20", "resnet56": "ResNet-56"}
METHODS = ("ours", "magnitude", "random")
LEVELS = (0.5, 0.7, 0.8)
DELTA = 0.02
UNCERTAIN = 0.7
SETTINGS = {
    "calibration_images": 1024,
    "test": "the first {per_class} test images of each class",
    "per_class": 20,
    "levels": LEVELS,
    "corruptions": CORRUPTIONS,
}

TEXT = """# What ResNets lose beside accuracy

Written by `python tests/benchmarks/robustness.py --table` from robustness.json, the results of the same program; run it
with `--data-dir` and `--network` to make the rows again.

Networks at published weights, single weights removed in one shot without any training. **Ours** is `prune_one_shot`;
magnitude and random rank all weights together. All have the same {calibration_images:,} calibration images and batch
norms that were recalibrated on them. {num_images} test images, the same for all; a difference of one point is two
images. Eight corruptions in five severities with the constants of CIFAR-10-C (rotations and shifts have none there).

**Prune potential** is the largest of the removed shares {levels} whose error on those images is at most {delta:.0%}
above the unpruned network's on the same images; a corruption's error is its mean over five severities.
**Excess error** is by how many points more the error rises from images as they are to corrupted ones, pruned against
unpruned; above 0 the pruned network lost more than its test accuracy says.

**Read it with these in mind.** A network near chance has little left to lose, so that its excess error is below 0 and
says nothing: look at random. What two or three images decide is no finding. AUROC is not a measure of health either:
the ResNet-20 cut by magnitude errs twice as often and tells clothes better than the unpruned one. One pass over a
Laplace posterior makes the unpruned ResNet-20 worse calibrated, and those cut by ours and by magnitude better: fitted
to 1,024 images that it predicts almost without error, the posterior is too wide for the unpruned one.

**Does it know that it does not know**: expected calibration error and negative log-likelihood on the test images as
they are, and the chance that the predictive entropy of a foreign image is above that of a test image. Each network at
its weights, and with a diagonal Laplace posterior (`fit_laplace` on the calibration images) by one pass that propagates
mean and variance (`predict(method="moments")`).
"""


def pruned(method: str, share: float, dense: nn.Module, batches: list[Any]) -> nn.Module:
    """A copy of the network with posteriors, without this share of its weights."""
    model = bp.to_variational(copy.deepcopy(dense))
    torch.manual_seed(0)
    target = f"weights={1 - share:.2f}"
    if method == "ours":
        bp.prune_one_shot(model, batches, target)
        return model
    score = magnitude if method == "magnitude" else lambda posterior: torch.rand_like(posterior.mean)
    bp.prune_weights(model, target, score=score, data=batches)
    return model


def measured(model: nn.Module, test: list[Any]) -> dict[str, Any]:
    """Accuracy under every corruption."""
    found = robustness({"model": model}, test)
    return {"rows": [asdict(row) for row in found.rows], "ece": found.ece[0], "nll": found.nll[0]}


def foreign(data_dir: Path, count: int) -> list[Tensor]:
    """Clothes of Fashion-MNIST as colour images of 32 x 32."""
    with gzip.open(data_dir / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte.gz") as file:
        pixels = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)[16:].view(-1, 28, 28)[:count]
    wide = F.pad(pixels, (2, 2, 2, 2)).unsqueeze(3).expand(-1, -1, -1, 3)
    return list(_normalised(wide).split(100))


def page(settings: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """The tables of all networks."""
    levels = ", ".join(f"{level:.0%}" for level in settings["levels"])
    num_images = 10 * settings["per_class"]
    parts = [TEXT.format(**{**settings, "levels": levels}, num_images=num_images, delta=DELTA)]
    for network, title in TITLES.items():
        own = [run for run in runs if run["network"] == network]
        if own:
            parts += tables(title, settings["corruptions"], own)
    return "\n".join(parts)


def tables(title: str, corruptions: Sequence[str], runs: list[dict[str, Any]]) -> list[str]:
    """The lines about one network."""
    by = {(run["method"], run["share"]): run for run in runs if run["kind"] == "corruptions"}
    found = sorted({share for method, share in by if method != "dense"})
    names = ["none", *corruptions]
    methods = [method for method in METHODS if any(key[0] == method for key in by)]
    parts = [f"## {title}", "", "### Prune potential", ""]
    parts.append("| corruption | unpruned error, % | " + " | ".join(methods) + " |")
    parts.append("|---|---|" + "---|" * len(methods))
    for name in names:
        reference = _error(by["dense", 0.0], name)
        cells = []
        for method in methods:
            curve = [(key[1], _error(run, name)) for key, run in by.items() if key[0] == method]
            shares, errors = (list(values) for values in zip(*curve, strict=True))
            cells.append(f"{prune_potential(shares, errors, reference, delta=DELTA):.0%}")
        parts.append(f"| {name} | {100 * reference:.1f} | " + " | ".join(cells) + " |")
    for share in found:
        there = [method for method in methods if (method, share) in by]
        parts += ["", f"### {share:.0%} of the weights removed", ""]
        heads = [*(f"{method}, error, %" for method in there), *(f"{method}, excess, points" for method in there)]
        parts += ["| corruption | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
        for name in names:
            errors = [f"{100 * _error(by[method, share], name):.1f}" for method in there]
            excess = [f"{100 * _excess(by, method, share, name):+.1f}" if name != "none" else "" for method in there]
            parts.append(f"| {name} | " + " | ".join([*errors, *excess]) + " |")
    uncertain = [run for run in runs if run["kind"] == "uncertainty"]
    parts += ["", "### Does it know that it does not know", ""]
    parts += [
        "| network | ECE | NLL, nats | AUROC, Fashion-MNIST |",
        "|---|---|---|---|",
    ]
    for run in uncertain:
        numbers = (run["ece"], run["nll"], run["auroc"])
        name = "unpruned" if run["method"] == "dense" else f"{run['method']}, {run['share']:.0%} removed"
        parts.append(f"| {name}, {run['predicts']} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |")
    seconds = sum(run["seconds"] for run in runs)
    return [*parts, "", f"The rows took {seconds / 60:.0f} minutes by the clock on a core shared with other work.", ""]


def _error(run: dict[str, Any], name: str) -> float:
    found = [1 - row["accuracies"][0] for row in run["rows"] if row["corruption"] == name]
    return sum(found) / len(found)


def _excess(by: dict[tuple[str, float], Any], method: str, share: float, name: str) -> float:
    pairs = [(_error(run, "none"), _error(run, name)) for run in (by[method, share], by["dense", 0.0])]
    return excess_error(*pairs)


def main() -> None:
    """Runs what the results file does not have yet, then writes the page."""
    parser = common.parser("What ResNets lose beside accuracy.", "docs/benchmarks/robustness.json")
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    options = parser.parse_args()
    runs = common.read(options.out, SETTINGS)
    if not options.table:
        torch.set_num_threads(1)
        dense = NETWORKS[options.network](options.data_dir).eval()
        images = options.data_dir / "cifar10"
        test = list(Images(images, "test", slice(SETTINGS["per_class"])).batches(100))
        batches = list(Images(images, "train", slice(200)).random(16, 0, augment=False))
        clothes = foreign(options.data_dir, 10 * SETTINGS["per_class"])
        for method, share in [("dense", 0.0), *((method, share) for share in LEVELS for method in METHODS)]:
            is_uncertain = method == "dense" or share == UNCERTAIN
            key = {"network": options.network, "method": method, "share": share}
            if any(key.items() <= run.items() for run in runs):
                continue
            started = time.monotonic()
            model = (
                bp.to_variational(copy.deepcopy(dense)) if method == "dense" else pruned(method, share, dense, batches)
            )
            plain = bp.to_deterministic(copy.deepcopy(model)).eval()
            found: list[dict[str, Any]] = [key | {"kind": "corruptions"} | measured(plain, test)]
            for predicts, one in (("weights", plain), ("moments", model)) if is_uncertain else ():
                if predicts == "moments":
                    bp.laplace.fit_laplace(one, batches, num_data=50_000)
                seen = robustness({"model": one}, test, foreign=clothes, corruptions=[])
                scores = {"ece": seen.ece[0], "nll": seen.nll[0], "auroc": seen.auroc[0]}
                found.append(key | {"kind": "uncertainty", "predicts": predicts} | scores)
            seconds = round(time.monotonic() - started, 1)
            runs += [run | {"seconds": seconds if run is found[0] else 0} for run in found]
            common.write(options.out, SETTINGS, runs)
            clean = found[0]["rows"][0]["accuracies"][0]
            print(time.strftime("%H:%M:%S"), method, share, f"{clean:.3f}", seconds, flush=True)
    options.out.with_suffix(".md").write_text(page(SETTINGS, runs), encoding="utf-8")


if __name__ == "__main__":
    main()
