"""What a training step costs on a GPU, beside the deterministic step: weight sampling, and peers, in bf16.

    python tests/benchmarks/gpu.py                          # what docs/benchmarks/gpu.json has not yet, and its page
    python tests/benchmarks/gpu.py --table                  # only the page
    python tests/benchmarks/gpu.py --device cpu --quick --out gpu.json     # whether the program runs

ViT-B/16 and ResNet-50 of timm on images of 224 x 224, under bf16 autocast, eager and compiled. All ways of a network
take turns in one process, in an order drawn anew each round; a number is the median over rounds of the time of a way
over that of the deterministic one in the same round, between CUDA events. A step is zero_grad, forward, loss, backward,
the hook, and Adam, fused for every row but IVON's. Memory is what torch's allocator holds at most in a step, with
parameters, buffers and the optimizer's state, over that of the deterministic network. Peers are measured eagerly, where
they are installed, see `speed_peers.py`. Measurements that would begin after five minutes are left to the next start.
"""

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from speed_measure import PROCESSOR, Meter, measure
from speed_peers import installed, peers
from speed_ways import AGAIN, DETERMINISTIC, QUICK, Task, Way, deterministic, ours, task

OUT = Path("docs/benchmarks/gpu.json")
NETWORKS = {"vit_base_patch16_224": "ViT-B/16", "resnet50": "ResNet-50"}
ROWS = (("per_weight", "weight_sampling"), ("per_channel", "weight_sampling"))
_LAST_START = 300  # seconds; what begins then is over after eight minutes


@dataclass(frozen=True)
class Settings:
    """All that a measurement depends on beside the device and the peers that are there."""

    torch_version: str = str(torch.__version__)
    batch: int = 64
    seconds: int = 20


class CudaMeter(Meter):
    """Times between CUDA events, and memory by torch's allocator on the GPU."""

    def timed(self, run: Callable[[], Any]) -> tuple[float, None]:
        """Seconds from when the device is free to when it has done all of it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, None

    def peak(self, run: Callable[[], Any]) -> int:
        """The most bytes that are held at once while this runs, over those that were held before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def task_of(name: str, settings: Settings, device: torch.device, *, compiled: bool) -> Task:
    """A network of `NETWORKS` and a batch for it, on the device."""
    if name == QUICK:
        of = task(QUICK, compiled=compiled)
        return Task(of.net.to(device), of.x.to(device), of.labels.to(device), compiled)
    import timm

    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=1000).to(device)
    x, labels = torch.randn(settings.batch, 3, 224, 224), torch.randint(0, 1000, (settings.batch,))
    return Task(net, x.to(device), labels.to(device), compiled)


def in_bf16(way: Way, device: torch.device) -> Way:
    """The same, with forward and loss under autocast."""
    loss = way.loss

    def under_autocast() -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return loss()

    way.loss, way.evaluate, way.draw = under_autocast, None, None
    return way


def ways_of(of: Task, device: torch.device) -> list[Way]:
    """The deterministic network, twice, this library's rows, and the peers."""
    found = [deterministic(of), *ours(of, ROWS)]
    if not of.compiled:
        found += [deterministic(of, AGAIN), *peers(of)]
    return [in_bf16(way, device) for way in found]


def measured(name: str, settings: Settings, device: torch.device, *, compiled: bool) -> dict[str, Any]:
    """A run of the results file."""
    print(f"{name}{', compiled' if compiled else ''}:", flush=True)
    started = time.perf_counter()
    of = task_of(name, settings, device, compiled=compiled)
    meter = CudaMeter() if device.type == "cuda" else PROCESSOR
    found = measure(ways_of(of, device), seconds=settings.seconds, shortest=0.0, predictions=False, meter=meter)
    for row in found["rows"]:
        print(f"  {row['name']:40} {row['step']['ratio']:6.2f}", flush=True)
    print(f"  {time.perf_counter() - started:.0f} s", flush=True)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "a processor"
    said = {"name": name, "compiled": compiled, "device": kind, "peers": {} if compiled else installed()}
    return said | found


def page(runs: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# Speed on a GPU", ""]
    if not runs:
        lines += [
            "No GPU has been measured. Where there is one, `python tests/benchmarks/gpu.py` does it in eight minutes",
            "and writes this page; [kernels](kernels.md) counts what a step launches, on any machine. What it does:",
            "",
        ]
    lines += [*(__doc__ or "").strip().split("\n\n", 2)[2].splitlines(), ""]
    for run in runs:
        rows = {row["name"]: row for row in run["rows"]}
        base = rows[DETERMINISTIC]
        title = NETWORKS.get(run["name"], run["name"]) + (", compiled" if run["compiled"] else "")
        held = sum(base["memory"].values())
        lines += [f"## {title}", "", f"{run['device']}: {base['step']['ms']:.2f} ms a step, {held:.0f} MiB.", ""]
        lines += ["| | step | memory |", "|---|---|---|"]
        for name, row in rows.items():
            step = row["step"]
            memory = sum(row["memory"].values()) / held
            lines.append(f"| {name} | {step['ratio']:.2f} ({step['low']:.2f}-{step['high']:.2f}) | {memory:.2f} |")
        lines += ["", *(f"{name} fails: `{reason}`.\n" for name, reason in run["failures"].items())]
    return "\n".join([*lines, f"Settings: {', '.join(f'{key} {value}' for key, value in settings.items())}.", ""])


def checked_device(options: Namespace) -> torch.device:
    """The device to measure on.

    Raises:
        SystemExit: it is a GPU, and there is none.
    """
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "gpu.py measures on a GPU, and torch finds none here: run it where there is one, or see whether the "
            "program runs with --device cpu --quick --out gpu.json."
        )
    if device.type != "cuda" and not options.quick:
        raise SystemExit(f"--device {device.type} only tells whether the program runs; give it --quick and --out.")
    return device


def main() -> None:
    """Measures what the results file does not have yet, then writes the page."""
    parser = common.parser("Cost of a training step on a GPU.", str(OUT))
    parser.add_argument("--device", default="cuda", help='"cuda", or "cpu" with --quick')
    parser.add_argument("--quick", action="store_true", help="a network of a few weights: whether the program runs")
    options = parser.parse_args()
    settings = Settings(seconds=0) if options.quick else Settings()
    runs = common.read(options.out, asdict(settings))
    if not options.table:
        device = checked_device(options)
        torch._dynamo.config.recompile_limit = 100
        torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())
        run = partial(measured, settings=settings, device=device)
        started, done = time.perf_counter(), {(run["name"], run["compiled"]) for run in runs}
        names = [QUICK] if options.quick else list(NETWORKS)
        for compiled, name in ((compiled, name) for compiled in (False, True) for name in names):
            if (name, compiled) not in done and time.perf_counter() - started < _LAST_START:
                runs.append(run(name, compiled=compiled))
                torch._dynamo.reset()
                common.write(options.out, asdict(settings), runs)
    options.out.with_suffix(".md").write_text(page(runs, asdict(settings)), encoding="utf-8")


if __name__ == "__main__":
    main()
