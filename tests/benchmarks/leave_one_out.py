"""How well scores foretell what removing one channel costs: rank correlation with the measured increase of the loss.

The trained ResNet-20 of `criterion.py`, fine-tuned as there; every inner channel is silenced alone and the loss is
measured on validation images. Spearman's correlation of each score with the increases, over all channels and inside
layers.

    python tests/benchmarks/leave_one_out.py --data-dir DATA
"""

from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from cifar_resnet import Images, ResNet, trained_resnet20
from common import parser, read, spread, write
from criterion import CHANNEL_METHODS, CHANNELS, WARM, chosen
from criterion_methods import EXAMPLE, Method, channel_importance, prepare_channels
from scales import of_fisher, of_labels, of_logits, scale_costs
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm import tqdm

import bayesprune as bp
from bayesprune.laplace import KroneckerPosterior, output_metric, sampled_cross_entropy
from bayesprune.laplace.matrices import removed_columns
from bayesprune.prune.graph.find import find_groups
from bayesprune.prune.graph.group import ChannelGroup
from bayesprune.prune.graph.removal import snapshot
from bayesprune.prune.graph.trials import silence
from bayesprune.prune.scores.channels import Criterion

Measured = dict[str, list[list[float]]]
SETTINGS: dict[str, Any] = {"images": 1024, "budget": CHANNELS["20"].before, "lr": CHANNELS["20"].lr}
SKIPPED = ("magnitude after L1", "DepGraph, group norm")  # they train otherwise and score as magnitude does
METHODS = [m for m in (*CHANNEL_METHODS, WARM) if m.name not in SKIPPED and not m.conditioned]
NETWORKS = (Method("", ""), Method("", "", "per_channel"), WARM)
COLUMNS = ("all_divergence", "inside_divergence", "all", "inside")
SCALES = {
    "scale SNR, example by example": of_logits,
    "scale SNR, Fisher information": of_fisher,
    "scale SNR, sampled labels": of_labels,
}
AGAIN = "the same increases, one half of the images against the other"
INTRODUCTION = """# CIFAR-10, channels removed one by one

    python tests/benchmarks/leave_one_out.py --data-dir DATA --float32 --plain

Written from `leave_one_out.json`. The trained ResNet-20, fine-tuned for {budget} steps as in [the criterion beside
its controls](criterion.md); each of its {channels} inner channels is silenced alone, and two things are measured on
{images:,} held-out training images: by how much the loss rises, and how far the predictions move (KL divergence from
those of the whole network). Spearman's rank correlation of the scores with both, mean ± standard deviation over the
seeds: over all channels, and inside layers (mean over the {layers} layers). "ours" reads its stds off the training's
gradients; without `--plain` networks that were trained with noise are scored, too, whose increases are their own. Rows
about units and Kronecker factors read 1,024 training images: "unit SNR" is what removing a channel costs once the
others have made up for it, "Kronecker cost" and "scale SNR" what it costs when nothing does, which is what is measured
here: the one by the factors of the layer that reads it, the other by the derivatives of the logits with respect to a
factor on its activations (`ScaleSNRImportance`, and example by example). The metric is that of the logits, or the
Fisher information, the latter exact or by one sampled label for each image. "{again}" says how much of a measurement is
chance: a score that knew the truth could reach about the square root of it. The loss is noisier than the divergence,
since labels decide its sign.

What foretells one removal best does not keep most when many channels leave and the rest makes up for them: there unit
SNR and magnitude are ahead of scale SNR ([the fair comparison](fair.md)).

| score | divergence: all channels | inside layers | loss: all channels | inside layers |
|---|---|---|---|---|
"""


