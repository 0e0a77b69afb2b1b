"""One thing changed at a time: estimator, temperature, start and speed of the stds, prior scale, power, moving average.

The trained ResNet-20 with the loop of `criterion.py`, on its validation images: accuracy with 90 % of the weights
removed gradually, and with channels removed at once to half and to 0.4 of the MACs. One seed; a difference of a point
or two is within the noise of such runs.

    python tests/benchmarks/investigation.py --data-dir DATA [--float32] [--only AXIS ...]

Rows say the precision of their products; a processor without bfloat16 takes ten times as long with it.
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar_resnet import Images, trained_resnet20
from common import parser, read, write
from criterion import CHANNELS, WEIGHTS, chosen
from criterion_methods import BATCH, EXAMPLE, NUM_DATA, train
from torch import nn

import bayesprune as bp
from bayesprune.laplace import RunningLaplace
from bayesprune.prune import MeasuredImportance, PruneSchedule, SNRScore, recalibrate_batch_norm
from bayesprune.reports import accuracy

SETTINGS: dict[str, Any] = {
    "images": 2_000,
    "seed": 0,
    "weights": asdict(WEIGHTS["20"]),
    "channels": asdict(CHANNELS["20"]),
}


@dataclass(frozen=True)
class SearchStep:
    """How a network is trained and scored.

    Attributes:
        estimator: "laplace" trains plainly and reads the stds off the gradients; others train the stds with noise.
        allocation: Of the channels between layers: by the "score" itself, "uniform", or by "measured" losses.
        scope: What a fixed prior takes its scale from: each layer's root mean square ("layer"), or the whole model's.
    """

    estimator: str = "weight_sampling"
    std: str = "per_weight"
    temperature: float = 0.1
    relative_std: float = 0.1
    std_lr: float = 0.02
    scope: str = "layer"
    power: float = 2.0
    decay: float = 0.98
    recalibrated: bool = True
    allocation: str = "score"


NOISE, LAPLACE = SearchStep(), SearchStep(estimator="laplace", power=0.5)
WARM = SearchStep(temperature=10.0, relative_std=0.3, std_lr=0.05)
TRIALS: dict[str, list[SearchStep]] = {
    "Estimator": [
        NOISE,
        replace(NOISE, estimator="flipout"),
        replace(NOISE, estimator="local_reparameterization"),
        LAPLACE,
    ],
    "Structure of the stds": [replace(NOISE, std="rank_one"), replace(NOISE, std="per_channel")],
    "Power": [
        replace(NOISE, power=1.0),
        replace(NOISE, power=0.5),
        replace(NOISE, power=0.0),
        *(replace(LAPLACE, power=power) for power in (0.0, 1.0, 2.0)),
    ],
    "Temperature": [replace(NOISE, temperature=temperature) for temperature in (0.01, 1.0)],
    "Stds that come near their fixed point": [
        replace(NOISE, std_lr=0.05),
        WARM,
    ],
    "Where these start": [NOISE, LAPLACE],
    "Noise as large as what goes": [
        *(replace(WARM, std=std) for std in ("rank_one", "per_channel")),
        replace(WARM, std="rank_one", power=1.0),
        *(replace(WARM, std="rank_one", temperature=temperature) for temperature in (3.0, 30.0)),
    ],
    "Prior scale": [replace(NOISE, scope="model")],
    "Moving average": [replace(LAPLACE, decay=0.9), replace(LAPLACE, decay=0.995)],
    "Batch norm": [replace(LAPLACE, recalibrated=False)],
    "Channels between layers": [replace(LAPLACE, allocation=kind) for kind in ("uniform", "measured")],
}


@cache
def training_images(data_dir: Path) -> Images:
    """All but the last tenth of each class."""
    return Images(data_dir / "cifar10", "train", slice(0, -500))


def prepared(trial: SearchStep, dense: nn.Module) -> tuple[nn.Module, bp.priors.Prior]:
    """The converted network and its prior."""
    estimator = "mean" if trial.estimator == "laplace" else trial.estimator
    model = bp.to_variational(dense, std=trial.std, relative_std=trial.relative_std, estimator=estimator)
    if trial.scope == "layer":
        return model, bp.priors.Gaussian()
    posteriors = [posterior for posterior in bp.layers.named_posteriors(model) if posterior.is_weight]
    squares = sum(float(posterior.mean.detach().square().sum()) for posterior in posteriors)
    scale = (squares / sum(posterior.mean.numel() for posterior in posteriors)) ** 0.5
    with torch.no_grad():
        for posterior in posteriors:
            posterior.log_std_parts[0].fill_(torch.tensor(trial.relative_std * scale).log())
    return model, bp.priors.Gaussian(scale)


def trained(
    trial: SearchStep,
    data_dir: Path,
    batches: Iterator[Any],
    num_steps: int,
    lr: float,
    sparsity: float,
    precision: torch.dtype,
) -> nn.Module:
    """The network after a training in which this fraction of the weights goes, if it is above 0."""
    model, prior = prepared(trial, trained_resnet20(data_dir))
    laplace: RunningLaplace | None = None
    schedule = PruneSchedule(f"weights={1 - sparsity}", begin=0.1, end=0.7, num_updates=30) if sparsity else None

    def attach(optimizer: torch.optim.Optimizer) -> None:
        nonlocal laplace
        if trial.estimator == "laplace":
            laplace = RunningLaplace(
                optimizer, model, num_data=NUM_DATA, batch_size=BATCH, decay=trial.decay, prior=prior
            )
        else:
            bp.attach(
                optimizer,
                model,
                num_data=NUM_DATA,
                prior=prior,
                temperature=trial.temperature,
                std_lr=trial.std_lr,
                max_noise_cost=None,
            )

    def each_step(step: int) -> None:
        removal = schedule.removal_after(step, num_steps) if schedule else None
        if (removal is not None or step == num_steps) and laplace is not None:
            laplace.update()
        if removal is not None:
            bp.prune_weights(model, f"weights={1 - removal}", score=SNRScore(trial.power))

    train(model, batches, num_steps, lr, before=attach, each_step=each_step, precision=precision)
    return model


@cache
def both(trial: SearchStep, data_dir: Path, precision: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The network that lost nine tenths of its weights, and the one before channels go."""
    images, found = training_images(data_dir), []
    for budget, sparsity in ((WEIGHTS["20"], 0.9), (CHANNELS["20"], 0.0)):
        torch.manual_seed(0)
        num_steps = budget.before if sparsity == 0.0 else budget.total
        batches = images.random(num_steps, 0, augment=True)
        found.append(trained(trial, data_dir, batches, num_steps, budget.lr, sparsity, precision))
    weights, channels = found
    return weights, channels


