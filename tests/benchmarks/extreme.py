"""Extreme sparsity on MNIST and Fashion-MNIST: networks that keep 5 to 0.15 % of their weights.

Every row starts from the same dense network of its seed and has as many gradients of as many images. Each method goes
to one level straight away: the share of the weights falls geometrically until three fifths of the training, and what is
left trains on. The learning rate, and what else a method has to choose, is chosen on the last tenth of the training
images with seed 0, among as many settings for each: at 1 % for all levels above the smallest, which has its own choice.
Rows of LeNet-5 train under autocast to bfloat16, which halves their time where the processor has it. Finished rows are
skipped when the program runs again.

    python tests/benchmarks/extreme.py --data-dir DATA --work WORK --only "MNIST LeNet-300-100" --levels 0.15
    python tests/benchmarks/extreme.py --table

The page and its picture, which needs matplotlib, are written from the results file at the end, and by --table.
DATA holds MNIST/raw/*.gz and FashionMNIST/raw/*.gz; WORK keeps the dense networks.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attentive import attentive_score
from common import keep, parser, read, spread, write
from mnist import load
from mnist_methods import (
    BATCH,
    Data,
    Network,
    Phase,
    Score,
    keep_weights,
    lenet5,
    mlp,
    network,
    num_kept,
    train,
    weight_score,
)
from torch import Tensor, nn

import bayesprune as bp
from bayesprune import gates
from bayesprune.gates.density import REACHED

Row = dict[str, Any]
NETS = {"LeNet-300-100": mlp, "LeNet-5": lenet5}
TASKS = {f"{data} {net}": (data, net) for data in ("MNIST", "FashionMNIST") for net in NETS}
LEVELS = (5.0, 2.0, 1.0, 0.4, 0.15)
"""Percent of the weights that are kept."""
CHOICE = 1.0
"""The level at which settings are chosen for all but the smallest."""
EPOCHS = {"LeNet-300-100": 34, "LeNet-5": 10}
DENSE = {"LeNet-300-100": Phase(6, 2e-3), "LeNet-5": Phase(2, 2e-3)}
NUM_CUTS = 100
NUM_ATTENTIVE_CUTS = 20  # each takes passes of its own
SETTINGS = {"epochs": EPOCHS, "batch": BATCH, "cuts": NUM_CUTS}


@dataclass(frozen=True)
class Way:
    """A method with what was chosen for it; `strength` is the gates' learning rate, or the weight of a penalty."""

    method: str
    lr: float
    strength: float = 0.0


def ways(method: str) -> list[Way]:
    """The settings to choose from, six for each method."""
    if method in ("magnitude", "OBD", "attentive"):
        return [Way(method, lr) for lr in (1e-3, 2e-3, 4e-3, 8e-3, 1.2e-2, 1.6e-2)]
    strengths = {"gates": (2e-3, 1e-2), "L1 mask": (1e-4, 4e-4), "posterior": (0.03, 0.3)}[method]
    lrs = (4e-3, 8e-3, 1.6e-2) if method == "gates" else (2e-3, 4e-3, 8e-3)
    return [Way(method, lr, strength) for lr in lrs for strength in strengths]


METHODS = ("gates", "posterior", "L1 mask", "magnitude", "OBD", "attentive")


def cut_as_it_falls(net: Network, data: Data, level: float, score: Score | None) -> Callable[[float], None]:
    """Removes weights as the training goes on, until so many percent are left; by attention where no score is given."""

    def cut(done: float) -> None:
        share = (level / 100) ** min(1.0, done / REACHED)
        count = max(1, round(share * net.total))
        if count < num_kept(net):
            keep_weights(net, count, attentive_score(net, data) if score is None else score)

    return cut


