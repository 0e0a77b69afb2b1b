"""Times and memory of ways to train a network, all of them in turn in one process."""

import gc
import json
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from time import process_time
from typing import Any

import torch
from speed_ways import DETERMINISTIC, Way
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

_FAILURES = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)
_MIN_ROUNDS = 5


class Meter:
    """What times and memory are taken with: the clock of the processor, and torch's allocator there."""

    def timed(self, run: Callable[[], Any]) -> tuple[float, tuple[float, float] | None]:
        """Seconds, and for a training step the shares of the hook and of the optimizer in it."""
        start = process_time()
        marks = run()
        total = process_time() - start
        if not (isinstance(marks, list) and len(marks) > 2):
            return total, None
        hook = marks[3] - marks[2] if len(marks) == 5 else 0.0
        return total, (hook / total, (marks[-1] - marks[1] - hook) / total)

    def peak(self, run: Callable[[], Any]) -> int:
        """The most bytes that are held at once while this runs, over those that were held before."""
        return peak_of(run)


PROCESSOR = Meter()


def step(way: Way) -> list[float]:
    """One training step; the times of its start, after the backward pass, around the hook where there is one, and
    of its end."""
    way.marks.clear()
    start = process_time()
    way.optimizer.zero_grad()
    with way.noise():
        way.loss().backward()
    backward = process_time()
    way.optimizer.step()
    return [start, backward, *way.marks, process_time()]


def measure(
    ways: Sequence[Way],
    *,
    seconds: float,
    shortest: float,
    memories: bool = True,
    predictions: bool = True,
    meter: Meter = PROCESSOR,
) -> dict[str, Any]:
    """Rows of times, memory, and for some where the time goes; ways that fail are named with the reason.

    Args:
        ways: The deterministic one first.
        seconds: About how long to measure, beside the first two steps of each way and its memory.
        shortest: Seconds; what the deterministic network does in less is timed several times in a row.
        memories: Whether to measure memory.
        predictions: Whether to measure predictions, not the step alone.
        meter: What times and memory are taken with.
    """
    failures: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    for way in ways:
        if (failure := _warm_up(way)) is not None:
            failures[way.name] = failure
            continue
        rows[way.name] = {"name": way.name} | ({"memory": memory(way, meter)} if memories else {})
        way.optimizer.zero_grad()
    running = [way for way in ways if way.name in rows]
    phases = ("step", "evaluate", "draw") if predictions else ("step",)
    rounds = {}
    for phase, share in zip(phases, (0.7, 0.1, 0.2) if predictions else (1.0,), strict=True):
        rounds[phase] = _measure_phase(running, phase, share * seconds, shortest, rows, meter)
    return {"rows": list(rows.values()), "failures": failures, "rounds": rounds}


def _warm_up(way: Way) -> str | None:
    """A step and a prediction of each kind; why that fails, None where it does not."""
    way.prepare()
    try:
        way.model.train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a network at its means trains without noise, and is told so
            step(way)
        way.model.eval()
        with torch.no_grad():
            for predict in filter(None, (way.evaluate, way.draw)):
                predict()
    except _FAILURES as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    finally:
        way.optimizer.zero_grad()
    return None


def _measure_phase(
    ways: Sequence[Way], phase: str, seconds: float, shortest: float, rows: dict[str, dict[str, Any]], meter: Meter
) -> int:
    """Fills in one phase of all rows; the number of rounds that fitted into the time."""
    runs = {way.name: run for way in ways if (run := _run(way, phase)) is not None}
    base_name = DETERMINISTIC
    if phase == "draw":  # a prediction of the deterministic network is what a draw is compared with
        runs = {base_name: _run(ways[0], "evaluate")} | runs
    by_name = {way.name: way for way in ways}
    for way in ways:
        way.model.train(phase == "step")
    by_name[base_name].prepare()
    repeats = max(1, round(shortest / max(meter.timed(runs[base_name])[0], 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    shares: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    started, num_rounds = time.perf_counter(), 0
    while num_rounds < _MIN_ROUNDS or time.perf_counter() - started < seconds:
        shuffle(order)
        for name in order:
            by_name[name].prepare()
            if repeats > 1:
                runs[name]()  # its data back into the caches
            taken = [meter.timed(runs[name]) for _ in range(repeats)]
            times[name].append(sum(total for total, _ in taken))
            shares[name] += [share for _, share in taken if share is not None]
            by_name[name].optimizer.zero_grad()
        num_rounds += 1
    for name, of_way in times.items():
        ratios = [mine / base for mine, base in zip(of_way, times[base_name], strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        found = {"ratio": middle, "low": low, "high": high, "ms": 1e3 * median(of_way) / repeats}
        if shares[name]:
            found |= {
                key: median(values)
                for key, values in zip(("hook", "optimizer"), zip(*shares[name], strict=True), strict=True)
            }
        if phase != "draw" or name != base_name:
            rows[name][phase] = {key: round(value, 4) for key, value in found.items()}
    print(f"  {phase}: {num_rounds} rounds of {repeats}, {time.perf_counter() - started:.0f} s", flush=True)
    return num_rounds


def _run(way: Way, phase: str) -> Callable[[], Any] | None:
    if phase == "step":
        return lambda: step(way)
    predict = way.evaluate if phase == "evaluate" else way.draw
    return None if predict is None else torch.no_grad()(predict)


def memory(way: Way, meter: Meter = PROCESSOR) -> dict[str, float]:
    """MiB that live from step to step, and the most that a training step holds on top of them."""
    way.prepare()
    way.model.train()
    way.optimizer.zero_grad()
    gc.collect()
    held = (list(way.model.parameters()), list(way.model.buffers()), way.optimizer.state, way.optimizer.param_groups)
    static = size_of((held, way.state()))
    return {"static_mib": round(static / 2**20, 3), "step_mib": round(meter.peak(lambda: step(way)) / 2**20, 3)}


def size_of(tensors: Any) -> int:
    """Bytes of the tensors in this nested structure, memory that is shared counted once."""
    leaves = (leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))
    storages = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in leaves}
    return sum(storages.values())


def peak_of(run: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator holds at once while this runs, over those that it held before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own start and stop lines
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
