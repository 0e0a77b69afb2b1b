"""A trained CIFAR-10 ResNet-20 cut to half its MACs: SNR beside magnitude, Taylor and random scores at equal cost.

Every row has the same budget of gradient evaluations: fine-tuning (variational or plain), removal of channels, plain
fine-tuning; the gradients that a Taylor score needs are taken off the second fine-tuning. Settings are chosen on the
last 10 % of each class of the training images, with one seed, and never on the test images. Each finished row is
written at once and skipped when the program runs again; `--work` keeps the networks before removal, which rows share.

    python tests/benchmarks/cifar.py --data-dir DATA --out docs/benchmarks/cifar.json
    python tests/benchmarks/cifar.py --table --out docs/benchmarks/cifar.json
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
import torch_pruning as tp
from cifar_resnet import BATCH, Block, Images, ResNet20, trained_resnet20
from cifar_table import markdown
from torch import nn
from tqdm import tqdm

import bayesprune as bp
from bayesprune.prune import recalibrate_batch_norm
from bayesprune.reports import accuracy, count_macs, count_parameters

NUM_TRAIN, NUM_VALIDATION_PER_CLASS = 45_000, 500
TAYLOR_BATCHES = 10
CALIBRATION_BATCHES = 40
MACS_KEPT = 0.5
EXAMPLE = torch.zeros(1, 3, 32, 32)


@dataclass(frozen=True)
class Tuning:
    """How a network is fine-tuned before the removal; `std` None is plain fine-tuning."""

    std: str | None
    temperature: float = 0.1
    std_lr: float = 1e-2

    @property
    def name(self) -> str:
        if self.std is None:
            return "plain"
        changed = [] if self.temperature == 0.1 else [f"temperature {self.temperature:g}"]
        changed += [] if self.std_lr == 1e-2 else [f"std_lr {self.std_lr:g}"]
        return ", ".join([self.std, *changed])


@dataclass(frozen=True)
class Removal:
    """What chooses the channels: a score for `prune_channels`, or torch-pruning's own pruner ("tp pruner")."""

    score: str
    uniform: bool
    power: float | None = None
    normalizer: str | None = None

    @property
    def name(self) -> str:
        option = f" power {self.power:g}" if self.power is not None else ""
        option += f" / {self.normalizer}" if self.normalizer is not None else ""
        return self.score + option


PLAIN, DEFAULT = Tuning(None), Tuning("per_weight")
DEFAULT_POWER = 1.0
TUNINGS = (DEFAULT, Tuning("rank_one"), Tuning("per_channel"), Tuning("rank_one", std_lr=2e-2))
POWERS = (1.0, 2.0)
NORMALIZERS = ("mean", "none")
LEARNING_RATES_AFTER = (0.003, 0.01, 0.03)


