"""What a training step costs on one thread, beside the deterministic step: every estimator and structure, and peers.

    python tests/benchmarks/speed.py                  # what docs/benchmarks/speed.json has not yet; about 10 minutes
    python tests/benchmarks/speed.py --compile        # compiled networks as well: more, most of it compiling
    python tests/benchmarks/speed.py --profile        # where the time goes anew, on a quiet machine; a minute
    python tests/benchmarks/speed.py --table          # only the page and the plot

All ways of a network run in turn, once a round, in an order drawn anew; a cost is the median over rounds of the
processor time of a way over that of the deterministic one in the same round. A step is zero_grad, forward, loss,
backward, the hook, and Adam (fused, on both sides). Peers are measured where they are installed, see `speed_peers.py`.
"""

import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from speed_measure import measure, step
from speed_peers import installed, peers
from speed_profile import where_time_goes
from speed_table import page, plot, with_overview
from speed_ways import AGAIN, NETWORKS, OF_SCALING, PROFILED, QUICK, SCALES, Task, Way, deterministic, ours, task

OUT = Path("docs/benchmarks/speed.json")


@dataclass(frozen=True)
class Settings:
    """All that a measurement depends on beside the machine and the peers that are there."""

    torch_version: str = str(torch.__version__)
    instructions: str = torch.backends.cpu.get_cpu_capability()
    num_threads: int = 1
    seconds: int = 60
    seconds_of_scaling: int = 8
    shortest: float = 0.02


def ways_of(of: Task, name: str) -> list[Way]:
    """Everything to measure of a network, or the few of a point of the scaling lines."""
    base = deterministic(of)
    if name in NETWORKS or name == QUICK:
        if of.compiled:
            return [base, *(way for way in ours(of) if way.name in PROFILED)]
        return [base, deterministic(of, AGAIN), *ours(of), *peers(of)]
    return [base, *(way for way in ours(of) if way.name in OF_SCALING)]


def measured(name: str, settings: Settings, *, compiled: bool = False) -> dict[str, Any]:
    """A run of the results file."""
    start = time.perf_counter()
    print(f"{name}{', compiled' if compiled else ''}:", flush=True)
    is_scaling = name not in NETWORKS and name != QUICK
    ways = ways_of(task(name, compiled=compiled), name)
    seconds = settings.seconds_of_scaling if is_scaling else settings.seconds
    parts = {"memories": not is_scaling, "predictions": not is_scaling}
    found = measure(ways, seconds=seconds, shortest=settings.shortest, **parts)
    if not (is_scaling or compiled):  # fused kernels have none of torch's names
        add_profiles(found["rows"], ways)
    for row in found["rows"]:
        print(f"  {row['name']:40} {row['step']['ratio']:6.2f}", flush=True)
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    return {"name": name, "compiled": compiled, "peers": {} if is_scaling or compiled else installed()} | found


def add_profiles(rows: list[dict[str, Any]], ways: list[Way]) -> None:
    """Adds where the time of a step goes, of some ways; it counts wall time, which other programs change."""
    by_name = {row["name"]: row for row in rows if row["name"] in PROFILED}
    for way in (way for way in ways if way.name in by_name):
        way.prepare()
        way.model.train()
        for _ in range(2):
            step(way)
        by_name[way.name]["profile"] = where_time_goes(partial(step, way))
        way.optimizer.zero_grad()


def names_of(options: Namespace) -> list[tuple[str, bool]]:
    """What the options ask for: names, and whether they are compiled."""
    if options.quick:
        return [(QUICK, False)]
    points = [f"{what} {value}" for what, values in SCALES.items() for value in values]
    wanted = [(name, False) for name in (*NETWORKS, *points)]
    if options.compile:
        wanted += [(name, True) for name in NETWORKS]
    return [pair for pair in wanted if options.only is None or pair[0] in options.only]


def main() -> None:
    """Measures what the results file does not have yet, then writes the page and the plot."""
    parser = common.parser("Cost of a training step.", str(OUT))
    parser.add_argument(
        "--only", nargs="+", help="these networks or points only, such as mlp, or layers 4 as 'layers 4'"
    )
    parser.add_argument("--compile", action="store_true", help="measure compiled networks as well")
    parser.add_argument("--quick", action="store_true", help="a network of a few weights: whether the program runs")
    parser.add_argument("--profile", action="store_true", help="only where the time goes, of what is measured")
    options = parser.parse_args()
    settings = Settings(seconds=0, shortest=0.0) if options.quick else Settings()
    torch.set_num_threads(settings.num_threads)
    torch._dynamo.config.recompile_limit = 100
    runs = common.read(options.out, asdict(settings))
    done = {(run["name"], run["compiled"]) for run in runs}
    if options.profile:
        for run in (run for run in runs if run["name"] in NETWORKS and not run["compiled"]):
            add_profiles(run["rows"], ways_of(task(run["name"]), run["name"]))
        common.write(options.out, asdict(settings), runs)
    for name, compiled in [] if options.table or options.profile else names_of(options):
        if (name, compiled) not in done:
            runs.append(measured(name, settings, compiled=compiled))
            torch._dynamo.reset()
            common.write(options.out, asdict(settings), runs)
    plot(runs, options.out.with_suffix(".png"))
    options.out.with_suffix(".md").write_text(page(runs, asdict(settings)), encoding="utf-8")
    if options.out.resolve() == OUT.resolve():
        overview = OUT.parents[1] / "speed.md"
        overview.write_text(with_overview(overview.read_text(encoding="utf-8"), runs), encoding="utf-8")


if __name__ == "__main__":
    main()