def run(trial: SearchStep, data_dir: Path, held_out: list[Any], precision: torch.dtype) -> dict[str, float]:
    """Accuracies without single weights and without channels."""
    images = training_images(data_dir)

    def tested(model: nn.Module) -> float:
        if trial.recalibrated:
            recalibrate_batch_norm(model, images.random(20, 100, augment=True))
        return accuracy(model, held_out)

    of_training = replace(trial, recalibrated=True, allocation="score")
    weights, channels = copy.deepcopy(both(of_training, data_dir, precision))
    found = {"weights": tested(weights)}
    for macs in (0.5, 0.4):
        cut = copy.deepcopy(channels)
        importance: Any = bp.SNRImportance(trial.power)
        if trial.allocation == "measured":
            calibration = list(images.random(4, 7, augment=True))
            importance = MeasuredImportance(cut, EXAMPLE, partial(loss, calibration), importance=importance)
        uniform = trial.allocation == "uniform"
        bp.prune_channels(cut, EXAMPLE, target=f"macs={macs}", importance=importance, uniform=uniform)
        found[f"channels {macs}"] = tested(cut)
    return found


def loss(batches: list[Any], model: nn.Module) -> float:
    """Mean cross-entropy on these batches, at the statistics of batch norm that the model has."""
    return sum(float(F.cross_entropy(model(images), labels)) for images, labels in batches) / len(batches)


def main() -> None:
    """Runs what is missing, then prints the table in Markdown."""
    options = parser(__doc__ or "", "docs/benchmarks/investigation.json")
    options.add_argument("--float32", action="store_true", help="products in float32, not bfloat16")
    options.add_argument("--only", nargs="+", choices=[*TRIALS], default=[*TRIALS], help="these axes alone")
    args = options.parse_args()
    torch.set_num_threads(1)
    rows = read(args.out, SETTINGS)
    if not args.table:
        precision = torch.float32 if args.float32 else torch.bfloat16
        directory, name = Path(args.data_dir), str(precision).removeprefix("torch.")
        held_out = Images(directory / "cifar10", "train", slice(-500, None))
        batches = chosen(held_out, SETTINGS["images"], torch.Generator().manual_seed(0))
        for axis, trial in [(axis, trial) for axis, trials in TRIALS.items() if axis in args.only for trial in trials]:
            key = {"trial": asdict(trial), "precision": name}
            if all(row | key != row for row in rows):
                rows.append({"axis": axis} | key | run(trial, directory, batches, precision))
                write(args.out, SETTINGS, rows)
    print("| | | 90 % of the weights removed | half of the MACs, at once | 0.4, at once |\n|---|---|---|---|---|")
    for row in rows:
        base = asdict(LAPLACE if row["trial"]["estimator"] == "laplace" else NOISE)
        changed = [f"{key} {value}" for key, value in row["trial"].items() if value != base[key] and key != "estimator"]
        name = ", ".join([row["trial"]["estimator"].replace("_", " "), *changed]).replace("_", " ")
        name += "" if row["precision"] == "bfloat16" else f" ({row['precision']})"
        cells = [f"{100 * row[key]:.1f}" for key in ("weights", "channels 0.5", "channels 0.4")]
        print(f"| {row['axis']} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