def by_score(way: Way, start: dict[str, Tensor], data: Data, task: tuple[str, str], level: float) -> nn.Module:
    """Magnitude, OBD and attention of a plain network, the SNR of one with posteriors."""
    has_posterior = way.method == "posterior"
    net = network(NETS[task[1]](), prior=bp.priors.ARD("weight") if has_posterior else None)
    net.model.load_state_dict(start, strict=False)
    name = {"OBD": "obd"}.get(way.method, way.method)
    net.observes = name == "obd"
    phase = Phase(EPOCHS[task[1]], way.lr, temperature=way.strength or 1.0, ramp=0.2, std_lr=5e-3)
    is_attentive = name == "attentive"
    score = None if is_attentive else weight_score(name, net, by_units=False)
    cut = cut_as_it_falls(net, data, level, score)
    train(net, data, phase, cut=cut, cuts=NUM_ATTENTIVE_CUTS if is_attentive else NUM_CUTS)
    return net.model


def by_gates(way: Way, start: dict[str, Tensor], data: Data, task: tuple[str, str], level: float) -> nn.Module:
    """Gates held to the level."""
    model = bp.to_variational(NETS[task[1]](), estimator="mean")
    model.load_state_dict(start, strict=False)
    gates.add_weight_gates(model, f"weights={level / 100}", lr=way.strength)
    loop(model, data, task, way, attach=True)
    return gates.close(model)