@torch.no_grad()
def increases(model: ResNet, groups: Any, images: Tensor, labels: Tensor) -> Measured:
    """By group, what silencing each channel alone adds to the loss, and how far it moves the predictions, in nats.

    The blocks before the channel's own are run once for its whole group, in evaluation mode.
    """
    model.eval()
    blocks = {
        f"{stage}.{n}": b
        for stage in ("layer1", "layer2", "layer3")
        for n, b in model.get_submodule(stage).named_children()
    }
    inputs: dict[str, Tensor] = {}
    handles = [
        block.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
        for name, block in blocks.items()
    ]
    dense = model(images).log_softmax(1)
    for handle in handles:
        handle.remove()
    found: Measured = {"loss": [], "divergence": []}
    for group in tqdm(groups, desc="layers"):
        costs, divergences = [], []
        own = next(name for name in blocks if group.members[0].axis[0].startswith(f"{name}."))
        behind = [block for name, block in blocks.items() if name >= own]
        for unit in group.units:
            undo = snapshot(model)
            silence(model, group, [unit])
            x = inputs[own]
            for block in behind:
                x = block(x)
            values = model.linear(x.mean((2, 3))).log_softmax(1)
            costs.append(float(F.nll_loss(values, labels) - F.nll_loss(dense, labels)))
            divergences.append(float(F.kl_div(values, dense, reduction="batchmean", log_target=True)))
            undo()
        found["loss"].append(costs)
        found["divergence"].append(divergences)
    return found


def mean_of(one: Measured, other: Measured) -> Measured:
    """What was measured on as many images each, over all of them."""
    return {
        name: [
            [(a + b) / 2 for a, b in zip(*layers, strict=True)] for layers in zip(one[name], other[name], strict=True)
        ]
        for name in one
    }


def kronecker_costs(posterior: KroneckerPosterior, group: ChannelGroup) -> list[float]:
    """Half of tr(G W_S A_SS W_S^T) over the layers that read each unit S: what its removal adds to the loss."""
    costs = [0.0] * len(group.units)
    for member in group.members:
        if member.axis[1] != "in" or member.axis[0] not in posterior:
            continue
        factors = posterior[member.axis[0]]
        columns = [
            removed_columns(member.layer, [p for root in unit for p in member.positions.get(root, ())])
            for unit in group.units
        ]
        for block, inside, between in factors.blocks():
            gram = factors.gram(block, inside)
            for number, mask in enumerate(columns):
                own = mask[block, inside]
                costs[number] += 0.5 * float((gram[own][:, own] * between[own][:, own]).sum())
    return costs


def run_kronecker(
    model: ResNet, measured: Measured, groups: Any, train: Images, seed: int
) -> dict[str, dict[str, float]]:
    """Both correlations of the scores that read Kronecker factors, by name."""
    batches = list(train.random(16, 2_000 + seed, augment=False))
    torch.manual_seed(seed)
    found = {"scale SNR": correlations(by_unit(bp.prune.ScaleSNRImportance(model, batches), groups), measured)}
    for name, cotangents in SCALES.items():
        costs = scale_costs(model, groups, batches, cotangents)
        found[name] = correlations([each.tolist() for each in costs], measured)
    bp.to_variational(model, estimator="mean")
    for suffix, loss in (("", output_metric), (", sampled labels", sampled_cross_entropy)):
        torch.manual_seed(seed)
        posterior = bp.laplace.fit_kronecker(model, batches, num_data=len(train.labels), loss=loss)
        scores = {"Kronecker cost": [kronecker_costs(posterior, group) for group in groups]}
        scores["unit SNR"] = by_unit(bp.prune.UnitSNRImportance(model, posterior), groups)
        found |= {f"{name}{suffix}": correlations(values, measured) for name, values in scores.items()}
    return found


def by_unit(importance: Criterion, groups: Any) -> list[list[float]]:
    """The scores of each group's units."""
    found = [importance.of_group(group) for group in groups]
    return [[float(scores[unit[0]]) for unit in group.units] for scores, group in zip(found, groups, strict=True)]