class Benchmark:
    """The rows of the results file, and the networks that they start from."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out, self.work, self.data_dir = args.out, args.work, args.data_dir
        self.steps_before, self.steps_after, self.lr_before = args.steps_before, args.steps_after, args.lr_before
        self.seeds = range(args.seeds)
        self.work.mkdir(parents=True, exist_ok=True)
        cifar = self.data_dir / "cifar10"
        self.train = Images(cifar, "train", slice(0, -NUM_VALIDATION_PER_CLASS))
        self.validation = Images(cifar, "train", slice(-NUM_VALIDATION_PER_CLASS, None))
        self.test = Images(cifar, "test", slice(None))
        self.dense = trained_resnet20(self.data_dir)
        self.results: dict[str, Any] = json.loads(self.out.read_text()) if self.out.exists() else {}
        settings = {
            "steps_before": self.steps_before,
            "steps_after": self.steps_after,
            "batch": BATCH,
            "taylor_batches": TAYLOR_BATCHES,
            "calibration_batches": CALIBRATION_BATCHES,
            "lr_before": self.lr_before,
            "optimizer": "SGD, momentum 0.9, learning rate by cosine to 0",
            "macs_kept": MACS_KEPT,
        }
        if self.results.setdefault("settings", settings) != settings:
            raise SystemExit(f"{self.out} was made with {self.results['settings']}, now {settings}; use another --out.")

    def run(self) -> None:
        if "dense" not in self.results:
            macs, params = count_macs(self.dense, EXAMPLE).macs, count_parameters(self.dense).total
            test = accuracy(self.dense, self.test.batches())
            if round(100 * test, 2) != 91.73:
                raise SystemExit(f"the trained network has {100 * test:.2f} % on the test images; expected 91.73 %.")
            validation = accuracy(self.dense, self.validation.batches())
            self.write("dense", {"test": test, "validation": validation, "macs": macs, "params": params})
        self.select()
        for seed in self.seeds:
            for tuning, removal in self.final_rows():
                key = {"section": "final", "seed": seed, "lr_after": self.results["chosen"]["lr_after"]}
                self.measure(key, tuning, removal, self.test)
        self.check_reload()

    def select(self) -> None:
        """Chooses on the validation images, with seed 0: the controls' normaliser, learning rate, our settings."""
        if "chosen" in self.results:
            return
        chosen: dict[str, Any] = {}
        for score in ("magnitude", "taylor"):
            options = [Removal(score, uniform=False, normalizer=normalizer) for normalizer in NORMALIZERS]
            rows = [self.validate(PLAIN, removal) for removal in options]
            chosen[f"{score}_normalizer"] = best(rows, "after_removal")["removal"]["normalizer"]
        for tuning in TUNINGS:
            for power in POWERS:
                for uniform in (False, True):
                    self.validate(tuning, Removal("snr", uniform, power=power))
        magnitude = Removal("magnitude", uniform=False, normalizer=chosen["magnitude_normalizer"])
        default = Removal("snr", uniform=False, power=DEFAULT_POWER)

        def mean_of_two(lr: float) -> float:
            rows = [self.validate(PLAIN, magnitude, lr), self.validate(DEFAULT, default, lr)]
            return sum(row["after_fine_tuning"] for row in rows)

        chosen["lr_after"] = lr = max(LEARNING_RATES_AFTER, key=mean_of_two)
        for uniform in (False, True):
            rows = [r for r in self.rows("selection") if r["removal"]["score"] == "snr" and r["lr_after"] is None]
            rows = [row for row in rows if row["removal"]["uniform"] == uniform]
            rows = sorted(rows, key=lambda row: -row["after_removal"])[:2]
            tuned = [self.validate(Tuning(**row["tuning"]), Removal(**row["removal"]), lr) for row in rows]
            winner = best(tuned, "after_fine_tuning")
            chosen["uniform" if uniform else "global"] = {key: winner[key] for key in ("tuning", "removal")}
        self.results["chosen"] = chosen
        self.write_file()

    def validate(self, tuning: Tuning, removal: Removal, lr_after: float | None = None) -> dict[str, Any]:
        return self.measure({"section": "selection", "seed": 0, "lr_after": lr_after}, tuning, removal, self.validation)

    def final_rows(self) -> list[tuple[Tuning, Removal]]:
        """What the final table compares, without duplicates."""
        chosen = self.results["chosen"]
        rows: list[tuple[Tuning, Removal]] = []
        for uniform in (False, True):
            winner = chosen["uniform" if uniform else "global"]
            ours = Tuning(**winner["tuning"])
            controls = [Removal(s, uniform, normalizer=chosen[f"{s}_normalizer"]) for s in ("magnitude", "taylor")]
            rows += [
                (DEFAULT, Removal("snr", uniform, power=DEFAULT_POWER)),
                (ours, Removal(**winner["removal"])),
                *((PLAIN, control) for control in controls),
                (PLAIN, Removal("random", uniform)),
                *((ours, control) for control in controls),
            ]
        rows.append((PLAIN, Removal("tp pruner", uniform=True, normalizer="mean")))
        rows += [(PLAIN, Removal(s, uniform=False, normalizer=n)) for s in ("magnitude", "taylor") for n in NORMALIZERS]
        # The same score without its stds, on the same network: what they add.
        rows.append((Tuning(**chosen["global"]["tuning"]), Removal("snr", uniform=False, power=0.0)))
        return list(dict.fromkeys(rows))

    def measure(self, key: dict[str, Any], tuning: Tuning, removal: Removal, images: Images) -> dict[str, Any]:
        """One row: accuracy after the removal and, unless `lr_after` is None, after fine-tuning."""
        key = key | {"tuning": asdict(tuning), "removal": asdict(removal)}
        for row in self.rows(key["section"]):
            if all(row[name] == value for name, value in key.items()):
                return row
        start, seed = time.perf_counter(), key["seed"]
        model, gradients_spent = self.removed(self.tuned(tuning, seed), removal, seed)
        row = key | {
            "name": f"{removal.name} on {tuning.name}, {'uniform' if removal.uniform else 'global'}",
            "macs": count_macs(model, EXAMPLE).macs / self.results["dense"]["macs"],
            "params": count_parameters(model).total / self.results["dense"]["params"],
            "widths": [block.conv1.out_channels for block in model.modules() if isinstance(block, Block)],
            "after_removal": accuracy(model, images.batches()),
        }
        if key["lr_after"] is not None:
            steps = self.steps_after - gradients_spent
            row["seconds_per_step"] = self.fine_tune(model, PLAIN, steps, key["lr_after"], seed + 1000)
            row["after_fine_tuning"] = accuracy(model, images.batches())
        if key["section"] == "final" and seed == 0 and removal.score == "snr":
            common.keep(model, self.work / f"final-{row['name'].replace(' ', '-').replace(',', '')}.pt")
        self.write("rows", row | {"seconds": round(time.perf_counter() - start, 1)})
        return row

    def tuned(self, tuning: Tuning, seed: int) -> nn.Module:
        """The network after the first fine-tuning; its tensors are kept in the work directory."""
        name = f"{tuning.name.replace(', ', '-').replace(' ', '')}-{self.steps_before}-{self.lr_before:g}-{seed}"
        path = self.work / f"{name}.pt"
        model = copy.deepcopy(self.dense)
        if tuning.std is not None:
            model = bp.to_variational(model, std=tuning.std)
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model
        seconds = self.fine_tune(model, tuning, self.steps_before, self.lr_before, seed)
        validation = accuracy(model, self.validation.batches())
        self.write(
            "tuned",
            {"name": tuning.name, "seed": seed, "validation": validation, "seconds_per_step": seconds},
        )
        common.keep(model.state_dict(), path)
        return model

    def fine_tune(self, model: nn.Module, tuning: Tuning, steps: int, lr: float, seed: int) -> float:
        """Seconds per step of an ordinary loop; for a posterior, `attach` is the one line more."""
        torch.manual_seed(seed)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        if tuning.std is not None:
            options = {"temperature": tuning.temperature, "std_lr": tuning.std_lr, "max_noise_cost": None}
            bp.attach(optimizer, model, num_data=NUM_TRAIN, **options)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        batches = tqdm(self.train.random(steps, seed, augment=True), tuning.name, steps, mininterval=20)
        start = time.perf_counter()
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
        return round((time.perf_counter() - start) / steps, 4)

    def removed(self, model: nn.Module, removal: Removal, seed: int) -> tuple[nn.Module, int]:
        """The network at half the MACs with batch norm recalibrated, and the gradient evaluations that this took."""
        torch.manual_seed(seed)
        gradients = TAYLOR_BATCHES if removal.score == "taylor" else 0
        if gradients:
            model.eval()
            for images, labels in self.train.random(gradients, seed + 2000, augment=True):
                F.cross_entropy(model(images), labels).backward()
        calibration = [images for images, _ in self.train.random(CALIBRATION_BATCHES, seed + 3000, augment=False)]
        if removal.score == "tp pruner":
            model = prune_with_torch_pruning(model)
            recalibrate_batch_norm(model, calibration)
        else:
            bp.prune_channels(
                model,
                EXAMPLE,
                target=f"macs={MACS_KEPT}",
                importance=importance(removal),
                uniform=removal.uniform,
                data=calibration,
            )
        return bp.to_deterministic(model).to(memory_format=torch.channels_last), gradients

    def check_reload(self) -> None:
        """Saves our final network of seed 0 and loads it in a fresh process, where its logits must be the same."""
        if "reload" in self.results:
            return
        chosen = self.results["chosen"]["global"]
        finals = [row for row in self.rows("final") if row["seed"] == 0]
        row = next(row for row in finals if chosen == {key: row[key] for key in chosen})
        model = torch.load(self.work / f"final-{row['name'].replace(' ', '-').replace(',', '')}.pt", weights_only=False)
        with tempfile.TemporaryDirectory() as directory:
            bp.save(model, directory)
            arguments = [__file__, "--data-dir", str(self.data_dir), "--logits-of", directory]
            subprocess.run([sys.executable, *arguments], check=True)
            fresh = np.load(Path(directory) / "logits.npy")
            size = sum(path.stat().st_size for path in Path(directory).glob("*.*") if path.suffix != ".npy")
        here = logits(model, self.test)
        difference = float(np.abs(here - fresh).max())
        assert difference == 0.0, f"the reloaded network's logits differ by up to {difference}"
        right = int((fresh.argmax(1) == self.test.labels.numpy()).sum())
        value = {"name": row["name"], "max_difference": difference, "accuracy": right / len(fresh), "bytes": size}
        self.write("reload", value)

    def rows(self, section: str) -> list[dict[str, Any]]:
        return [row for row in self.results.get("rows", []) if row["section"] == section]

    def write(self, section: str, value: dict[str, Any]) -> None:
        if section in ("rows", "tuned"):
            self.results.setdefault(section, []).append(value)
        else:
            self.results[section] = value
        self.write_file()
        shown = {name: v for name, v in value.items() if name not in ("tuning", "removal")}
        print(time.strftime("%H:%M:%S"), section, shown, flush=True)

    def write_file(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        partial = self.out.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1) + "\n")
        partial.replace(self.out)


