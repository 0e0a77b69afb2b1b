"""MNIST, 784-300-100-10: error at few weights, chosen by SNR, by magnitude and at random, without and with retraining.

    python tests/benchmarks/mnist.py --data-dir DATA --out docs/benchmarks/mnist.json

DATA holds MNIST/raw/*.gz. Runs that the results file already has are not repeated; the table is written beside it as
Markdown. `--validation` holds the last tenth of the training set back and measures on it: where settings are chosen.
"""

import copy
import gzip
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import bayesprune as bp
from bayesprune.layers import Posterior
from bayesprune.prune.scores import magnitude, snr

FRACTIONS = (0.1, 0.05, 0.03, 0.02, 0.015, 0.01)
NETWORKS = ("variational", "deterministic")


@dataclass(frozen=True)
class Phase:
    """One training: the learning rate falls linearly to 0, the weight of the KL rises to `temperature`."""

    lr: float
    temperature: float = 1.0
    warmup_epochs: int = 0
    std_lr: float = 1e-3


@dataclass(frozen=True)
class Settings:
    """All that a run depends on beside its seed and network.

    Attributes:
        epochs: Length of the training from scratch.
        stage_epochs: Length of the retraining at each of FRACTIONS in turn. In its first half the weights go gradually
            (cubic schedule), scored anew at each of `prunings` cuts.
        validation: Whether the last tenth of the training set is held back, and measured instead of the test set.
    """

    epochs: int = 40
    scratch: Phase = Phase(lr=2e-3, warmup_epochs=10)
    stage_epochs: tuple[int, ...] = (2, 2, 3, 3, 4, 6)
    stage: Phase = Phase(lr=2e-3)
    prunings: int = 20
    batch_size: int = 128
    relative_std: float = 0.1
    validation: bool = False


@dataclass(frozen=True)
class Data:
    """Images (N, 784) in 0 to 1 and labels (N), all in memory."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(directory: Path, *, validation: bool) -> Data:
    """MNIST; with `validation` the last tenth of its training set stands in for the test set."""
    raw = directory / "MNIST" / "raw"

    def images(part: str) -> Tensor:
        return _read(raw / f"{part}-images-idx3-ubyte.gz", header=16).view(-1, 784).float() / 255

    def labels(part: str) -> Tensor:
        return _read(raw / f"{part}-labels-idx1-ubyte.gz", header=8).long()

    x, y = images("train"), labels("train")
    if validation:
        cut = len(y) * 9 // 10
        return Data(x[:cut], y[:cut], x[cut:], y[cut:])
    return Data(x, y, images("t10k"), labels("t10k"))


def run(network: str, seed: int, data: Data, settings: Settings) -> dict[str, Any]:
    """One network trained from scratch, then cut at once and, with retraining, in stages; all errors in percent."""
    torch.manual_seed(seed)
    started = time.monotonic()
    scores = {"magnitude": magnitude, "random": random}
    if network == "variational":
        at_once, staged, estimator = {"snr": snr, **scores}, {"snr": snr}, "auto"
    else:  # converted as well, so that the same code cuts it; the estimator "mean" trains it as if it were not
        at_once, staged, estimator = scores, scores, "mean"
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    bp.to_variational(model, relative_std=settings.relative_std, estimator=estimator)
    num_epochs = settings.epochs + len(staged) * sum(settings.stage_epochs)
    with tqdm(total=num_epochs, desc=f"{network}, seed {seed}", unit="epoch", dynamic_ncols=True) as progress:
        train(model, data, settings, settings.scratch, settings.epochs, progress)
        steps_per_epoch = len(data.labels) // settings.batch_size
        steps = settings.epochs * steps_per_epoch
        result: dict[str, Any] = {"network": network, "seed": seed, "error": error(model, data)}
        if network == "variational":
            result |= remove_below_one(model, data)
        rows = []
        for name, score in at_once.items():
            for fraction in FRACTIONS:
                cut = copy.deepcopy(model)
                bp.prune_weights(cut, sparsity=1 - fraction, score=score)
                rows.append(_row(name, fraction, error(cut, data), steps, retrained=False))
        progress.write(_line(rows))
        for name, score in staged.items():
            cut = copy.deepcopy(model)
            spent = steps
            for epochs, (before, fraction) in zip(settings.stage_epochs, pairwise((1.0, *FRACTIONS)), strict=True):
                retrain(cut, data, settings, epochs, before, fraction, score, progress)
                spent += epochs * steps_per_epoch
                rows.append(_row(name, fraction, error(cut, data), spent, retrained=True))
            progress.write(_line(rows[-len(FRACTIONS) :]))
    return result | {"rows": rows, "seconds": round(time.monotonic() - started)}


def train(
    model: nn.Module,
    data: Data,
    settings: Settings,
    phase: Phase,
    epochs: int,
    progress: tqdm,
    before_step: Callable[[int], None] | None = None,
) -> None:
    """Adam on shuffled batches; a network whose estimator is not "mean" is trained with its posteriors."""
    steps_per_epoch = len(data.labels) // settings.batch_size
    num_steps = epochs * steps_per_epoch
    means = [parameter for name, parameter in model.named_parameters() if not name.endswith("log_std")]
    optimizer = torch.optim.Adam(means, lr=phase.lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    if any(isinstance(module, bp.VariationalLayer) and module.estimator != "mean" for module in model.modules()):
        bp.attach(
            optimizer,
            model,
            num_data=len(data.labels),
            prior=bp.priors.ARD("weight"),
            temperature=phase.temperature,
            warmup_steps=phase.warmup_epochs * steps_per_epoch,
            std_lr=phase.std_lr,
        )
    model.train()
    for _ in range(epochs):
        batches = torch.randperm(len(data.labels)).split(settings.batch_size)[:steps_per_epoch]
        for chosen in batches:
            if before_step is not None:
                before_step(schedule.last_epoch)
            loss = F.cross_entropy(model(data.images[chosen]), data.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress.update()


def retrain(
    model: nn.Module,
    data: Data,
    settings: Settings,
    epochs: int,
    before: float,
    fraction: float,
    score: Callable[[Posterior], Tensor],
    progress: tqdm,
) -> None:
    """One stage: gradually from `before` of the weights to `fraction`, then on at that fraction."""
    every = epochs * (len(data.labels) // settings.batch_size) // (2 * settings.prunings)

    def cut(step: int) -> None:
        number, rest = divmod(step, every)
        if rest == 0 and number <= settings.prunings:
            kept = fraction + (before - fraction) * (1 - number / settings.prunings) ** 3
            bp.prune_weights(model, sparsity=1 - kept, score=score)

    train(model, data, settings, settings.stage, epochs, progress, cut)


def random(posterior: Posterior) -> Tensor:
    """A score that knows nothing; what was kept before is not drawn again, since removed weights stay removed."""
    return torch.rand_like(posterior.mean)


def remove_below_one(model: nn.Module, data: Data) -> dict[str, float]:
    """Share of the weights whose SNR is below 1, and the error without them."""
    cut = copy.deepcopy(model)
    report = bp.prune_weights(cut, snr_below=1)
    return {"share_below_1": report.sparsity, "error_below_1_removed": error(cut, data)}


@torch.no_grad()
def error(model: nn.Module, data: Data) -> float:
    """Percent of the test images (of the validation images) given another label, at the posterior means."""
    model.eval()
    return round(100 * float((model(data.test_images).argmax(1) != data.test_labels).double().mean()), 2)


def _read(path: Path, *, header: int) -> Tensor:
    with gzip.open(path) as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)[header:]


def _row(score: str, fraction: float, error_: float, steps: int, *, retrained: bool) -> dict[str, Any]:
    return {
        "score": score,
        "fraction": fraction,
        "retrained": retrained,
        "error": error_,
        "gradient_evaluations": steps,
    }


def table(runs: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The results as Markdown: every mean over seeds, with the seeds beside it."""
    seeds = ", ".join(str(seed) for seed in sorted({found["seed"] for found in runs}))
    measured = "the training set's last tenth (6,000 images)" if settings["validation"] else "10,000 test images"
    lines = [
        "# MNIST, 784-300-100-10",
        "",
        "Written by `python tests/benchmarks/mnist.py --table` from mnist.json, the results of the same program.",
        "",
        f"Error in percent on {measured} at the posterior means: mean over the seeds {seeds}, each in brackets.",
        "Columns: the share of the 266,200 weights that is kept. The 410 biases are never removed.",
        "",
        *_section("Cut once, no retraining", runs, retrained=False),
        *_section("With retraining, cut in stages from left to right", runs, retrained=True),
        "## Weights with an SNR below 1",
        "",
    ]
    for found in runs:
        if "share_below_1" in found:
            share, without = found["share_below_1"], found["error_below_1_removed"]
            lines.append(f"- seed {found['seed']}: {share:.2%} of the weights; error without them {without:.2f} %")
    values = ", ".join(f"{name} {value}" for name, value in settings.items())
    return "\n".join([*lines, "", f"Settings, chosen on the training set's last tenth: {values}.", ""])


