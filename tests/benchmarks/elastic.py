"""One file, ten sizes: a trained CIFAR-10 ResNet-20 with levels of MACs and of single weights, and nets cut one by one.

    python tests/benchmarks/elastic.py --data-dir DATA --work WORK
    python tests/benchmarks/elastic.py --table

DATA holds cifar10 and weights (see `cifar_resnet.py`). Nothing is trained. Every net of a seed is made from the same
1,024 training images. Saved directories are kept in WORK; rows that docs/benchmarks/elastic.json has are not repeated.
"""

import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import common
import torch
from cifar_resnet import Images, ResNet20, trained_resnet20
from elastic_picture import draw
from elastic_table import SINGLE, page
from torch import nn

import bayesprune as bp

EXAMPLE = torch.zeros(1, 3, 32, 32)
TARGETS = tuple(f"macs={share}" for share in (0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4))
WEIGHTS = tuple(f"weights={share}" for share in (0.5, 0.3, 0.2, 0.1))
BATCHES = 16
WAYS = {"levels": {}, "levels, means as they are": {"fit": False}, SINGLE: {}}
SEPARATE = "cut one by one"
SETTINGS = {
    "targets": list(TARGETS),
    "weights": list(WEIGHTS),
    "calibration": 64 * BATCHES,
    "test": "the first 500 test images of each class",
}


@torch.no_grad()
def accuracy(model: nn.Module, test: Images) -> float:
    """Percent of the test images given their label."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test.batches())
    return round(100 * right / len(test.labels), 2)


def sizes(directory: Path) -> dict[str, int]:
    """Bytes of each file."""
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir())}


def level_bytes(directory: Path, target: str | None) -> int:
    """What the tensors of a level take in a file of their own, coded as the directory is."""
    found = json.loads((directory / "bayesprune.json").read_text(encoding="utf-8"))["levels"]
    return found["bytes"] if target is None else found["levels"][target]


def load(directory: Path, target: str | None) -> tuple[nn.Module, float]:
    """A level, and the seconds of a core that it took: the median of five loads."""
    seconds = []
    model: nn.Module = ResNet20()
    for _ in range(5):
        model = ResNet20()
        start = time.process_time()
        model = bp.load(directory, target, model=model)
        seconds.append(time.process_time() - start)
    return model, round(statistics.median(seconds), 3)


class Bench:
    """The rows of the results file."""

    def __init__(self, options: Any) -> None:
        self.out, self.work = options.out, options.work
        self.rows = common.read(options.out, SETTINGS)
        self.data_dir = Path(options.data_dir)
        self.train = Images(self.data_dir / "cifar10", "train", slice(0, 4500))
        self.test = Images(self.data_dir / "cifar10", "test", slice(0, 500))
        self.dense = trained_resnet20(self.data_dir).eval()

    def has(self, **key: Any) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        common.write(self.out, SETTINGS, self.rows)
        self.out.with_suffix(".md").write_text(page(self.rows), encoding="utf-8")
        print(time.strftime("%H:%M:%S"), row, flush=True)

    def saved(self, way: str, seed: int, batches: list[Any]) -> Path:
        """The directory with all levels of a way."""
        directory = self.work / f"{way.replace(', ', '-').replace(' ', '-')}-{seed}"
        if not directory.exists():
            start = time.process_time()
            targets = WEIGHTS if way == SINGLE else TARGETS
            made = bp.elastic.levels(self.dense, EXAMPLE, targets, data=batches, **WAYS[way])
            seconds = round(time.process_time() - start)
            for coding in (None, "entropy"):
                place = directory.with_name(f"{directory.name}-{coding}")
                bp.save(self.dense, place, levels=made, coding=coding)
                row = {"seed": seed, "way": way, "target": "file", "coding": coding}
                self.add(row | {"sizes": sizes(place), "cpu_seconds": seconds})
            place.rename(directory)
        return directory

    def run(self, seed: int) -> None:
        """All rows of a seed."""
        torch.manual_seed(seed)
        batches = list(self.train.random(BATCHES, seed, augment=False))
        if not self.has(seed=seed, way="dense"):
            self.add({"seed": seed, "way": "dense", "target": "macs=1", "accuracy": accuracy(self.dense, self.test)})
        for way in (next(iter(WAYS)), SEPARATE, *list(WAYS)[1:]):
            for target in WEIGHTS if way == SINGLE else TARGETS:
                if not self.has(seed=seed, way=way, target=target):
                    self.add({"seed": seed, "way": way, "target": target} | self.measured(way, target, seed, batches))

    def measured(self, way: str, target: str, seed: int, batches: list[Any]) -> dict[str, Any]:
        """The accuracy of a net, its size, and what it took."""
        if way == SEPARATE:
            start = time.process_time()
            model: nn.Module = bp.to_variational(copy.deepcopy(self.dense))
            bp.prune_channels(model, EXAMPLE, target, data=batches)
            model = bp.to_deterministic(model).eval()
            took = {"cpu_seconds": round(time.process_time() - start)}
        else:
            directory = self.saved(way, seed, batches)
            model, seconds = load(directory, target)
            took = {"load_cpu_seconds": seconds, "bytes": level_bytes(directory, target)}
        return {"accuracy": accuracy(model, self.test), "params": sum(p.numel() for p in model.parameters())} | took


def main() -> None:
    """Runs what the results file does not have yet, then writes the page."""
    parser = common.parser("Levels of one file beside separate nets.", "docs/benchmarks/elastic.json")
    parser.add_argument("--work", type=Path, default=Path("work-elastic"), help="folder for saved directories")
    options = parser.parse_args()
    if options.table:
        rows = common.read(options.out, SETTINGS)
        options.out.with_suffix(".md").write_text(page(rows), encoding="utf-8")
        draw(rows, options.out.with_suffix(".png"))
        return
    if options.data_dir is None:
        parser.error("no data: give --data-dir or set BAYESPRUNE_DATA to the folder that holds cifar10 and weights")
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    for seed in options.seeds:
        bench.run(seed)


if __name__ == "__main__":
    main()
