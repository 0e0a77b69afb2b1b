"""Heads and neurons of MiniLM cut at once, from 1,024 sentences without labels, and 128 steps of distillation after it.

The default of `prune_channels` beside magnitude and attention, which get the same number of heads and neurons in each
layer, the same compensation and the same distillation. A seed draws the calibration sentences and the batches of the
steps; the dense model is that of seed 0. Training is in float32, and cut models stand in the benchmark's folder.
"""

import copy
import random
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch_pruning as tp
from attentive import bert_units
from common import keep
from cuts import largest_weights
from fair_methods import ByName
from sst2_methods import like_lengths, train
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

import bayesprune as bp
from bayesprune.hosts.transformers import DistillationCallback
from bayesprune.reports import macs_by_module

if TYPE_CHECKING:
    from sst2 import Benchmark

SCORES = ("default", "magnitude", "attentive")
KEPT = (0.5, 0.25)
"""Of the MACs of the transformer layers; after the first there is training."""
WEIGHTS = (0.2, 0.1)
"""Of the single weights of the transformer layers, in the rows of `prune_one_shot`; nothing is trained."""
LEARNING_RATES = (1e-4, 3e-4)
NUM_SENTENCES = 1024


def run(benchmark: "Benchmark", seeds: list[int]) -> None:
    """Cuts at each level, and training after the first, at each learning rate."""
    benchmark.measure({"section": "dense, float32", "seed": 0}, lambda: (dense(benchmark), {}))

    def cut(kept: float) -> None:
        for seed in seeds:
            for score in SCORES:
                key = {"score": score, "kept": kept, "seed": seed}
                benchmark.measure({"section": "at once"} | key, lambda key=key: _cut(benchmark, **key))

    cut(KEPT[0])
    for lr in LEARNING_RATES:
        for seed in seeds:
            for score in SCORES:
                key = {"score": score, "kept": KEPT[0], "lr": lr, "seed": seed}
                benchmark.measure({"section": "at once, distilled"} | key, lambda key=key: _tuned(benchmark, **key))
    for kept in KEPT[1:]:
        cut(kept)
    for seed in seeds:
        for kept in WEIGHTS:
            for score in ("one shot", "magnitude, fitted"):
                key = {"score": score, "kept": kept, "seed": seed}
                benchmark.measure({"section": "weights at once"} | key, lambda key=key: _weights(benchmark, **key))


def dense(benchmark: "Benchmark") -> Any:
    """The model of seed 0, fine-tuned in float32; made at the first call."""
    folder, settings = benchmark.work / "float32-dense-0", benchmark.settings
    if not folder.exists():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(benchmark.folder, num_labels=2)
        _train(benchmark, model, settings.dense_steps, settings.dense_lr, 0)
        model.save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def _train(
    benchmark: "Benchmark", model: Any, steps: int, lr: float, seed: int, added: DistillationCallback | None = None
) -> None:
    model.bert.embeddings.requires_grad_(False)
    data = like_lengths(benchmark.train, steps, benchmark.settings.batch, seed)
    collate = DataCollatorWithPadding(benchmark.tokenizer)
    train(model, data, collate, added, batch=benchmark.settings.batch, lr=lr, seed=seed)


def calibration(benchmark: "Benchmark", seed: int, *, is_labelled: bool = False) -> list[dict[str, Tensor]]:
    """Batches of sentences of like length, in random order."""
    chance, size = random.Random(seed + 1000), benchmark.settings.batch
    drawn = sorted(chance.sample(benchmark.train, NUM_SENTENCES), key=lambda example: len(example["input_ids"]))
    starts = chance.sample(range(0, NUM_SENTENCES, size), NUM_SENTENCES // size)
    batches = [benchmark.padded(drawn[start : start + size]) for start in starts]
    return [inputs | {"labels": labels} if is_labelled else inputs for inputs, labels in batches]


def _cut(benchmark: "Benchmark", score: str, kept: float, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    path = _file(benchmark, score, kept, seed)
    if path.exists():
        model, _, row = torch.load(path, weights_only=False)
        return model, row
    model, inputs = dense(benchmark), benchmark.padded(benchmark.train[:1])[0]
    macs = macs_by_module(model, inputs)
    inside = sum(count for name, count in macs.items() if ".encoder." in name)
    target: str | dict[str, int] = f"macs={(sum(macs.values()) - (1 - kept) * inside + 0.5) / sum(macs.values())}"
    importance = None
    data = calibration(benchmark, seed)
    if score != "default":
        default = _file(benchmark, "default", kept, seed)
        if not default.exists():
            _cut(benchmark, "default", kept, seed)
        _, report, _ = torch.load(default, weights_only=False)
        is_attentive = score == "attentive"
        importance = ByName(model, bert_units(model, data)) if is_attentive else tp.importance.MagnitudeImportance()
        target = report.sizes
    torch.manual_seed(seed)
    start, cpu = time.perf_counter(), time.process_time()
    bp.to_variational(model)
    report = bp.prune_channels(
        model,
        inputs,
        target,
        granularity=("heads", "mlp"),
        importance=importance,
        data=data,
    )
    bp.to_deterministic(model)
    row = {
        "how": report.how,
        "heads": [r.kept_heads for r in report.rows if r.heads],
        "neurons": [r.kept for r in report.rows if not r.heads],
        "macs": report.macs_after / report.macs_before,
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "wall_seconds": round(time.perf_counter() - start, 1),
    }
    keep((model, report, row), path)
    return model, row


def _weights(benchmark: "Benchmark", score: str, kept: float, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Single weights cut at once by `prune_one_shot`, or by it with the largest weights of each layer as masks."""
    model, data = dense(benchmark), calibration(benchmark, seed)
    bp.to_variational(model, filter_fn=lambda _, name: ".encoder." in name, estimator="mean")
    start = time.process_time()
    with nullcontext() if score == "one shot" else largest_weights():
        report = bp.prune_one_shot(model.eval(), data, f"weights={kept}")
    row = {"sparsity": report.removable.sparsity, "cpu_seconds": round(time.process_time() - start, 1)}
    return bp.to_deterministic(model), row


def _file(benchmark: "Benchmark", score: str, kept: float, seed: int) -> Path:
    return benchmark.work / f"at-once-{score}-{kept:g}-{seed}.pt"


def _tuned(benchmark: "Benchmark", score: str, kept: float, lr: float, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    model, _ = _cut(benchmark, score, kept, seed)
    model, teacher = copy.deepcopy(model), dense(benchmark)
    callback = DistillationCallback(bp.distillation(teacher))
    _train(benchmark, model, benchmark.settings.steps_after_removal, lr, seed + 200, callback)
    return model, {"agreement": _agreement(model.eval(), teacher, benchmark)}


@torch.no_grad()
def _agreement(model: Any, teacher: Any, benchmark: "Benchmark") -> float:
    """On how many dev sentences both say the same."""
    same = [
        (model(**inputs).logits.argmax(1) == teacher(**inputs).logits.argmax(1))
        for inputs, _ in benchmark.batches("dev")
    ]
    return float(torch.cat(same).float().mean())
