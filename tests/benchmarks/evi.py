"""MNIST and Fashion-MNIST, one layer of 100 kernels 5x5: accuracy against kernels left, Bayesian (eVI) beside plain.

    python tests/benchmarks/evi.py --data-dir DATA --out docs/benchmarks/evi.json

DATA holds MNIST/raw/*.gz and FashionMNIST/raw/*.gz. Runs that the results file already has are not repeated; the table
and the plot are written beside it. All choices are made on the last tenth of the training set; `--validation` measures
on it. What varies at the same number of gradient evaluations: the loss (paper's, with either KL and either covariance;
cross-entropy; cross-entropy with an L1 penalty, since the KLs hold a penalty on the means).
"""

import copy
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import common
import torch
import torch.nn.functional as F
from mnist import _read
from torch import Tensor, nn
from tqdm import tqdm

import bayesprune as bp
from bayesprune import evi
from bayesprune.prune.graph.find import find_groups

DATASETS = {"MNIST": "MNIST", "FashionMNIST": "Fashion-MNIST"}
KERNELS_LEFT = (100, 80, 60, 50, 40, 30, 20, 15, 10, 7, 5, 3, 2)
RANDOM_ORDERS = 5
COST_AT = (30, 20, 10)


@dataclass(frozen=True)
class Network:
    """How one network is trained.

    Attributes:
        label: Its name in the table.
        kl: "text" or "code", the paper's two complexity terms; None trains with cross-entropy.
        covariance: What the Bayesian loss propagates.
        lr: Of the means, by data set; falls linearly to 0.
        l1: Weight of sum |w| over the weights of a plain network.
        compresses: Whether the self-compression loop is run on it.
    """

    label: str
    kl: str | None = None
    covariance: str = "spatial"
    lr: dict[str, float] = field(default_factory=lambda: {"MNIST": 1e-2, "FashionMNIST": 3e-3})
    l1: float = 0.0
    compresses: bool = False


@dataclass(frozen=True)
class Settings:
    """What all runs share.

    Attributes:
        std_lr: Learning rate of the log stds.
        retraining_steps: After each cut of the self-compression loop, at a tenth of the means' learning rate.
        tolerance: Loss of validation accuracy that the loop accepts, in points.
        step: Fraction of the MACs, so of the kernels, that its cuts remove at first.
        validation: Whether the validation images are measured instead of the test images.
    """

    kernels: int = 100
    batch_size: int = 20
    steps: int = 1200
    std_lr: float = 1e-2
    tau: float = evi.PUBLISHED_KL_WEIGHTS["mnist"]
    ridge: float = 1e-3
    relative_std: float = 0.1
    retraining_steps: int = 150
    tolerance: float = 0.5
    step: float = 0.3
    min_step: float = 0.1
    validation: bool = False
    networks: dict[str, Network] = field(default_factory=lambda: NETWORKS)


NETWORKS = {
    "evi-spatial-text": Network("Bayesian, spatial, KL of the text", "text", "spatial", compresses=True),
    "plain": Network("plain", lr={"MNIST": 3e-3, "FashionMNIST": 3e-3}, compresses=True),
    "plain-l1": Network("plain, L1 penalty", lr={"MNIST": 3e-3, "FashionMNIST": 3e-3}, l1=3e-4, compresses=True),
    "evi-diagonal-text": Network("Bayesian, diagonal, KL of the text", "text", "diagonal"),
    "evi-spatial-code": Network("Bayesian, spatial, KL of the code", "code", "spatial"),
}


