"""Fashion-MNIST, a small CNN: calibration of one pass with moments beside the plain network and 20 weight samples.

    python tests/benchmarks/calibration.py --data-dir DATA --out docs/benchmarks/calibration.json

DATA holds FashionMNIST/raw/*.gz and, as images of another kind, MNIST/raw/*.gz. Runs that the results file already has
are not repeated; the table is written beside it. `--validation` measures on the last tenth of the
training set.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import common
import torch
import torch.nn.functional as F
from evi import load
from torch import Tensor, nn
from tqdm import tqdm

import bayesprune as bp
from bayesprune.moments import settings as moment_settings
from bayesprune.prediction.predict import Classification, classify

METHODS = {
    "plain": "plain network",
    "mean": "variational, at the means",
    "moments": "variational, moments (shared covariance)",
    "moments-diagonal": "variational, moments (diagonal)",
    "samples": "variational, 20 samples",
}
MEASURES = {
    "accuracy": "accuracy, %",
    "nll": "NLL, nats",
    "ece": "ECE, %",
    "auroc_entropy": "AUROC, entropy, %",
    "auroc_information": "AUROC, mutual information, %",
    "seconds": "seconds for 10,000 images",
}


@dataclass(frozen=True)
class Settings:
    """All that a run depends on beside its seed.

    Attributes:
        steps: Cross-entropy steps that both networks share.
        more_steps: What follows: more of the same for the plain network, training with posteriors for the other.
        temperature: Of the KL.
        std_lr: Learning rate of the log stds.
        num_others: Number of images of the other kind.
        bins: Equal bins of confidence that the calibration error is taken over.
    """

    batch_size: int = 64
    steps: int = 1000
    more_steps: int = 1000
    lr: float = 2e-3
    std: str = "per_weight"
    temperature: float = 1.0
    std_lr: float = 1e-2
    num_samples: int = 20
    bins: int = 15
    num_others: int = 2500
    validation: bool = False


def build() -> nn.Sequential:
    """Two convolutions with pooling, two linear layers: 105,866 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 49, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(model: nn.Module, split: tuple[Tensor, Tensor], steps: int, settings: Settings, progress: tqdm) -> None:
    """Adam with cross-entropy, the learning rate falling linearly to 0; posteriors are trained where there are some."""
    images, labels = split
    means = [parameter for name, parameter in model.named_parameters() if not name.endswith("log_std")]
    optimizer = torch.optim.Adam(means, lr=settings.lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    if any(isinstance(module, bp.layers.VariationalLayer) for module in model.modules()):
        bp.attach(optimizer, model, num_data=len(labels), temperature=settings.temperature, std_lr=settings.std_lr)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(labels), (settings.batch_size,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
        progress.update()


def run(seed: int, data: Any, others: Tensor, settings: Settings) -> dict[str, Any]:
    """Both networks trained from one start, and every method measured."""
    torch.manual_seed(seed)
    model = build()
    images, labels = data.validation if settings.validation else data.test
    with tqdm(desc=f"seed {seed}", unit="step", dynamic_ncols=True) as progress:
        train(model, data.train, settings.steps, settings, progress)
        plain = build()
        plain.load_state_dict(model.state_dict())
        train(plain, data.train, settings.more_steps, settings, progress)
        bp.to_variational(model, std=settings.std)
        train(model, data.train, settings.more_steps, settings, progress)
    rows = []
    for method in METHODS:
        predictor = _predictor(plain.eval() if method == "plain" else model.eval(), method, settings)
        started = time.monotonic()
        inside = _predict(predictor, images)
        seconds = time.monotonic() - started
        outside = _predict(predictor, others)
        rows.append(
            {
                "method": method,
                "accuracy": 100 * float((inside.probabilities.argmax(1) == labels).double().mean()),
                "nll": float(F.nll_loss(inside.probabilities.clamp_min(1e-12).log(), labels)),
                "ece": 100 * calibration_error(inside.probabilities, labels, settings.bins),
                "auroc_entropy": 100 * auroc(inside.predictive_entropy, outside.predictive_entropy),
                "auroc_information": 100 * auroc(inside.mutual_information, outside.mutual_information),
                "seconds": 10_000 * seconds / len(images),
            }
        )
    return {"seed": seed, "rows": [{k: v if k == "method" else round(v, 4) for k, v in row.items()} for row in rows]}


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over bins of confidence, by their size."""
    confidence, predicted = probabilities.double().max(1)
    index = (confidence * bins).long().clamp_max(bins - 1)
    gap = confidence - (predicted == labels).double()
    return float(torch.zeros(bins, dtype=torch.float64).index_add_(0, index, gap).abs().sum() / len(labels))


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that an image from outside scores higher than one from inside, ties counting half."""
    ranked = inside.sort().values
    below = torch.searchsorted(ranked, outside) + torch.searchsorted(ranked, outside, right=True)
    return float(below.double().mean() / (2 * len(ranked)))


def _predictor(model: nn.Module, method: str, settings: Settings) -> Callable[[Tensor], Classification]:
    if method in ("plain", "mean"):
        return lambda x: classify([model(x)])
    if method == "samples":
        return lambda x: bp.predict(model, x, num_samples=settings.num_samples).classify()

    def moments(x: Tensor) -> Classification:
        with moment_settings(covariance="diagonal" if method == "moments-diagonal" else "shared"):
            return bp.predict(model, x, method="moments").classify()

    return moments


@torch.no_grad()
def _predict(predictor: Callable[[Tensor], Classification], images: Tensor) -> Classification:
    found = [predictor(x) for x in images.split(250)]
    return Classification(*(torch.cat(values) for values in zip(*found, strict=True)))


def table(runs: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The results as Markdown: means over seeds, lowest and highest in brackets."""
    seeds = ", ".join(str(found["seed"]) for found in runs)
    measured = "the training set's last tenth" if settings["validation"] else "10,000 test images"
    values = defaultdict(list)
    for found in runs:
        for row in found["rows"]:
            for measure in MEASURES:
                values[row["method"], measure].append(row[measure])
    lines = [
        "# Calibration on Fashion-MNIST",
        "",
        "Written by `python tests/benchmarks/calibration.py --table` from calibration.json, the results of the same",
        "program.",
        "",
        f"A CNN of 105,866 parameters, measured on {measured} of Fashion-MNIST; images of another kind are MNIST's",
        f"first {settings['num_others']:,} test images. Mean over the seeds {seeds}, lowest and highest in brackets.",
        f"ECE over {settings['bins']} bins. AUROC: how well the score tells MNIST from Fashion-MNIST, 50 % is chance;",
        "without draws there is no mutual information. Moments give probabilities by 256 draws of the logits, taken as",
        "independent Gaussians. Seconds are those of one thread of a machine that had other work, good for comparing",
        "within a seed. Feature maps are flattened here, where covariance shared by positions ends: both covariances",
        "give the same.",
        "",
        "| predictions | " + " | ".join(MEASURES.values()) + " |",
        "|---" * (1 + len(MEASURES)) + "|",
    ]
    for method, label in METHODS.items():
        cells = []
        for measure in MEASURES:
            if measure == "auroc_information" and method in ("plain", "mean"):
                cells.append("-")
                continue
            digits = 3 if measure == "nll" else 2 if measure == "ece" else 1
            found = values[method, measure]
            cells.append(f"{mean(found):.{digits}f} ({min(found):.{digits}f}-{max(found):.{digits}f})")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items())
    lines += [
        "",
        "The network and its learning rate are the best of three tried on validation images. The rest was not tuned:",
        f'{chosen}; prior Gaussian("layer_rms").',
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs what the results file does not have yet, then writes the table."""
    parser = common.parser("Calibration on Fashion-MNIST.", "docs/benchmarks/calibration.json")
    parser.add_argument("--validation", action="store_true", help="measure on the training set's last tenth")
    options = parser.parse_args()
    settings = Settings(validation=options.validation)
    runs = common.read(options.out, asdict(settings))
    if not options.table:
        if options.data_dir is None:
            parser.error("no data: give --data-dir or set BAYESPRUNE_DATA to the folder of the data sets")
        torch.set_num_threads(1)
        data, others = (
            load(options.data_dir, "FashionMNIST"),
            load(options.data_dir, "MNIST").test[0][: settings.num_others],
        )
        done = {found["seed"] for found in runs}
        for seed in options.seeds:
            if seed not in done:
                runs.append(run(seed, data, others, settings))
                common.write(options.out, asdict(settings), runs)
    options.out.with_suffix(".md").write_text(table(runs, asdict(settings)), encoding="utf-8")


if __name__ == "__main__":
    main()
