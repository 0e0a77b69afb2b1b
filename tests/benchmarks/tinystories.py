"""A trained Llama of 656,000 parameters: perplexity with few weights, through the stock Trainer, and generation.

The callback's posteriors beside magnitude and random removal with the same batches, learning rates and number of
gradient evaluations; weights cut at once from calibration stories, without training and with all steps after the cut;
half of the heads and neurons removed. The first 80 % of the text trains, the next 10 % chooses settings (one seed), the
last 10 % is only reported. Each finished run is written at once and skipped when the program runs again.

    python tests/benchmarks/tinystories.py --data-dir DATA --out docs/benchmarks/tinystories.json
    python tests/benchmarks/tinystories.py --table
"""

import copy
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import common
import torch
import transformers
from cuts import Cut, Target, control, ours
from sst2_methods import Method, callback, halve, signal, train
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TrainerCallback,
)

import bayesprune as bp
from bayesprune.hosts.transformers import PruneSchedule
from bayesprune.prune.scores.weights import magnitude

BEGINNING = "Once upon a time, there was a little girl named Lily. She "
GENERATED_ANEW = """
import json, sys, torch, bayesprune
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor([json.loads(sys.argv[2])])
found = model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False, use_cache=True)
print(json.dumps(found.tolist()[0]))
"""


@dataclass(frozen=True)
class Settings:
    """All that a run depends on beside its method."""

    sparsities: tuple[float, ...] = (0.3, 0.5, 0.7)
    batch: int = 8
    tokens: int = 256
    steps: int = 60
    num_updates: int = 20
    calibration: int = 128


LEARNING_RATES = (3e-4, 1e-3)
OURS, MAGNITUDE = Method("ours"), Method("magnitude")
CANDIDATES = (
    *(Method(kind, scope) for kind in ("ours", "magnitude") for scope in ("global", "layer")),
    *(Method("ours", std=std) for std in ("rank_one", "per_channel")),
    *(Method("ours", std_lr=std_lr) for std_lr in (3e-2, 1e-1)),
    Method("ours", temperature=1.0),
    Method("ours", power=1.0),
)
CUT_RATES = (3e-3, 1e-3)
OUR_CUT = Cut("ours", fitted=True, divided=True)
PUBLISHED = tuple(Cut(mask) for mask in ("sparsegpt", "magnitude", "wanda"))
FITTED = tuple(replace(its, fitted=True) for its in PUBLISHED)
DIVIDED = tuple(replace(its, divided=True) for its in FITTED)
TARGETS = {"50%": Target(sparsity=0.5), "2:4": Target(pattern="2:4")}
STRUCTURES = tuple(Method("ours", std=s, power=p) for s in ("per_weight", "rank_one") for p in (1.0, 2.0))