def run(method: Method, model: nn.Module, measured: Measured, groups: Any, train: Images) -> dict[str, float]:
    """Both correlations of one score."""
    importance, _ = channel_importance(method.score, model, train.random(8, 1_000, augment=True))
    scores = [importance(group.group).tolist() for group in groups]
    ordered = [[values[unit[0]] for unit in group.units] for group, values in zip(groups, scores, strict=True)]
    return correlations(ordered, measured)


def correlations(scores: list[list[float]], measured: Measured) -> dict[str, float]:
    """Spearman's correlation over all units, and its mean inside groups, with each of what was measured."""
    found = {}
    for name, values in measured.items():
        flat = [[x for layer in layers for x in layer] for layers in (scores, values)]
        inside = [spearmanr(one, other).statistic for one, other in zip(scores, values, strict=True)]
        suffix = "" if name == "loss" else f"_{name}"
        found |= {f"all{suffix}": float(spearmanr(*flat).statistic), f"inside{suffix}": mean(map(float, inside))}
    return found


def main() -> None:
    """Runs what is missing, then writes the page."""
    options = parser(__doc__ or "", "docs/benchmarks/leave_one_out.json")
    options.add_argument("--plain", action="store_true", help="only the network that was trained without noise")
    options.add_argument("--float32", action="store_true", help="train in float32, not with bfloat16 products")
    args = options.parse_args()
    torch.set_num_threads(1)
    rows = read(args.out, SETTINGS)
    if not args.table:
        directory = Path(args.data_dir)
        train = Images(directory / "cifar10", "train", slice(0, -500))
        held_out = Images(directory / "cifar10", "train", slice(-500, None))
        batches = chosen(held_out, SETTINGS["images"], torch.Generator().manual_seed(0))
        images, labels = (torch.cat(parts).chunk(2) for parts in zip(*batches, strict=True))
        precision = torch.float32 if args.float32 else torch.bfloat16
        for seed, network in product(args.seeds, NETWORKS):
            methods = [m for m in METHODS if (m.std, m.temperature) == (network.std, network.temperature)]
            is_plain = network == NETWORKS[0]
            key = "all_divergence" if is_plain else "all"
            made = {row["method"] for row in rows if row["seed"] == seed and key in row}
            if {method.name for method in methods} <= made or (args.plain and not is_plain):
                continue
            torch.manual_seed(seed)
            budget = CHANNELS["20"]
            random = train.random(budget.before, seed, augment=True)
            model, _ = prepare_channels(trained_resnet20(directory), network, random, budget, precision)
            groups = find_groups(model, EXAMPLE).groups
            halves = [increases(model, groups, *half) for half in zip(images, labels, strict=True)]
            measured = mean_of(*halves)
            sizes = {"channels": sum(map(len, measured["loss"])), "layers": len(groups), "seed": seed}
            sizes["precision"] = str(precision).removeprefix("torch.")
            found = {method.name: run(method, model, measured, groups, train) for method in methods}
            if is_plain:
                found[AGAIN] = {
                    key: value
                    for name in measured
                    for key, value in correlations(halves[0][name], {name: halves[1][name]}).items()
                }
                found |= run_kronecker(model, measured, groups, train, seed)
            rows = [row for row in rows if row["seed"] != seed or row["method"] not in found]
            rows += [{"method": name} | values | sizes for name, values in found.items()]
            write(args.out, SETTINGS, rows)
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in (row for row in rows if "conditioned" not in row["method"]):  # the score is that without
        by_method.setdefault(row["method"], []).append(row)
    lines = [INTRODUCTION.format(**SETTINGS, again=AGAIN, channels=rows[0]["channels"], layers=rows[0]["layers"])]
    for name, found in sorted(
        by_method.items(), key=lambda item: -mean(row.get("all_divergence", -1) for row in item[1])
    ):
        columns = [[row[key] for row in found if key in row] for key in COLUMNS]
        shown = [spread(values, 2) if values else "" for values in columns]
        lines.append(f"| {name} | {' | '.join(shown)} |\n")
    args.out.with_suffix(".md").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
