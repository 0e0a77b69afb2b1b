"""Where rules with no number to choose stop by themselves on the trained ResNet-20, and the accuracy there.

Variational training (weight sampling, temperature 0.1, the loop of `criterion.py`), then the rule removes what it does:
SNR below 1 and evidence above 0 single weights or channels, gates with an inclusion below 1/2 what they stand before.
Accuracy on the 5,000 test images, at once and after plain fine-tuning. Finished rows are kept.

    python tests/benchmarks/criterion_stops.py --data-dir DATA
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from cifar_resnet import Images, trained_resnet20
from common import parser, read, write
from criterion import CHANNELS, TEST_IMAGES, chosen
from criterion_methods import EXAMPLE, NUM_DATA, Method, converted, train
from torch import nn

import bayesprune as bp
from bayesprune import gates
from bayesprune.layers import named_posteriors
from bayesprune.prune import EvidenceImportance, evidence, recalibrate_batch_norm
from bayesprune.reports import accuracy, count_macs

RULES = (
    "SNR, weights",
    "SNR, channels",
    "evidence, weights",
    "evidence, channels",
    "inclusion, weights",
    "inclusion, channels",
)
SETTINGS: dict[str, Any] = {"channels": asdict(CHANNELS["20"]), "temperature": 0.1, "test_images": TEST_IMAGES}


def trained(rule: str, dense: nn.Module, batches: Iterator[Any]) -> tuple[nn.Module, bp.priors.Prior]:
    """The network with its posterior, and the prior."""
    std = "per_channel" if rule == "SNR, channels" else "per_weight"
    model, budget = converted(dense, Method("", "", std)), CHANNELS["20"]
    prior = bp.priors.ARD("channel") if rule.startswith("evidence") else bp.priors.Gaussian()
    if rule == "inclusion, weights":
        gates.add_weight_gates(model)
    elif rule == "inclusion, channels":
        gates.add_channel_gates(model, EXAMPLE)
    attach = partial(bp.attach, model=model, num_data=NUM_DATA, prior=prior, std_lr=2e-2)
    train(model, batches, budget.before, budget.lr, before=attach)
    return model.eval(), prior


def stop(rule: str, model: nn.Module, prior: bp.priors.Prior) -> None:
    """Removes what the rule says, in place."""
    kind = rule.partition(", ")[0]
    if rule == "SNR, weights":
        bp.prune_weights(model, "snr=1")
    elif rule == "evidence, weights":
        found = evidence(model, prior)
        for posterior in named_posteriors(model):
            if posterior.is_weight:
                posterior.layer.set_mask(posterior.parameter, found[posterior.name] > 0)
    elif rule == "inclusion, weights":
        gates.close(model)
    else:
        target = {"SNR": "snr=1", "evidence": "evidence=0", "inclusion": "inclusion=0.5"}[kind]
        importance = EvidenceImportance(prior) if kind == "evidence" else None
        bp.prune_channels(model, EXAMPLE, target=target, importance=importance)


def run(rule: str, seed: int, images: Images, test: list[Any], dense: nn.Module) -> dict[str, float]:
    """What is left, and the accuracies."""
    budget = CHANNELS["20"]
    torch.manual_seed(seed)
    model, prior = trained(rule, dense, images.random(budget.before, seed, augment=True))
    stop(rule, model, prior)
    cut = bp.to_deterministic(model)
    recalibrate_batch_norm(cut, images.random(20, seed + 100, augment=True))
    weights = [parameter for parameter in cut.parameters() if parameter.dim() > 1]
    total = sum(parameter.numel() for parameter in dense.parameters() if parameter.dim() > 1)
    kept = sum(int(weight.count_nonzero()) for weight in weights)
    at_once = accuracy(cut, test)
    tuned = converted(cut)
    bp.prune_weights(tuned, f"weights={kept / sum(weight.numel() for weight in weights)}")
    train(tuned, images.random(budget.after, seed + 1_000, augment=True), budget.after, budget.lr)
    after = bp.to_deterministic(tuned)
    recalibrate_batch_norm(after, images.random(20, seed + 100, augment=True))
    macs = count_macs(after, EXAMPLE).macs / count_macs(dense, EXAMPLE).macs
    return {"weights": kept / total, "macs": macs, "at_once": at_once, "accuracy": accuracy(after, test)}


def main() -> None:
    """Runs what is missing, then prints the table in Markdown."""
    args = parser(__doc__ or "", "docs/benchmarks/criterion_stops.json").parse_args()
    torch.set_num_threads(1)
    rows = read(args.out, SETTINGS)
    if not args.table:
        directory = Path(args.data_dir)
        images, dense = Images(directory / "cifar10", "train", slice(0, -500)), trained_resnet20(directory)
        order = torch.Generator().manual_seed(0)
        test = chosen(Images(directory / "cifar10", "test", slice(None)), TEST_IMAGES, order)
        for seed in args.seeds:
            for rule in RULES:
                if all((row["rule"], row["seed"]) != (rule, seed) for row in rows):
                    rows.append({"rule": rule, "seed": seed} | run(rule, seed, images, test, dense))
                    write(args.out, SETTINGS, rows)
                    print(rows[-1], flush=True)
    print("| | weights kept, % | MACs kept, % | at once, % | fine-tuned, % |\n|---|---|---|---|---|")
    for rule in RULES:
        if found := [row for row in rows if row["rule"] == rule]:
            cells = [
                f"{100 * mean(row[key] for row in found):.1f} ({', '.join(f'{100 * row[key]:.1f}' for row in found)})"
                for key in ("weights", "macs", "at_once", "accuracy")
            ]
            print(f"| {rule} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