class Masked(nn.Module):
    """The parametrization w m of ESPN, with a real mask."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.ones_like(like))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def by_l1_mask(way: Way, start: dict[str, Tensor], data: Data, task: tuple[str, str], level: float) -> nn.Module:
    """ESPN (2021): an L1 penalty on real masks until few enough are above 0.01, then the largest of them."""
    model = NETS[task[1]]()
    model.load_state_dict({name: value for name, value in start.items() if "log_std" not in name})
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for layer in layers:
        nn.utils.parametrize.register_parametrization(layer, "weight", Masked(layer.weight))
    masks: list[Tensor] = [layer.parametrizations["weight"][0].mask for layer in layers]  # type: ignore[index]
    total = sum(mask.numel() for mask in masks)
    fixed: list[Tensor] = []

    @torch.no_grad()
    def before_step(done: float) -> None:
        if not fixed:
            few = sum(int((mask.abs() > 0.01).sum()) for mask in masks) <= total * level / 100
            if few or done >= REACHED:
                flat = torch.cat([mask.abs().flatten() for mask in masks])
                edge = flat.topk(max(1, round(total * level / 100))).values[-1]
                fixed.extend((mask.abs() >= edge).to(mask) for mask in masks)
            else:
                for mask in masks:
                    mask.grad.add_(mask.sign(), alpha=way.strength)  # type: ignore[union-attr]
        for mask, kept in zip(masks, fixed, strict=False):
            mask.mul_(kept)
            mask.grad.mul_(kept)  # type: ignore[union-attr]

    loop(model, data, task, way, before_step=before_step)
    for layer, kept in zip(layers, fixed, strict=True):
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
        layer.weight.data.mul_(kept)
    return model


def loop(
    model: nn.Module,
    data: Data,
    task: tuple[str, str],
    way: Way,
    *,
    attach: bool = False,
    before_step: Callable[[float], None] | None = None,
) -> None:
    """Adam, the learning rate falling linearly to 0, on the same images as the other rows."""
    per_epoch = len(data.labels) // BATCH
    num_steps = EPOCHS[task[1]] * per_epoch
    means = [p for name, p in model.named_parameters() if "log_std" not in name and "gate" not in name]
    optimizer = torch.optim.Adam(means, way.lr)
    if attach:
        bp.attach(
            optimizer, model, num_data=len(data.labels), num_steps=num_steps, temperature=0.0, max_noise_cost=None
        )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
    model.train()
    orders = (torch.randperm(len(data.labels)).split(BATCH)[:per_epoch] for _ in range(EPOCHS[task[1]]))
    for step, chosen in enumerate(chosen for order in orders for chosen in order):
        optimizer.zero_grad()
        F.cross_entropy(model(shaped(data.images[chosen], task)), data.labels[chosen]).backward()
        if before_step is not None:
            before_step(step / num_steps)
        optimizer.step()
        schedule.step()


def shaped(images: Tensor, task: tuple[str, str]) -> Tensor:
    return images.flatten(1) if task[1] == "LeNet-300-100" else images.unsqueeze(1)


@torch.no_grad()
def error(model: nn.Module, data: Data, task: tuple[str, str]) -> float:
    """Percent of the held-out images given another label."""
    outputs = [model.eval()(shaped(images, task)) for images in data.test_images.split(1000)]
    return round(100 * float((torch.cat(outputs).argmax(1) != data.test_labels).double().mean()), 3)


class Benchmark:
    """Rows of the results file, and what they start from."""

    def __init__(self, out: Path, work: Path, data_dir: Path) -> None:
        self.out, self.work, self.data_dir = out, work, data_dir
        self.work.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, seed: int, data: Data, *, validation: bool) -> dict[str, Tensor]:
        """The dense network of a seed."""
        path = self.work / f"{name.replace(' ', '-')}-{seed}-{validation}.pt"
        if not path.exists():
            torch.manual_seed(seed)
            net = network(NETS[TASKS[name][1]](), prior=None)
            train(net, data, DENSE[TASKS[name][1]])
            keep({k: v for k, v in net.model.state_dict().items() if "log_std" not in k}, path)
        return torch.load(path, weights_only=True)

    def add(self, name: str, way: Way, level: float, seed: int, *, validation: bool) -> Row:
        """One row, made where it is not there."""
        key: Row = {"task": name, "level": level, "seed": seed, "validation": validation, **asdict(way)}
        rows = read(self.out, SETTINGS)
        for row in rows:
            if key.items() <= row.items():
                return row
        data, task = load(self.data_dir, TASKS[name][0], validation=validation), TASKS[name]
        start = self.start(name, seed, data, validation=validation)
        begin = time.perf_counter()
        torch.manual_seed(seed)
        make = {"gates": by_gates, "L1 mask": by_l1_mask}.get(way.method, by_score)
        # without a cache, which would keep the first step's weights until the end
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=task[1] == "LeNet-5", cache_enabled=False):
            model = make(way, copy.deepcopy(start), data, task, level)
        found = {"error": error(model, data, task), **kept(model), "seconds": round(time.perf_counter() - begin)}
        if TASKS[name][1] == "LeNet-300-100" and not validation and (way.method, level) == ("gates", min(LEVELS)):
            found["readers"] = readers(model.state_dict())
            found["dense_magnitude"] = magnitude(start)
        write(self.out, SETTINGS, [*read(self.out, SETTINGS), key | found])
        shown = {name: value for name, value in found.items() if not isinstance(value, list)}
        print(time.strftime("%H:%M:%S"), key | shown, flush=True)
        return key | found

    def run(self, name: str, level: float, methods: list[str], seeds: list[int]) -> None:
        """Chooses on validation images, and tests."""
        for method in methods:
            if method == "attentive" and TASKS[name][1] != "LeNet-300-100":
                continue
            at = choice_level(level)
            tried = [self.add(name, way, at, 0, validation=True) for way in ways(method)]
            best = min(tried, key=lambda row: row["error"])
            for seed in seeds:
                self.add(name, Way(method, best["lr"], best["strength"]), level, seed, validation=False)


def choice_level(level: float) -> float:
    """The level at which the settings for this one are chosen."""
    return level if level == min(LEVELS) else CHOICE


def kept(model: nn.Module) -> Row:
    """How many weights are left, and how many pixels are read."""
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    found: Row = {"kept": sum(int((weight != 0).sum()) for weight in weights)}
    if weights[0].dim() == 2:
        found["pixels"] = int((weights[0] != 0).any(0).sum())
    return found


def readers(state: dict[str, Tensor]) -> list[int]:
    """How many weights that are left read each pixel."""
    return next(value for value in state.values() if value.shape[1:] == (784,)).ne(0).sum(0).tolist()


def magnitude(state: dict[str, Tensor]) -> list[float]:
    """Mean |weight| of each pixel."""
    weight = next(value for value in state.values() if value.shape[1:] == (784,))
    return [round(float(value), 4) for value in weight.abs().mean(0)]


def picture(rows: list[Row], out: Path) -> bool:
    """Draws how many weights read each pixel, of the gates' smallest network, at the seed of median error."""
    found = [row for row in rows if row["method"] == "gates" and "readers" in row]
    if not found:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    task, level = min(((row["task"], row["level"]) for row in found), key=lambda key: (key[1], key[0][0] != "M"))
    same = sorted((row for row in found if (row["task"], row["level"]) == (task, level)), key=lambda row: row["error"])
    row = same[len(same) // 2]
    counts, dense = (torch.tensor(row[name]).view(28, 28) for name in ("readers", "dense_magnitude"))
    figure, axes = pyplot.subplots(1, 2, figsize=(7.2, 3.7), layout="constrained")
    said = f"{int(counts.sum())} weights read {int((counts > 0).sum())} of 784 pixels"
    said += f"\n({row['kept']} of 266,200 weights left, {row['error']:.1f} % wrong)"
    titles = {said: counts, "the dense network:\nmean |weight| of each pixel": dense}
    for axis, (title, values) in zip(axes, titles.items(), strict=True):
        image = axis.imshow(values, cmap="Blues", vmin=0)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
        figure.colorbar(image, ax=axis, shrink=0.85, ticks=MaxNLocator(5, integer=values is counts))
    figure.savefig(out, dpi=150)
    pyplot.close(figure)
    return True


def page(rows: list[Row], *, has_picture: bool = False) -> str:
    """The page of the documentation."""
    lines = ["# Extreme sparsity", "", *(__doc__ or "").strip().splitlines(), ""]
    lines.append("Error in percent on the 10,000 test images, mean over the seeds (how many, where it is not three).")
    for name in TASKS:
        of_task = [row for row in rows if row["task"] == name and not row["validation"]]
        levels = [level for level in LEVELS if any(row["level"] == level for row in of_task)]
        if not levels:
            continue
        lines += ["", f"## {name}", "", "| | " + " | ".join(f"{level:g} % kept" for level in levels) + " |"]
        lines.append("|---" * (len(levels) + 1) + "|")
        for method in METHODS:
            cells = [cell(chosen(rows, name, method, level)) for level in levels]
            if any(cells):
                lines.append(f"| {'**gates**' if method == 'gates' else method} | " + " | ".join(cells) + " |")
    if has_picture:
        lines += ["", "How many of the weights that are left read each pixel, gates at the smallest level:", ""]
        lines.append("![Pixels read by the weights that are left, beside the dense network](extreme_pixels.png)")
    return "\n".join(lines) + "\n"


def chosen(rows: list[Row], name: str, method: str, level: float) -> list[Row]:
    """The test rows of a method, as it was best on validation images."""
    its = [row for row in rows if (row["task"], row["method"]) == (name, method)]
    tried = [row for row in its if row["validation"] and row["level"] == choice_level(level)]
    best = min(tried, key=lambda row: row["error"], default=None)
    if best is None:
        return []
    key: Row = {"level": level, "validation": False, "lr": best["lr"], "strength": best["strength"]}
    return [row for row in its if key.items() <= row.items()]


def cell(rows: list[Row]) -> str:
    """Mean error, its standard error, and the seeds where they are not three."""
    if not rows:
        return ""
    return spread([row["error"] for row in rows], 2, of_mean=True) + ("" if len(rows) == 3 else f" ({len(rows)})")


def main() -> None:
    """Runs what is missing, or writes the page."""
    options = parser(__doc__ or "", "docs/benchmarks/extreme.json")
    options.add_argument("--work", type=Path, default=Path("work"))
    options.add_argument("--only", choices=TASKS, nargs="+", default=list(TASKS))
    options.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    options.add_argument("--levels", type=float, nargs="+", default=list(LEVELS))
    args = options.parse_args()
    torch.set_num_threads(1)
    if not args.table:
        benchmark = Benchmark(args.out, args.work, Path(args.data_dir))
        for name in args.only:
            for level in args.levels:
                benchmark.run(name, level, args.methods, args.seeds)
    rows = read(args.out, SETTINGS)
    has_picture = picture(rows, args.out.with_name("extreme_pixels.png"))
    args.out.with_suffix(".md").write_text(page(rows, has_picture=has_picture), encoding="utf-8")


if __name__ == "__main__":
    main()
