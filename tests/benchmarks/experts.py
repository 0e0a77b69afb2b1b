"""A Llama whose neurons became four experts, and lose units, single weights or bits: which of them cost least.

The trained Llama of `tinystories.py` gets four copies of the neurons of each layer as experts, a little noise on each,
and a router that sends a token to two of them (sparse upcycling: Komatsuzaki et al., 2022, arXiv:2212.05055); it is
trained on for some hundred steps. Then `prune_channels` cuts it at once, from stories of the training text, and nothing
is trained. The controls keep as many units of each group as the default, and have the same compensation. The last 10 %
of the text is reported. Or half of the single weights go, by `prune_one_shot` and by the controls of `cuts.py`; or
weights are rounded, by `quantize`.

    python tests/benchmarks/experts.py --data-dir DATA
    python tests/benchmarks/experts.py --table
"""

import copy
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from common import keep, parser, read, spread, write
from cuts import Cut, control, ours
from tinystories import OUR_CUT, TARGETS, Benchmark, Settings, in_layers
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import bayesprune as bp
from bayesprune.prune.scores.channels import removed_weights

SETTINGS: dict[str, Any] = {"experts": 4, "of a token": 2, "noise": 0.3, "steps": 400, "lr": 1e-3, "stories": 128}
LEVELS = (0.75, 0.5)
"""Fractions of the parameters that are kept."""
DEFAULT = "the default"


class Taylor(bp.prune.SNRImportance):
    """The first-order change of the loss without a unit, as torch-pruning's Taylor, which does not know experts."""

    def scores(self, group: Any) -> Tensor | None:
        removed = removed_weights(group, lambda layer, name: layer.get_parameter(name) * layer.get_parameter(name).grad)
        return None if removed is None else removed.score.abs()


CONTROLS: dict[str, Callable[[], Any]] = {
    "magnitude": lambda: bp.SNRImportance(0),  # torch-pruning's own does not know experts either
    "Taylor": Taylor,
    "random": tp.importance.RandomImportance,
}
CUTS = {
    "`prune_one_shot`": OUR_CUT,
    "SparseGPT's masks, fitted and divided as ours": Cut("sparsegpt", fitted=True, divided=True),
    "magnitude, fitted and divided as ours": Cut("magnitude", fitted=True, divided=True),
    "SparseGPT": Cut("sparsegpt"),
    "Wanda": Cut("wanda"),
    "magnitude, per layer": Cut("magnitude"),
}
INTRODUCTION = """# TinyStories, a mixture of experts

    python tests/benchmarks/experts.py --data-dir DATA
    python tests/benchmarks/experts.py --table

The second command writes this page from `experts.json`. The Llama of [TinyStories](tinystories.md) with {experts}
experts in place of the neurons of each of its 2 layers, of which a token takes {token}: copies of its neurons with
noise, trained on for {steps} steps of 8 stories ({params:,} parameters, perplexity {dense:.2f}). Then it is cut in one
call from {stories} stories of the training text, drawn anew for each seed, and not trained. Perplexity on the last 10 %
of the text, mean ± standard deviation over the seeds; lower is better.

"The default" takes for the cost of a hidden unit how far the logits move when it is silent, to second order
(`ScaleSNRImportance`), and unit SNR for heads. The controls keep as many units and heads of each layer as it, and what
stays is fitted alike, inside the experts (`laplace.compensate`), too. "What it was before" ranked the units of experts
by their means alone, scaled to the median cost of the heads, and fitted nothing inside them.

| ranked by | {levels} |
|---|{rules}
"""
WEIGHTS = """
## Single weights

All weights of the layers but embeddings and the output can go, those of the experts, 92 % of them, included.
Controls have the second moments of the tokens that an expert is given, each expert by itself. What is "divided as ours"
has the shares of each matrix that `prune_one_shot` found; in 2:4 every matrix loses half. In brackets: how many seeds,
where it is not three.

| perplexity | {targets} |
|---|{rules}
"""
BITS = """
## Bits

Every matrix of those layers has one step and a fixed width (`bp.quantize(model, stories, bits={{"model.layers": 3}})`),
fitted layer by layer, the matrices of experts included, or rounded to the nearest.

| perplexity | {widths} |
|---|{rules}
"""
WIDTHS = (3, 4)
ROUNDINGS: dict[str, Any] = {"layer by layer, fitted": True, "to the nearest": False}