@dataclass(frozen=True)
class Data:
    """Images (N, 1, 28, 28) in 0 to 1 and labels (N) of the training set, its last tenth, and the test set."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load(directory: Path, dataset: str) -> Data:
    """One of DATASETS, all in memory."""
    raw = directory / dataset / "raw"

    def split(part: str) -> tuple[Tensor, Tensor]:
        images = _read(raw / f"{part}-images-idx3-ubyte.gz", header=16).view(-1, 1, 28, 28).float() / 255
        return images, _read(raw / f"{part}-labels-idx1-ubyte.gz", header=8).long()

    x, y = split("train")
    cut = len(y) * 9 // 10
    return Data((x[:cut], y[:cut]), (x[cut:], y[cut:]), split("t10k"))


def build(network: Network, settings: Settings) -> nn.Sequential:
    """The paper's network: one convolution without bias, 2x2 max-pooling, a classifier."""
    model = nn.Sequential(
        nn.Conv2d(1, settings.kernels, 5, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(144 * settings.kernels, 10),
    )
    if network.kl is not None:
        evi.convert(model, relative_std=settings.relative_std)
    return model


def train(
    model: nn.Module, network: Network, data: Data, settings: Settings, lr: float, steps: int, progress: tqdm
) -> None:
    """Adam on batches drawn at random, learning rates falling linearly to 0."""
    stds = [p for key, p in model.named_parameters() if key.endswith("log_std") and p.requires_grad]
    means = [p for key, p in model.named_parameters() if not key.endswith("log_std")]
    groups = [{"params": means, "lr": lr}, {"params": stds, "lr": settings.std_lr}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    kl = evi.published_kl if network.kl == "code" else evi.gaussian_kl
    images, labels = data.train
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(labels), (settings.batch_size,))
        x, y = images[chosen], labels[chosen]
        if network.kl is None:
            loss = F.cross_entropy(model(x), y)
            if network.l1:
                loss = loss + network.l1 * sum(p.abs().sum() for p in means if p.dim() > 1)
        else:
            loss = evi.loss(model, x, y, covariance=network.covariance, kl=kl, tau=settings.tau, ridge=settings.ridge)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.update()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of the images given their label, at the posterior means."""
    model.eval()
    correct = sum((model(x).argmax(1) == y).sum() for x, y in _chunks(images, labels))
    return 100 * float(correct) / len(labels)


@torch.no_grad()
def contributions(model: nn.Sequential, images: Tensor) -> tuple[Tensor, Tensor]:
    """What each kernel adds to each logit, (N, K, C), and the bias (C): removing a kernel takes its part out."""
    model.eval()
    linear = model[4]
    weight = linear.weight.reshape(10, -1, 144)
    parts = [torch.einsum("nkp,ckp->nkc", model[:3](x).flatten(2), weight) for x in images.split(250)]
    return torch.cat(parts), linear.bias


def removal(model: nn.Sequential, images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Accuracy at each of KERNELS_LEFT by criterion, without retraining."""
    parts, bias = contributions(model, images)
    rows = []
    for criterion, orders in rankings(model).items():
        for left in KERNELS_LEFT:
            found = [(parts[:, order[:left]].sum(1) + bias).argmax(1).eq(labels).double().mean() for order in orders]
            rows.append(
                {"criterion": criterion, "kernels": left, "accuracy": round(100 * float(sum(found) / len(found)), 2)}
            )
    return rows


def check_removal(model: nn.Module, rows: list[dict[str, Any]], images: Tensor, labels: Tensor) -> None:
    """Half of the kernels really removed by `prune_channels`: the accuracy that the table has."""
    cut = copy.deepcopy(model)
    bp.prune_channels(cut, images[:1], target="macs=0.5", importance=evi.kernel_norm)
    left = cut[0].out_channels
    expected = next(row["accuracy"] for row in rows if (row["criterion"], row["kernels"]) == ("norm", left))
    found = accuracy(cut, images, labels)
    assert abs(found - expected) < 0.05, f"{found:.2f} % with {left} kernels, the table has {expected:.2f} %"


def rankings(model: nn.Module) -> dict[str, list[Tensor]]:
    """Kernels by criterion, the best first; the random criterion has several orders."""
    group = find_groups(model, torch.zeros(1, 1, 28, 28)).groups[0].group
    found = {"norm": [evi.kernel_norm(group).argsort(descending=True)]}
    if isinstance(model[0], bp.layers.VariationalLayer):
        scores = bp.SNRImportance()(group)
        assert scores is not None, "both layers are variational"
        found["snr"] = [scores.argsort(descending=True)]
    found["random"] = [torch.randperm(len(model[0].weight)) for _ in range(RANDOM_ORDERS)]
    return found


def run(dataset: str, name: str, seed: int, data: Data, settings: Settings) -> dict[str, Any]:
    """One network trained, its kernels removed at once, and, where it `compresses`, by the loop with retraining."""
    torch.manual_seed(seed)
    started, network = time.monotonic(), settings.networks[name]
    measured = data.validation if settings.validation else data.test
    model, steps_taken = build(network, settings), []
    result: dict[str, Any] = {"dataset": dataset, "network": name, "seed": seed}
    with tqdm(desc=f"{dataset}, {name}, seed {seed}", unit="step", dynamic_ncols=True) as progress:

        def training(candidate: nn.Module) -> None:
            steps = settings.retraining_steps if steps_taken else settings.steps
            lr = network.lr[dataset] / (10 if steps_taken else 1)
            steps_taken.append(steps)
            train(candidate, network, data, settings, lr, steps, progress)

        if not network.compresses:
            training(model)
        else:
            found = evi.self_compress(
                model,
                torch.zeros(1, 1, 28, 28),
                train=training,
                evaluate=lambda candidate: accuracy(candidate, *data.validation),
                tolerance=settings.tolerance,
                step=settings.step,
                min_step=settings.min_step,
            )
            result["loop"] = {
                "kernels": found.model[0].out_channels,
                "accuracy": round(accuracy(found.model, *measured), 2),
                "trials": [asdict(trial) for trial in found.trials],
                "gradient_evaluations": sum(steps_taken),
            }
    rows = removal(model, *measured)
    check_removal(model, rows, *measured)
    norms = model[0].weight.detach().flatten(1).norm(dim=1)
    return result | {
        "accuracy": round(accuracy(model, *measured), 2),
        "idle_kernels": int((norms < 0.01 * norms.max()).sum()),
        "gradient_evaluations": settings.steps,
        "rows": rows,
        "seconds": round(time.monotonic() - started),
    }


def table(runs: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The results as Markdown: means over seeds, with the seeds beside them."""
    seeds = ", ".join(str(seed) for seed in sorted({found["seed"] for found in runs}))
    measured = "the training set's last tenth (6,000 images)" if settings["validation"] else "10,000 test images"
    evaluations, batch = settings["steps"], settings["batch_size"]
    lines = [
        "# One layer of 100 kernels: eVI beside a plain network",
        "",
        "Written by `python tests/benchmarks/evi.py --table` from evi.json, the results of the same program.",
        "",
        "One convolution of 100 kernels 5x5 without bias, ReLU, 2x2 max-pooling, a classifier: 146,510 parameters.",
        f"Accuracy in percent on {measured} at the posterior means; mean over the seeds {seeds}, lowest and highest in",
        f"brackets. Every network was trained for {evaluations:,} gradient evaluations on batches of {batch}",
        f"({evaluations * batch:,} images in all), which is little; the paper's own runs are far longer.",
        "Criteria: norm is the Frobenius norm of the mean kernel (the paper's), snr `SNRImportance()`, random the mean",
        f"of {RANDOM_ORDERS} orders a seed. The L1 penalty is a control, since the Bayesian losses hold a penalty on",
        "the means, too.",
        "",
        *_cost(runs, settings),
        "![Accuracy against kernels left](evi.png)",
        "",
    ]
    for dataset, title in DATASETS.items():
        found = [result for result in runs if result["dataset"] == dataset]
        if found:
            lines += [f"## {title}", "", *_removed_at_once(found, settings), *_loops(found, settings)]
    rest = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "networks")
    rates = [
        f"- {network['label']}: learning rate "
        + ", ".join(f"{DATASETS[dataset]} {rate:g}" for dataset, rate in network["lr"].items())
        + (f"; L1 weight {network['l1']:g}" if network["l1"] else "")
        for network in settings["networks"].values()
    ]
    lines += [
        "## Settings",
        "",
        "Chosen on the training set's last tenth, one seed each: on MNIST the learning rates of the first Bayesian and",
        "of the plain network from 0.001, 0.003 and 0.01 by accuracy; on Fashion-MNIST that of the Bayesian one from",
        "0.003 and 0.01. The L1 weight, of 0.0001 and 0.0003, by accuracy on MNIST with 20 kernels left. Nothing else",
        "was tuned: the other networks have the rates of these.",
        "",
        *rates,
        "",
        f"All: {rest}.",
        "",
    ]
    return "\n".join(lines)


def _removed_at_once(runs: list[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    accuracies, idle, seconds = defaultdict(list), defaultdict(list), defaultdict(list)
    for found in runs:
        idle[found["network"]].append(found["idle_kernels"])
        seconds[found["network"]].append(found["seconds"])
        for row in found["rows"]:
            accuracies[found["network"], row["criterion"], row["kernels"]].append(row["accuracy"])
    lines = [
        "Kernels removed at once, no retraining: columns are kernels left.",
        "",
        "| network | criterion | " + " | ".join(str(left) for left in KERNELS_LEFT) + " |",
        "|---" * (2 + len(KERNELS_LEFT)) + "|",
    ]
    for name in (name for name in settings["networks"] if name in idle):
        for criterion in ("norm", "snr", "random"):
            if (name, criterion, KERNELS_LEFT[0]) in accuracies:
                cells = [_cell(accuracies[name, criterion, left]) for left in KERNELS_LEFT]
                lines.append(f"| {settings['networks'][name]['label']} | {criterion} | {' | '.join(cells)} |")
    shares = "; ".join(f"{settings['networks'][name]['label']} {counts}" for name, counts in idle.items())
    return [*lines, "", f"Kernels with a norm below 1 % of the largest, by seed: {shares}.", ""]


def _cost(runs: list[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    """Points of accuracy that removal costs, by criterion."""
    lines = [
        "Points of accuracy lost by removal without retraining, mean over seeds (seeds in brackets):",
        "",
        "| network | criterion | " + " | ".join(f"{t}: {n} left" for t in DATASETS.values() for n in COST_AT) + " |",
        "|---" * (2 + len(DATASETS) * len(COST_AT)) + "|",
    ]
    for name, network in settings["networks"].items():
        for criterion in ("norm", "snr"):
            cells = []
            for dataset in DATASETS:
                found = [
                    {row["kernels"]: row["accuracy"] for row in result["rows"] if row["criterion"] == criterion}
                    for result in runs
                    if (result["dataset"], result["network"]) == (dataset, name)
                ]
                lost = [[rows[KERNELS_LEFT[0]] - rows[left] for rows in found if rows] for left in COST_AT]
                cells += [f"{mean(values):.1f} ({len(values)})" if values else "-" for values in lost]
            if any(cell != "-" for cell in cells):
                lines.append(f"| {network['label']} | {criterion} | {' | '.join(cells)} |")
    return [*lines, ""]


def _loops(runs: list[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    found = defaultdict(list)
    for result in runs:
        if "loop" in result:
            found[result["network"]].append(result)
    if not found:
        return []
    lines = [
        f"Self-compression by norm, {settings['retraining_steps']} gradient evaluations of retraining after each cut:",
        f"the smallest network within {settings['tolerance']} points of its own validation accuracy, by seed.",
        "",
        "| network | accuracy before | kernels left | accuracy after | gradient evaluations in all |",
        "|---|---|---|---|---|",
    ]
    for name in (name for name in settings["networks"] if name in found):
        loops = [result["loop"] for result in found[name]]
        cells = [
            ", ".join(f"{result['accuracy']:.2f}" for result in found[name]),
            ", ".join(str(loop["kernels"]) for loop in loops),
            ", ".join(f"{loop['accuracy']:.2f}" for loop in loops),
            ", ".join(f"{loop['gradient_evaluations']:,}" for loop in loops),
        ]
        lines.append(f"| {settings['networks'][name]['label']} | {' | '.join(cells)} |")
    return [*lines, ""]


def plot(runs: list[dict[str, Any]], settings: dict[str, Any], out: Path) -> None:
    """Accuracy against kernels left, a panel for each data set, the range over seeds shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, len(DATASETS), sharey=True)
    names = list(settings["networks"])
    for axes, (dataset, title) in zip(panels, DATASETS.items(), strict=True):
        for index, name in enumerate(names):
            for criterion, style in (("norm", "-"), ("snr", "--"), ("random", ":")):
                if criterion == "snr" and not name.startswith("evi-spatial"):
                    continue
                if criterion == "random" and name not in ("plain", "evi-spatial-text"):
                    continue
                values = [
                    [row["accuracy"] for row in found["rows"] if row["criterion"] == criterion]
                    for found in runs
                    if (found["dataset"], found["network"]) == (dataset, name)
                ]
                if not values:
                    continue
                columns = list(zip(*values, strict=True))
                label = f"{settings['networks'][name]['label']}, {criterion}"
                axes.plot(KERNELS_LEFT, [mean(c) for c in columns], style, color=f"C{index}", label=label, marker=".")
                axes.fill_between(
                    KERNELS_LEFT, [min(c) for c in columns], [max(c) for c in columns], color=f"C{index}", alpha=0.12
                )
        axes.set(title=title, xscale="log", xlabel="kernels left, no retraining")
        axes.set_xticks(KERNELS_LEFT, [str(left) for left in KERNELS_LEFT], minor=False)
        axes.minorticks_off()
        axes.invert_xaxis()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy, %")
    panels[0].legend(fontsize=7, loc="lower left")
    figure.savefig(out, dpi=110)


def main() -> None:
    """Runs what the results file does not have yet, then writes the table and the plot."""
    parser = common.parser("Kernels left in the paper's network.", "docs/benchmarks/evi.json")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument("--validation", action="store_true", help="measure on the training set's last tenth")
    options = parser.parse_args()
    settings = Settings(validation=options.validation)
    runs = common.read(options.out, asdict(settings))
    if not options.table:
        if options.data_dir is None:
            parser.error("no data: give --data-dir or set BAYESPRUNE_DATA to the folder that holds MNIST/raw/*.gz")
        torch.set_num_threads(1)
        data = {dataset: load(options.data_dir, dataset) for dataset in options.datasets}
        done = {(found["dataset"], found["network"], found["seed"]) for found in runs}
        for seed in options.seeds:
            for dataset in options.datasets:
                for name in options.networks:
                    if (dataset, name, seed) not in done:
                        runs.append(run(dataset, name, seed, data[dataset], settings))
                        common.write(options.out, asdict(settings), runs)
    options.out.with_suffix(".md").write_text(table(runs, asdict(settings)), encoding="utf-8")
    plot(runs, asdict(settings), options.out.with_suffix(".png"))


def _chunks(images: Tensor, labels: Tensor) -> Any:
    return zip(images.split(250), labels.split(250), strict=True)


def _cell(values: list[float]) -> str:
    return f"{mean(values):.1f} ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else f"{values[0]:.1f}"


if __name__ == "__main__":
    main()
