"""Damages saved directories some ten thousand times, and counts what every load gives.

    python -m tests.benchmarks.fuzz --mutations 12000 --out docs/benchmarks/fuzz.json

One process, bounded in memory (RLIMIT_AS) and in time per load. The table is written beside the results file. A row
under "failures" names the draw: `--only "CASE/ROUTE/NUMBER"` repeats it. Needs Linux, timm and transformers.
"""

import json
import logging
import os
import resource
import sys
import tempfile
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.storage import judging
from tests.storage.fuzz_cases import plain_cases, timm_cases, transformers_cases
from tests.storage.mutations import MUTATIONS

VERDICTS = (judging.RIGHT, judging.OURS, judging.THEIRS, judging.OTHER, *judging.FAILURES)


def main() -> None:
    """Runs the mutations and writes results and table."""
    arguments = parse()
    if arguments.table:
        write_table(arguments.out, json.loads(arguments.out.read_text(encoding="utf-8")))
        return
    arguments.out = arguments.out.resolve()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # code from a file would leave its trace here
        result = run(arguments, Path(folder))
        if Path("CODE_RAN").exists() or list(Path(folder).rglob("CODE_RAN")):
            result["failures"].append({"verdict": "code from a file was run"})
    failures = result["failures"]
    if arguments.only is None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        write_table(arguments.out, result)
    sys.stdout.write(json.dumps(failures, indent=1) + f"\n{len(failures)} failures of {result['mutations']}\n")
    raise SystemExit(bool(failures))


def run(arguments: Namespace, folder: Path) -> dict[str, Any]:
    """Counts by kind, route and verdict, and every failure."""
    shops = {
        name: judging.Workshop(case, folder / str(number))
        for number, (name, case) in enumerate((plain_cases() | timm_cases() | transformers_cases()).items())
    }
    draws = [(name, route) for name, shop in shops.items() for route in shop.case.routes]
    kinds = list(MUTATIONS)
    limit = virtual_memory() + arguments.memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    counts: Counter[tuple[str, str, str]] = Counter()
    failures: list[dict[str, Any]] = []
    slowest, start = 0.0, time.perf_counter()
    for number in range(arguments.mutations):
        case, route = draws[number % len(draws)]
        kind = kinds[number // len(draws) % len(kinds)]
        label = f"{case}/{route}/{number}"
        if arguments.only not in (None, label):
            continue
        verdict, said, seconds = shops[case].judge(kind, route, f"{arguments.seed}/{label}", seconds=arguments.seconds)
        counts[kind, f"{case}, {route}", verdict] += 1
        slowest = max(slowest, seconds)
        if verdict in judging.FAILURES or arguments.only is not None:
            failures.append({"draw": label, "kind": kind, "verdict": verdict, "said": said})
            sys.stderr.write(f"{json.dumps(failures[-1])}\n")
        if number % 1000 == 999:
            sys.stderr.write(f"{number + 1} {time.perf_counter() - start:.0f} s, {len(failures)} failures\n")
    return {
        "settings": {k: v for k, v in vars(arguments).items() if k in ("mutations", "seed", "seconds", "memory_mib")},
        "mutations": sum(counts.values()),
        "seconds": round(time.perf_counter() - start, 1),
        "slowest_load_seconds": round(slowest, 3),
        "counts": [[*key, count] for key, count in sorted(counts.items())],
        "failures": failures,
    }


def write_table(path: Path, result: dict[str, Any]) -> None:
    """The results as a page."""
    settings = result["settings"]
    text = f"""# Damaged files

`python -m tests.benchmarks.fuzz --mutations {settings["mutations"]}` (seed {settings["seed"]}):
{result["mutations"]:,} mutations of saved directories, each loaded once, in {result["seconds"]:,.0f} s. The slowest
load took {result["slowest_load_seconds"]:.1f} s of the {settings["seconds"]:.0f} s it may take; memory was limited to
{settings["memory_mib"]:,} MiB more than the program had before the first. Failures: {len(result["failures"])}.

A load gives the right model (every tensor, output, attribute and configuration value equal), or a `StorageError`, or an
error of timm or transformers about a file that they read before this package is asked, where the time and memory that
they take, and a question of theirs, count as theirs (a long list in `config.json` does). Everything else is a failure:
another model without an error, an error of another kind, too much time or memory, something read, asked or run beside
the files of the directory (Python's audit events tell: files, sockets, processes, questions to the user, who hear "y";
and no tensor may be that of the directory beside it). "Right model" has many rows because not every file matters to
every call (`bp.load` reads no `config.json`) and not every change means something.
The rows "resealed" hold files whose digests were made to fit what was changed: they describe another model, and are
judged by all of this but the model. "Leading out" are keys that name code, kernels, other files or a hub; "asking for
much" are long lists, nested models, huge counts and unknown names.
"""
    lines = text.splitlines()
    for title, column in (("Mutation", 0), ("Directory and route", 1)):
        lines += ["", *table(title, column, result["counts"])]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(title: str, column: int, counts: list[list[Any]]) -> list[str]:
    """The counts by one of their columns and by verdict, as Markdown."""
    sums: Counter[tuple[str, str]] = Counter()
    for row in counts:
        for name in (row[column], "**all**"):
            sums[name, row[2]] += row[3]
    names = [*dict.fromkeys(name for name, _ in sums if name != "**all**"), "**all**"]
    rows = [[name, *(f"{sums[name, verdict]:,}" for verdict in VERDICTS)] for name in names]
    head = [title, *VERDICTS]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---", *["---:"] * len(VERDICTS)], *rows)]


def virtual_memory() -> int:
    """Bytes of address space that this process has now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def parse() -> Namespace:
    """The options."""
    options = ArgumentParser(description=__doc__)
    options.add_argument("--mutations", type=int, default=12_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--seconds", type=float, default=10.0, help="what a load may take")
    options.add_argument("--memory-mib", type=int, default=1024, help="what all loads may take beyond the start")
    options.add_argument("--only", help="repeats one draw: CASE/ROUTE/NUMBER")
    options.add_argument(
        "--out", type=lambda text: Path(text).resolve(), default=Path("docs/benchmarks/fuzz.json").resolve()
    )
    options.add_argument("--table", action="store_true", help="only write the table from the results file")
    return options.parse_args()


if __name__ == "__main__":
    main()