def upcycled(llama: Any, *, seed: int) -> MixtralForCausalLM:
    """The Llama with experts that are its neurons, and noise on them relative to the weights' deviation."""
    config = llama.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id")
    torch.manual_seed(seed)
    model = MixtralForCausalLM(
        MixtralConfig(
            **{name: getattr(config, name) for name in (*names, "eos_token_id")},
            num_local_experts=SETTINGS["experts"],
            num_experts_per_tok=SETTINGS["of a token"],
        )
    )
    model.load_state_dict(llama.state_dict(), strict=False)
    for layer, stock in zip(model.model.layers, llama.model.layers, strict=True):
        experts: Any = layer.mlp.experts
        gates_and_values = torch.cat([stock.mlp.gate_proj.weight, stock.mlp.up_proj.weight])
        for own, weight in ((experts.gate_up_proj, gates_and_values), (experts.down_proj, stock.mlp.down_proj.weight)):
            own.data = weight.data + SETTINGS["noise"] * weight.std() * torch.randn(own.shape)
    return model


def trained(bench: Benchmark, folder: Path) -> MixtralForCausalLM:
    """The mixture, trained; made at the first call."""
    path = folder / "experts.pt"
    if not path.exists():
        model = upcycled(bench.dense(), seed=0)
        bench.fine_tune(model, SETTINGS["lr"], 0)
        folder.mkdir(parents=True, exist_ok=True)
        keep(model, path)
    return torch.load(path, weights_only=False)


def cut(bench: Benchmark, model: nn.Module, target: Any, importance: Any, seed: int) -> tuple[nn.Module, Any]:
    """The model cut at once, and the report."""
    torch.manual_seed(seed)
    model = bp.to_variational(copy.deepcopy(model), estimator="mean").eval()
    example = {"input_ids": torch.tensor([bench.train[0]["input_ids"]])}
    granularity = ("heads", "mlp")
    data = bench.calibration(seed)
    if isinstance(importance, Taylor):
        for batch in data:
            model(**batch).loss.backward()
    report = bp.prune_channels(model, example, target, granularity=granularity, importance=importance, data=data)
    return model, report


def rounded(bench: Benchmark, model: nn.Module, width: int, compensate: Any, seed: int) -> nn.Module:
    """The model with weights of its layers of this width."""
    model = bp.to_variational(copy.deepcopy(model), filter_fn=in_layers, estimator="mean").eval()
    bp.quantize(model, bench.calibration(seed), bits={"model.layers": width}, compensate=compensate)
    return model


def thinned(
    bench: Benchmark, model: nn.Module, how: Cut, target: str, seed: int, shares: dict[str, float] | None
) -> tuple[nn.Module, dict[str, float] | None]:
    """The model without some of its single weights, and what share each matrix lost by ours."""
    torch.manual_seed(seed)
    model = bp.to_variational(copy.deepcopy(model), filter_fn=in_layers, estimator="mean").eval()
    if how == OUR_CUT:
        return model, ours(model, bench.calibration(seed), TARGETS[target], divided=how.divided)
    has_shares = how.divided and TARGETS[target].sparsity is not None  # in a pattern all lose alike
    control(model, bench.calibration(seed), how, TARGETS[target], shares if has_shares else None)
    return model, None


def markdown(runs: list[dict[str, Any]]) -> str:
    """The page."""
    (dense,) = (row for row in runs if row["score"] == "dense")
    levels = sorted({row["kept"] for row in runs if "kept" in row}, reverse=True)
    texts = {name.partition(" ")[0]: value for name, value in SETTINGS.items()}
    head = {"levels": " | ".join(f"{level:.0%} of the parameters" for level in levels), "rules": "---|" * len(levels)}
    text = INTRODUCTION.format(
        **texts, token=SETTINGS["of a token"], params=dense["parameters"], dense=dense["test"], **head
    )
    for score in dict.fromkeys(row["score"] for row in runs if "kept" in row):
        of = [[row["test"] for row in runs if row["score"] == score and row.get("kept") == each] for each in levels]
        text += f"| {score} | {' | '.join(spread(values) for values in of)} |\n"
    thin = [row for row in runs if "weights" in row]
    targets = list(dict.fromkeys(row["weights"] for row in thin))
    text += WEIGHTS.format(targets=" | ".join(targets), rules="---|" * len(targets)) if thin else ""
    for score in (name for name in CUTS if any(row["score"] == name for row in thin)):
        cells = []
        for target in targets:
            values = [row["test"] for row in thin if row["score"] == score and row["weights"] == target]
            cells.append(spread(values) + (f" ({len(values)})" if 0 < len(values) < 3 else ""))
        text += f"| {score} | {' | '.join(cells)} |\n"
    coarse = [row for row in runs if "width" in row]
    heads = {"widths": " | ".join(f"{width} bits" for width in WIDTHS), "rules": "---|" * len(WIDTHS)}
    text += BITS.format(**heads) if coarse else ""
    for score in ROUNDINGS if coarse else ():
        of = [[row["test"] for row in coarse if row["score"] == score and row["width"] == width] for width in WIDTHS]
        text += f"| {score} | {' | '.join(spread(values) for values in of)} |\n"
    return text


