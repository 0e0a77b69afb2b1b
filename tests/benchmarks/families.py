"""The table of model families in docs/benchmarks/families.md: what works for each family of transformers.

    python tests/benchmarks/families.py

Every family is a tiny model with random weights, made from its config; no network is needed. Each has a process of its
own, so that a crash costs one row, and a fresh process that loads what was saved. Rows that
docs/benchmarks/families.json holds already are kept; delete the file, or name families with `--only`, to run them
again.
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from families_models import FAMILIES, build, example_inputs, prompt
from families_page import page
from rows import (
    DOCS,
    NONE,
    OK,
    ROOT,
    attempt,
    back,
    fresh_process,
    gives_what_was_saved,
    is_equal,
    outputs,
    run_rows,
    save_with_outputs,
    train_one_step,
)


def run_family(name: str) -> dict[str, Any]:
    """The row of one family, all checks but those of the fresh process run in this one."""
    import torch

    import bayesprune as bp
    from bayesprune.prune.trace import has_heads

    torch.set_num_threads(1)
    family = FAMILIES[name]
    inputs = family.inputs()

    def loss(network: Any) -> Any:
        return network(**inputs).loss

    row: dict[str, Any] = {"family": name, "model": family.model}
    model = build(family)
    stock = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    before = outputs(model, inputs)
    bp.to_variational(model)
    table = bp.conversion_table(model)
    row["layers"] = {status: sum(r.status == status for r in table) for status in ("converted", "fallback", "left")}
    row["left"] = sorted({f"{r.type}: {r.reason}" for r in table if r.status == "left"})
    attempt(row, "exact", lambda: OK if is_equal(outputs(model, inputs), before) else "the output changed")
    attempt(row, "step", lambda: train_one_step(model, loss))
    with tempfile.TemporaryDirectory() as folder:
        directories: dict[str, Path] = {}

        def masked() -> str:
            bp.prune_weights(model, sparsity=0.5)
            directories["masked"] = save_with_outputs(model, Path(folder) / "masked", inputs)
            return OK

        fresh = bp.to_variational(build(family), std="per_channel")

        def heads() -> str:
            if not any(map(has_heads, fresh.modules())):
                return NONE
            report = bp.prune_channels(fresh, example_inputs(name), target={"macs": 0.95}, granularity=("heads",))
            row["heads_removed"] = sum(map(len, report.removed_heads.values()))
            return OK

        def neurons() -> str:
            report = bp.prune_channels(fresh, example_inputs(name), target={"macs": 0.85}, granularity=("mlp", "width"))
            row["neurons_removed"] = sum(map(len, report.removed.values()))
            row["left_whole"] = sorted(set(report.left_whole.values()))
            return train_one_step(fresh, loss)

        def keep_cut() -> str:
            bp.to_deterministic(fresh)
            directories["cut"] = save_with_outputs(fresh, Path(folder) / "cut", inputs)
            return OK

        attempt(row, "masked", masked)
        are_cut = [attempt(row, "heads", heads), attempt(row, "neurons", neurons)]
        if any(are_cut):
            attempt(row, "cut_loaded", keep_cut)
        attempt(row, "back", lambda: back(model, stock, keys, inputs))
        loaded = fresh_process(__file__, "--load", name, *map(str, directories.values())) if directories else {}
        for check, directory in directories.items():
            column = "masked" if check == "masked" else "cut_loaded"
            row[column] = loaded.get(directory.name, loaded.get("error", "the fresh process said nothing"))
        row["generate"] = loaded.get("generate", "not cut") if prompt(name) else NONE
    row.setdefault("cut_loaded", "not cut")
    return row


def load(name: str, directories: list[Path]) -> dict[str, str]:
    """Whether each directory loads by both routes to the outputs that it holds; run in a fresh process."""
    import torch
    import transformers

    torch.set_num_threads(1)
    family = FAMILIES[name]
    auto = getattr(transformers, family.auto)
    found: dict[str, str] = {}
    for directory in directories:
        if directory.name == "cut":
            try:
                auto.from_pretrained(directory)
            except Exception:  # noqa: BLE001 (that it fails is what is asked for)
                continue
            found["cut"] = "from_pretrained without bayesprune loaded it silently"
    assert "bayesprune" not in sys.modules

    import bayesprune as bp

    inputs = family.inputs()
    for directory in directories:
        if directory.name in found:
            continue
        result: dict[str, Any] = {}
        for route, loader in (("load", bp.load), ("from_pretrained", auto.from_pretrained)):
            attempt(result, route, partial(gives_what_was_saved, loader, directory, inputs))
        wrong = [f"{route}: {said}" for route, said in result.items() if said != OK]
        found[directory.name] = "; ".join(wrong) or OK
        if directory.name == "cut" and (tokens := prompt(name)):
            attempt(found, "generate", partial(generate, bp.load(directory), tokens))
    return found


def generate(model: Any, tokens: dict[str, Any]) -> str:
    found = [model.generate(**tokens, max_new_tokens=4, do_sample=False, use_cache=cache) for cache in (True, False)]
    return OK if is_equal(found[:1], found[1:]) else "other tokens with a cache than without"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FAMILIES)
    parser.add_argument("--out", type=Path, default=DOCS / "families")
    parser.add_argument("--row", choices=FAMILIES, help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(run_family(args.row)))
    elif args.load:
        print(json.dumps(load(args.load[0], [Path(directory) for directory in args.load[1:]])))
    else:
        packages = ("torch", "transformers", "torch-pruning")
        run_rows(__file__, FAMILIES, args.only, args.out, packages=packages, page=page)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