def _section(title: str, runs: list[dict[str, Any]], *, retrained: bool) -> list[str]:
    errors, names, steps = defaultdict(list), {}, set()
    for found in runs:
        for row in found["rows"]:
            if row["retrained"] == retrained:
                name = f"{found['network']} | {row['score']}"
                names.setdefault(name, []).append(found["error"])
                errors[name, row["fraction"]].append(row["error"])
                steps.add(row["gradient_evaluations"])
    lines = [
        f"## {title}",
        "",
        f"Gradient evaluations from scratch, the same in every row: {', '.join(f'{n:,}' for n in sorted(steps))}.",
        "",
        "| network | score | all | " + " | ".join(f"{fraction:.1%}" for fraction in FRACTIONS) + " |",
        "|---" * (3 + len(FRACTIONS)) + "|",
    ]
    for name, whole in names.items():
        cells = [_cell(whole[:: len(FRACTIONS)]), *(_cell(errors[name, fraction]) for fraction in FRACTIONS)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    """Runs what the results file does not have yet, then writes the table."""
    parser = common.parser("MNIST at few weights.", "docs/benchmarks/mnist.json")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--validation", action="store_true", help="measure on the training set's last tenth")
    options = parser.parse_args()
    settings = Settings(validation=options.validation)
    runs = common.read(options.out, asdict(settings))
    if not options.table:
        if options.data_dir is None:
            parser.error("no data: give --data-dir or set BAYESPRUNE_DATA to the folder that holds MNIST/raw/*.gz")
        torch.set_num_threads(1)
        data = load(options.data_dir, validation=settings.validation)
        done = {(finished["seed"], finished["network"]) for finished in runs}
        for network in options.networks:
            for seed in options.seeds:
                if (seed, network) not in done:
                    runs.append(run(network, seed, data, settings))
                    common.write(options.out, asdict(settings), runs)
    options.out.with_suffix(".md").write_text(table(runs, asdict(settings)), encoding="utf-8")


def _cell(errors: list[float]) -> str:
    return f"{mean(errors):.2f} ({', '.join(f'{value:.2f}' for value in errors)})"


def _line(rows: list[dict[str, Any]]) -> str:
    cells = (f"{r['score'][:3]}{'+' if r['retrained'] else ''} {r['fraction']:.1%}: {r['error']:.2f}" for r in rows)
    return "  ".join(cells)


if __name__ == "__main__":
    main()