@dataclass
class Rows:
    """Finished runs, each written at once.

    Attributes:
        out: The file.
        runs: What it holds.
    """

    out: Path
    runs: list[dict[str, Any]]

    def done(self, **key: Any) -> dict[str, Any] | None:
        """The run with these entries."""
        return next((row for row in self.runs if key.items() <= row.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        """Writes a run down."""
        self.runs.append(row)
        write(self.out, SETTINGS, self.runs)
        print(row, flush=True)


def run_units(bench: Benchmark, model: nn.Module, rows: Rows, seeds: list[int], default: str) -> None:
    """Hidden units and heads; the default alone, where it has another name."""
    for seed, kept in itertools.product(seeds, LEVELS):
        sizes = (rows.done(score=default, kept=kept, seed=seed) or {}).get("sizes")
        for score in (default, *(CONTROLS if default == DEFAULT else ())):
            if rows.done(score=score, kept=kept, seed=seed):
                continue
            target = f"params={kept}" if score == default else sizes
            importance = None if score == default else CONTROLS[score]()
            small, report = cut(bench, model, target, importance, seed)
            sizes = report.sizes if score == default else sizes
            row = {"score": score, "kept": kept, "seed": seed, "how": report.how, "sizes": report.sizes}
            rows.add(row | {"test": bench.perplexity(small, bench.test)})


def run_weights(bench: Benchmark, model: nn.Module, rows: Rows, seeds: list[int]) -> None:
    """Single weights."""
    first = next(iter(CUTS))
    for seed, target, (score, how) in itertools.product(seeds, TARGETS, CUTS.items()):
        shares = (rows.done(score=first, weights=target, seed=seed) or {}).get("shares")
        if not rows.done(score=score, weights=target, seed=seed):
            thin, shares = thinned(bench, model, how, target, seed, shares)
            row = {"score": score, "weights": target, "seed": seed, "shares": shares}
            rows.add(row | {"test": bench.perplexity(thin, bench.test)})


def run_bits(bench: Benchmark, model: nn.Module, rows: Rows, seeds: list[int]) -> None:
    """Rounded weights."""
    for seed, width, (score, compensate) in itertools.product(seeds, WIDTHS, ROUNDINGS.items()):
        if not rows.done(score=score, width=width, seed=seed):
            coarse = rounded(bench, model, width, compensate, seed)
            row = {"score": score, "width": width, "seed": seed}
            rows.add(row | {"test": bench.perplexity(coarse, bench.test)})


def main() -> None:
    """Runs what is missing, then writes the page."""
    options = parser(__doc__ or "", "docs/benchmarks/experts.json")
    options.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "bayesprune-experts")
    options.add_argument("--only", choices=("units", "weights", "bits"), help="what of the three is run")
    options.add_argument("--before", action="store_true", help="units by the default, named as what it was before")
    args = options.parse_args()
    torch.set_num_threads(1)
    rows = Rows(args.out, read(args.out, SETTINGS))
    if not args.table:
        settings = Settings(steps=SETTINGS["steps"], calibration=SETTINGS["stories"])
        bench = Benchmark(Path(args.data_dir), args.out, [], settings)
        model = trained(bench, args.work)
        if not rows.done(score="dense"):
            number = sum(p.numel() for p in model.parameters())
            rows.add({"score": "dense", "test": bench.perplexity(model, bench.test), "parameters": number})
        parts = ("units",) if args.before else (args.only,) if args.only else ("units", "weights", "bits")
        if "units" in parts:
            run_units(bench, model, rows, args.seeds, "what it was before" if args.before else DEFAULT)
        if "weights" in parts:
            run_weights(bench, model, rows, args.seeds)
        if "bits" in parts:
            run_bits(bench, model, rows, args.seeds)
    args.out.with_suffix(".md").write_text(markdown(rows.runs), encoding="utf-8")


if __name__ == "__main__":
    main()