class Benchmark:
    """The model, the text in blocks, and the runs that are finished."""

    def __init__(self, data_dir: Path, out: Path, runs: list[dict[str, Any]], settings: Settings) -> None:
        self.out, self.runs, self.settings = out, runs, settings
        self.folder = data_dir / "weights" / "tinystories656k"
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        text = (data_dir / "text" / "tinystories_val.txt").read_text(encoding="utf-8")
        parts = (
            text[: len(text) * 8 // 10],
            text[len(text) * 8 // 10 : len(text) * 9 // 10],
            text[len(text) * 9 // 10 :],
        )
        self.train, self.validation, self.test = (self.stories(part) for part in parts)
        self.collate = DataCollatorForLanguageModeling(self.tokenizer, mlm=False)

    def stories(self, text: str) -> list[dict[str, Any]]:
        """The stories that begin as the file's stories mostly do, as far as their first tokens."""
        found = [story.strip() for story in re.split(r"(?=Once upon a time)", text)[1:]]
        ids = self.tokenizer(found, truncation=True, max_length=self.settings.tokens)["input_ids"]
        return [{"input_ids": row} for row in ids]

    def dense(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder)

    def run(self, seeds: list[int]) -> None:
        lr = self.select()
        self.measure({"section": "dense", "seed": 0}, lambda: (self.dense(), self.sample(self.dense())))
        for sparsity in self.settings.sparsities:
            self.measure({"section": "one shot", "seed": 0, "sparsity": sparsity}, lambda s=sparsity: self.one_shot(s))
        for seed in seeds:
            self.measure({"section": "dense, fine-tuned", "seed": seed}, lambda s=seed: (self.learned(None, lr, s), {}))
            ours = Method(**chosen(self.runs, "ours"))
            for sparsity in self.settings.sparsities:
                for kind in ("ours", "magnitude", "random"):
                    self.weights("gradual", Method(**chosen(self.runs, kind)), sparsity, lr, seed)
                for method in (ours, MAGNITUDE):
                    self.once("learned, then cut", method, sparsity, lr, seed)
            for kind in ("ours", "magnitude", "random"):
                self.structure("structure", Method(**chosen(self.runs, kind, "choice of structure")), lr, seed)

        self.cuts(seeds)

    def cuts(self, seeds: list[int]) -> None:
        """Weights cut at once: with no training, and with all steps after the cut, the learning rate by validation."""
        trained = (OUR_CUT, *PUBLISHED, DIVIDED[1])
        for how in trained:
            for lr in CUT_RATES:
                self.cut_once("cut, then trained", how, "50%", 0, lr)
        for target in TARGETS:
            alike = target == "2:4"  # every layer loses half, however it is divided
            for seed in seeds:
                for how in (
                    OUR_CUT,
                    *PUBLISHED,
                    *FITTED,
                    *(() if alike else (replace(OUR_CUT, divided=False), *DIVIDED)),
                ):
                    self.cut_once("cut, no training", how, target, seed)
                for how in (OUR_CUT, *PUBLISHED, FITTED[1] if alike else DIVIDED[1]):
                    self.cut_once("cut, then trained", how, target, seed, rate(self.runs, how))

    def cut_once(self, section: str, how: Cut, target: str, seed: int, lr: float | None = None) -> dict[str, Any]:
        def run() -> tuple[nn.Module, dict[str, Any]]:
            model, _ = self.cut_model(how, target, seed)
            if lr:
                self.fine_tune(model, lr, seed)
            return model, {}

        key = {"section": section, "cut": asdict(how), "target": target, "seed": seed}
        return self.measure(key | ({"lr": lr} if lr else {}), run)

    def cut_model(self, how: Cut, target: str, seed: int) -> tuple[Any, dict[str, float]]:
        """The model with zeros, and what share of each layer they are."""
        model, shares = self._cut_model(how, target, seed)
        return copy.deepcopy(model), shares

    @lru_cache(maxsize=4)  # noqa: B019 (lives as long as the program)
    def _cut_model(self, how: Cut, target: str, seed: int) -> tuple[Any, dict[str, float]]:
        model = bp.to_variational(self.dense(), filter_fn=in_layers, estimator="mean").eval()
        batches = self.calibration(seed)
        if how.mask == "ours":
            return model, ours(model, batches, TARGETS[target], divided=how.divided)
        shares = self.cut_model(OUR_CUT, target, seed)[1] if how.divided else {}
        control(model, batches, how, TARGETS[target], shares)
        return model, shares

    def calibration(self, seed: int) -> list[Any]:
        """Stories of the training text in batches, those of like length together."""
        stories = random.Random(seed).sample(self.train, self.settings.calibration)
        stories.sort(key=lambda story: len(story["input_ids"]))
        return [self.collate(stories[start : start + 16]) for start in range(0, len(stories), 16)]

    def select(self) -> float:
        """Runs what the choices are made from, with seed 0, and returns the learning rate."""

        def of_both(lr: float) -> float:
            return sum(self.weights("choice", method, 0.5, lr, 0)["validation"] for method in (OURS, MAGNITUDE))

        lr = min(LEARNING_RATES, key=of_both)
        for method in CANDIDATES:
            self.weights("choice", method, 0.5, lr, 0)
        for method in STRUCTURES:
            self.structure("choice of structure", method, lr, 0)
        return lr

    def weights(self, section: str, method: Method, sparsity: float, lr: float, seed: int) -> dict[str, Any]:
        def run() -> tuple[nn.Module, dict[str, Any]]:
            model, updates, score = self.dense(), self.settings.num_updates, signal(method.power)
            schedule = PruneSchedule(f"weights={1 - sparsity}", num_updates=updates, scope=method.scope, score=score)
            self.fine_tune(model, lr, seed, callback(method, schedule, in_layers, seed=seed))
            keep = section == "gradual" and method.kind == "ours" and sparsity == 0.5
            return model, self.generated(bp.to_deterministic(model)) if keep else {}

        key = {"section": section, "method": asdict(method), "sparsity": sparsity, "lr": lr, "seed": seed}
        return self.measure(key, run)

    def once(self, section: str, method: Method, sparsity: float, lr: float, seed: int) -> dict[str, Any]:
        """Posteriors, or plain means, after all steps; then cut, and not trained again."""

        def run() -> tuple[nn.Module, dict[str, Any]]:
            model = self.learned(method if method.kind == "ours" else None, lr, seed)
            score = signal(method.power) if method.kind == "ours" else magnitude
            bp.prune_weights(in_place(model), f"weights={1 - sparsity}", scope=method.scope, score=score)
            return model, {}

        key = {"section": section, "method": asdict(method), "sparsity": sparsity, "lr": lr, "seed": seed}
        return self.measure(key, run)

    def one_shot(self, sparsity: float) -> tuple[nn.Module, dict[str, Any]]:
        model = in_place(self.dense())
        bp.prune_weights(model, f"weights={1 - sparsity}", score=magnitude)
        return model, {}

    def structure(self, section: str, method: Method, lr: float, seed: int) -> dict[str, Any]:
        def run() -> tuple[nn.Module, dict[str, Any]]:
            model = self.learned(method if method.kind == "ours" else None, lr, seed)
            example = {"input_ids": torch.tensor([self.train[0]["input_ids"]])}
            report = halve(model, example, ".layers.", method, seed)
            split = self.validation if section.startswith("choice") else self.test
            row = {
                "heads": [r.kept_heads for r in report.rows if r.heads],
                "neurons": [r.kept for r in report.rows if not r.heads],
                "config": report.config,
                "after removal": self.perplexity(model, split),
            }
            self.fine_tune(model, lr, seed + 100)
            return model, row | (self.generated(model) if section == "structure" and method.kind == "ours" else {})

        key = {"section": section, "method": asdict(method), "lr": lr, "seed": seed}
        return self.measure(key, run)

    @lru_cache(maxsize=2)  # noqa: B019 (lives as long as the program)
    def _learned(self, method: Method | None, lr: float, seed: int) -> Any:
        model = self.dense()
        self.fine_tune(model, lr, seed, method and callback(method, None, in_layers, seed=seed))
        return model

    def learned(self, method: Method | None, lr: float, seed: int) -> Any:
        """The model after all steps without removal, with posteriors of a method or without any."""
        return copy.deepcopy(self._learned(method and replace(method, scope="global", power=2.0), lr, seed))

    def fine_tune(self, model: Any, lr: float, seed: int, added: TrainerCallback | None = None) -> None:
        chance, batch = random.Random(seed), self.settings.batch
        data: list[Any] = []
        while len(data) < self.settings.steps * batch:
            data += chance.sample(self.train, len(self.train))
        train(model, data[: self.settings.steps * batch], self.collate, added, batch=batch, lr=lr, seed=seed)

    def generated(self, model: Any) -> dict[str, Any]:
        """A greedy continuation here and from the saved model in a fresh process, both with the cache."""
        with tempfile.TemporaryDirectory() as folder:
            bp.save(model, folder)
            prompt = json.dumps(self.tokenizer(BEGINNING)["input_ids"])
            done = subprocess.run(
                [sys.executable, "-c", GENERATED_ANEW, folder, prompt], check=True, capture_output=True, text=True
            )
        row = self.sample(model)
        return row | {"equal in a fresh process": row["ids"] == json.loads(done.stdout)}

    @torch.no_grad()
    def sample(self, model: Any) -> dict[str, Any]:
        ids = torch.tensor([self.tokenizer(BEGINNING)["input_ids"]])
        options = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "use_cache": True}
        found = model.eval().generate(ids, **options).tolist()[0]
        return {"ids": found, "text": self.tokenizer.decode(found, skip_special_tokens=True)}

    @torch.no_grad()
    def perplexity(self, model: Any, rows: list[dict[str, Any]]) -> float:
        """exp of the mean cross-entropy of the rows' tokens, at the posterior means."""
        model.eval()
        total, number = 0.0, 0
        for start in range(0, len(rows), 16):
            batch = self.collate(rows[start : start + 16])
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total, number = total + float(model(**batch).loss) * tokens, number + tokens
        return math.exp(total / number)

    def measure(self, key: dict[str, Any], run: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> dict[str, Any]:
        """The run with this key: what is on file, or its result, which is then on file."""
        for finished in self.runs:
            if all(finished.get(name) == value for name, value in key.items()):
                return finished
        start = time.perf_counter()
        model, row = run()
        if key["section"].startswith(("choice", "dense", "cut")):
            row["validation"] = self.perplexity(model, self.validation)
        if not key["section"].startswith("choice"):
            row["test"] = self.perplexity(model, self.test)
        self.runs.append(key | row | {"seconds": round(time.perf_counter() - start, 1)})
        common.write(self.out, asdict(self.settings), self.runs)
        print(time.strftime("%H:%M:%S"), self.runs[-1], flush=True)
        return self.runs[-1]


def in_layers(module: nn.Module, name: str) -> bool:
    """Whether a layer belongs to the transformer layers."""
    return ".layers." in name


def in_place(model: nn.Module) -> nn.Module:
    """The model with posteriors, those that it has or new ones that nothing was learned of."""
    if not any(isinstance(module, bp.layers.VariationalLayer) for module in model.modules()):
        bp.to_variational(model, filter_fn=in_layers)
    return model


def rate(runs: list[dict[str, Any]], how: Cut) -> float:
    """The learning rate after this cut with the lowest perplexity on the validation text, at half of the weights."""
    how = replace(how, divided=how.fitted)
    section = [row for row in runs if row["section"] == "cut, then trained" and row["cut"] == asdict(how)]
    rows = [row for row in section if row["target"] == "50%" and row["seed"] == 0]
    return min(rows, key=lambda row: row["validation"])["lr"] if rows else CUT_RATES[0]


def chosen(runs: list[dict[str, Any]], kind: str, section: str = "choice") -> dict[str, Any]:
    """The method of a kind with the lowest perplexity on the validation text."""
    rows = [row for row in runs if row["section"] == section and row["method"]["kind"] == kind]
    return min(rows, key=lambda row: row["validation"])["method"] if rows else {"kind": kind}


INTRODUCTION = """# TinyStories, a Llama of 656,000 parameters

    python tests/benchmarks/tinystories.py --data-dir DATA --out docs/benchmarks/tinystories.json
    python tests/benchmarks/tinystories.py --table

The second command writes this page from `tinystories.json`, which also holds every single run.

A trained Llama (2 layers, 128 wide, 8 heads over 4 groups of keys and values, 384 neurons; 393,216 weights in its
linear layers) and stories of {tokens} tokens at most. Every row that is trained has {steps} steps of {batch} stories
with the stock `Trainer`, the same batches and the same learning rate ({lr:g}, linear to 0 after a warm-up). The
embeddings, which are also the head, are not cut.
"""

WEIGHTS = """Perplexity on the last 10 % of the text, mean ± standard deviation over {seeds} seeds; lower is better.
"gradual" is removal during training ({num_updates} removals on a cubic ramp, from a quarter to three quarters of the
steps): ours is `BayesPruneCallback`, the others are callbacks on the same schedule.
"""

CUT = """No weight is trained before the cut. Masks and weights come from {calibration} stories of the training text,
drawn anew for each seed, forward passes only; then {steps} steps as above, which hold the zeros. Perplexity on the last
10 % of the text, mean ± standard deviation over the seeds that have run (in brackets where they are not all).

- ours is `bp.prune_one_shot`: layers in the order of the forward, each fitted to what it gave in the dense model
  ("fitted"), masks by alternating directions, half of the weights divided between layers by what each costs
  ("divided").
- The controls stand as they were published: magnitude inside each layer, Wanda inside each output, SparseGPT with
  blocks of 128 columns and 1 % of damping. "fitted" and "divided" give them what ours has beside its masks, with the
  shares that ours found. In 2:4 every layer loses half.
- The learning rate is {rates}:
  of 3e-3 and 1e-3, as far as the file has both, the better one on the validation text at half of the weights, seed 0.
"""

STRUCTURE = """{steps} steps, removal by `bp.prune_channels(..., uniform=True)`, {steps} plain steps. Every layer keeps
{heads} of 8 heads and {neurons} of 384 neurons, and the config says so ({config}), so that the model loads without this
library.
"""

GENERATION = """Greedy, 40 tokens, with the cache. The cut models were saved by `bp.save` and loaded by
`AutoModelForCausalLM.from_pretrained` in a fresh process; the tokens were the same as before saving in {equal} of
{number} runs (ours at 50 % of the weights, and with half of the heads and neurons, every seed).
"""

SHOWS = """Cut at once by `bp.prune_one_shot`, half of the weights, or 2:4, cost least, without training and with all
steps after it. Fitting the layers to the outputs of the dense model brings most of it, whatever chooses the masks;
dividing the sparsity between layers the next part; the masks the last. With all steps after the cut, and a learning
rate of 3e-3, plain magnitude is ahead of everything that is cut gradually at 1e-3: those rows are handicapped.

In the table of gradual removal ours stays nearer to the dense model than magnitude, and more so the more is removed.
Cut once after learning, with no step of training afterwards, it does nearly as well as when cut gradually, up to half
of the weights. At 70 %, and with half of the heads and neurons, every method has lost the language in so few steps,
ours least. What costs little here is about 30 %.

Ours had {num_ours} settings to choose from (and four for heads and neurons), magnitude two, random none. With
stds per weight at a temperature of 0.1 ours was a little behind magnitude ranked inside layers, on the validation
text; `std="rank_one"` made the difference, and a large `std_lr` harmed.
"""


def markdown(runs: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The whole page."""
    of = {section: [row for row in runs if row["section"] == section] for section in {row["section"] for row in runs}}
    if "gradual" not in of:
        return "# TinyStories, a Llama\n\nNo run of the table has finished; there is no table yet.\n"
    levels, lr = settings["sparsities"], of["gradual"][0]["lr"]
    seeds = len(of["dense, fine-tuned"])
    lines = [
        INTRODUCTION.format(**settings, lr=lr),
        SHOWS.format(num_ours=sum(method.kind == "ours" for method in CANDIDATES)),
        "## Weights",
        "",
    ]
    lines += [WEIGHTS.format(**settings, seeds=seeds)]
    lines += ["| | " + " | ".join(f"{level:.0%} removed" for level in levels) + " |", "|---" * (1 + len(levels)) + "|"]
    lines += [f"| dense, as it came | {' | '.join([cell(of['dense'])] * 3)} |"]
    lines += [f"| dense, fine-tuned | {' | '.join([cell(of['dense, fine-tuned'])] * 3)} |"]
    for section in ("one shot", "learned, then cut", "gradual"):
        for kind in ("ours", "magnitude", "random"):
            rows = [row for row in of.get(section, ()) if row.get("method", {"kind": "magnitude"})["kind"] == kind]
            cells = [cell([row for row in rows if row["sparsity"] == level]) for level in levels]
            options = name(rows[0]["method"]) if rows and "method" in rows[0] else f"{kind}, no training"
            lines += [f"| {section}: {options} | {' | '.join(cells)} |"] if rows else []
    lines += cut_table(runs, of, settings) if "cut, no training" in of else []
    if removed := of.get("structure"):
        sizes = {"heads": removed[0]["heads"][0], "neurons": removed[0]["neurons"][0]}
        config = ", ".join(f"`{field}` {value}" for field, value in removed[0]["config"].items())
        lines += ["", "## Half of the heads and neurons", ""]
        lines += [STRUCTURE.format(**settings, **sizes, config=config)]
        lines += ["| removed by | perplexity after removal | after fine-tuning |", "|---|---|---|"]
        for kind in ("ours", "magnitude", "random"):
            if rows := [row for row in removed if row["method"]["kind"] == kind]:
                lines += [f"| {name(rows[0]['method'])} | {cell(rows, 'after removal')} | {cell(rows)} |"]
    generated = [row for row in runs if "equal in a fresh process" in row]
    equal = sum(row["equal in a fresh process"] for row in generated)
    lines += ["", "## Generation", "", GENERATION.format(equal=equal, number=len(generated))]
    titles = {"dense": "dense", "gradual": "ours, 50 % of the weights", "structure": "ours, half of heads and neurons"}
    for row in [*of["dense"], *generated]:
        if row["seed"] == 0:
            lines += [f"- {titles[row['section']]}: {' '.join(row['text'].split())}"]
    lines += [
        "",
        "## What was tried",
        "",
        "Perplexity on the validation text, seed 0: half of the weights, or half of the",
    ]
    lines += [
        f"heads and neurons. The learning rate is {lr:g} where none is named, the best for magnitude and ours together."
    ]
    lines += ["", "| method | perplexity |", "|---|---|"]
    for row in [*of["choice"], *of["choice of structure"]]:
        half = "half of heads and neurons: " if row["section"] == "choice of structure" else ""
        rate = "" if row["lr"] == lr else f", learning rate {row['lr']:g}"
        lines += [f"| {half}{name(row['method'])}{rate} | {row['validation']:.2f} |"]
    return "\n".join([*lines, ""])


def cut_table(runs: list[dict[str, Any]], of: dict[str, list[dict[str, Any]]], settings: dict[str, Any]) -> list[str]:
    """What is cut at once, with no training and with all steps after the cut."""
    ways = (OUR_CUT, replace(OUR_CUT, divided=False), *DIVIDED, *FITTED, *PUBLISHED)
    tuned = {how: rate(runs, how) for how in (OUR_CUT, *PUBLISHED)}
    rates = ", ".join(f"{lr:g} after {how.mask}" for how, lr in tuned.items())
    head = [f"{target}, {when}" for when in ("no training", "then trained") for target in TARGETS]
    lines = ["", "## Weights cut at once", "", CUT.format(**settings, rates=rates)]
    lines += ["| | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for how in ways:
        cells = []
        for section in ("cut, no training", "cut, then trained"):
            for target in TARGETS:
                rows = [row for row in of.get(section, ()) if row["cut"] == asdict(how) and row["target"] == target]
                if section == "cut, then trained" and rows:
                    rows = [row for row in rows if row["lr"] == rate(runs, how)]
                some = f" ({len(rows)})" if 0 < len(rows) < 3 else ""
                cells.append(cell(rows) + some if rows else "")
        lines += [f"| {', '.join(words(how))} | {' | '.join(cells)} |"] if any(cells) else []
    return lines


def words(how: Cut) -> list[str]:
    """A way to cut in words."""
    if how.mask == "ours":
        return ["ours"] if how.divided else ["ours, the same share of each layer"]
    return [how.mask, *(["fitted"] if how.fitted else []), *(["divided"] if how.divided else [])]


def name(values: dict[str, Any]) -> str:
    """A method in words: its kind, and what is not at its default."""
    default, method = asdict(Method(values["kind"])), asdict(Method(**values))
    changed = [f"{key} {value}" for key, value in method.items() if value != default[key]]
    return ", ".join([values["kind"], *changed])


def cell(rows: list[dict[str, Any]], value: str = "test") -> str:
    """Mean and standard deviation over the rows."""
    values = [row[value] for row in rows]
    return common.spread(values, 2 if mean(values) < 100 else 0) if values else "not run"


def main() -> None:
    """Runs what the results file does not have yet, then writes the table."""
    parser = common.parser("A small Llama with few weights.", "docs/benchmarks/tinystories.json")
    options = parser.parse_args()
    settings = Settings()
    runs = common.read(options.out, asdict(settings))
    if not options.table:
        if options.data_dir is None:
            parser.error("no data: give --data-dir or set BAYESPRUNE_DATA to the folder with weights/tinystories656k")
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        Benchmark(options.data_dir, options.out, runs, settings).run(options.seeds)
    options.out.with_suffix(".md").write_text(markdown(runs, asdict(settings)), encoding="utf-8")


if __name__ == "__main__":
    main()