def best(rows: list[dict[str, Any]], value: str) -> dict[str, Any]:
    return max(rows, key=lambda row: row[value])


def importance(removal: Removal) -> tp.importance.Importance:
    normalizer: Any = None if removal.normalizer == "none" else removal.normalizer
    if removal.score == "snr":
        assert removal.power is not None
        return bp.SNRImportance(power=removal.power)
    if removal.score == "magnitude":
        return tp.importance.MagnitudeImportance(normalizer=normalizer)
    if removal.score == "taylor":
        return tp.importance.TaylorImportance(normalizer=normalizer)
    return tp.importance.RandomImportance()


def prune_with_torch_pruning(model: nn.Module) -> nn.Module:
    """What torch-pruning's pruner leaves, its ratio of channels searched for half the MACs."""
    dense_macs = count_macs(model, EXAMPLE).macs

    def pruned(ratio: float) -> nn.Module:
        candidate = copy.deepcopy(model)
        inner = {block.conv1 for block in candidate.modules() if isinstance(block, Block)}
        layers: list[nn.Module] = [
            m for m in candidate.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in inner
        ]
        scores = tp.importance.MagnitudeImportance()
        tp.pruner.BasePruner(candidate, EXAMPLE, scores, pruning_ratio=ratio, ignored_layers=layers).step()
        return candidate

    def distance(candidate: nn.Module) -> float:
        return abs(count_macs(candidate, EXAMPLE).macs / dense_macs - MACS_KEPT)

    return min((pruned(ratio / 128) for ratio in range(32, 112)), key=distance)


@torch.no_grad()
def logits(model: nn.Module, images: Images) -> np.ndarray:
    """Logits of all images, (N, 10), in one memory format: another one sums in another order."""
    model.to(memory_format=torch.contiguous_format).eval()
    return torch.cat([model(x.contiguous()) for x, _ in images.batches()]).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("BAYESPRUNE_DATA"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/cifar.json"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bayesprune-cifar")
    parser.add_argument("--steps-before", type=int, default=400)
    parser.add_argument("--steps-after", type=int, default=200)
    parser.add_argument("--lr-before", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--table", action="store_true", help="only write the table of --out, as Markdown beside it")
    parser.add_argument("--logits-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.table and args.data_dir is None:
        parser.error("no data: give --data-dir or set BAYESPRUNE_DATA.")
    if args.logits_of is not None:
        model = bp.load(args.logits_of, model=ResNet20())
        test = Images(Path(args.data_dir) / "cifar10", "test", slice(None))
        np.save(args.logits_of / "logits.npy", logits(model, test))
        return
    if not args.table:
        Benchmark(args).run()
    page = markdown(json.loads(args.out.read_text()))
    args.out.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
