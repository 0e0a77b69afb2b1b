"""Time and peak memory of conversion and channel removal, beside torch-pruning alone, and how they grow with depth.

    python tests/benchmarks/overhead.py           # measures, writes docs/benchmarks/overhead.json
    python tests/benchmarks/overhead.py --table   # writes docs/benchmarks/overhead.md from it

Every measurement has a process of its own, ours and torch-pruning's take turns, and the median of three is reported (of
the MLPs one). Times are seconds of processor time on one thread, so that other programs on the machine change them
little; memory is by how much the process grows at most. Models have random weights, on the CPU. torch-pruning is given
the ratio that leads to half of the MACs, found beforehand, which its user has to search.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).absolute().parents[2]
RESULTS = ROOT / "docs" / "benchmarks" / "overhead"
KEPT = 0.5
MODELS = ("resnet50", "vit_base_patch16_224", "convnext_base")
DEPTHS = (125, 250, 500, 1000, 2000)  # of MLPs
LAST_DEPTH = 1000  # of torch-pruning alone, whose time grows with the square and more
WHAT = {
    "convert": "to_variational",
    "prune": "prune_channels by SNR, variational model",
    "prune_stock": "prune_channels by magnitude, stock model",
    "torch_pruning": "torch-pruning by magnitude, stock model",
}
REPEATS = 3


def build(name: str) -> tuple[Any, Any]:
    """The model, and the input that it is traced on."""
    import timm
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name.startswith("mlp_"):
        depth, width = int(name.removeprefix("mlp_")), 16
        hidden = (layer for _ in range(depth - 2) for layer in (nn.Linear(width, width), nn.ReLU()))
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), *hidden, nn.Linear(width, 4)).eval(), torch.randn(1, 8)
    return timm.create_model(name, num_classes=100).eval(), torch.randn(1, 3, 224, 224)


def measure(what: str, name: str, ratio: float | None) -> dict[str, float]:
    """Seconds, bytes, and the share of the MACs that stays, of one call in this process."""
    import torch_pruning as tp

    import bayesprune as bp
    from bayesprune.foundation.macs import macs_by_module

    model, inputs = build(name)
    dense = sum(macs_by_module(model, inputs).values())
    if what == "prune":
        bp.to_variational(model)
    calls: dict[str, Callable[[], object]] = {
        "convert": lambda: bp.to_variational(model),
        "prune": lambda: bp.prune_channels(model, inputs, target=f"macs={KEPT}"),
        "prune_stock": lambda: bp.prune_channels(
            model, inputs, target=f"macs={KEPT}", importance=tp.importance.MagnitudeImportance(p=2)
        ),
        "torch_pruning": lambda: prune_with_torch_pruning(model, inputs, ratio or 0.3),
    }
    before = memory("VmRSS")
    reset_peak()
    start = time.process_time()
    calls[what]()
    seconds, peak = time.process_time() - start, memory("VmHWM") - before
    return {"seconds": seconds, "bytes": peak, "kept": sum(macs_by_module(model, inputs).values()) / dense}


def prune_with_torch_pruning(model: Any, inputs: Any, ratio: float) -> None:
    """The stock pruner, told the output layer and the heads as in its own examples."""
    import torch_pruning as tp
    from torch import nn

    attention = [m for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")]
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model,
        inputs,
        tp.importance.MagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[last],
        num_heads={m.qkv: m.num_heads for m in attention},
        prune_head_dims=False,
        prune_num_heads=bool(attention),
        head_pruning_ratio=ratio,
    )
    pruner.step()
    for module in attention:
        module.num_heads = pruner.num_heads[module.qkv]
        module.head_dim = module.qkv.out_features // (3 * module.num_heads)
        if hasattr(module, "attn_dim"):
            module.attn_dim = module.head_dim * module.num_heads


def ratio_for(name: str) -> float:
    """The ratio of channels with which torch-pruning comes nearest to the MACs asked for, by bisection."""
    low, high = 0.2, 0.6
    for _ in range(4):
        middle = (low + high) / 2
        kept = in_process(measure, "torch_pruning", name, middle)["kept"]
        low, high = (low, middle) if kept < KEPT else (middle, high)
    return (low + high) / 2


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns in a process that starts with nothing but the imports of this one."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*args)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def medians(name: str, whats: tuple[str, ...], ratio: float | None) -> dict[str, dict[str, float]]:
    """The medians of measurements that take turns."""
    found: dict[str, list[dict[str, float]]] = {what: [] for what in whats}
    for _ in range(REPEATS if ratio is None or name in MODELS else 1):
        for what in whats:
            found[what].append(in_process(measure, what, name, ratio))
            print(name, what, found[what][-1], flush=True)
    return {w: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for w, runs in found.items()}


def run(path: Path) -> None:
    """Measures what the results lack."""
    done = json.loads(path.read_text()) if path.is_file() else {"models": {}, "depths": {}}
    packages = ("torch", "timm", "torch-pruning")
    done["versions"] = {package: version(package) for package in packages} | {"python": platform.python_version()}
    for name in (name for name in MODELS if name not in done["models"]):
        ratio = ratio_for(name)
        done["models"][name] = {"ratio": ratio} | medians(name, tuple(WHAT), ratio)
        path.write_text(json.dumps(done, indent=1) + "\n")
    for depth in (depth for depth in DEPTHS if str(depth) not in done["depths"]):
        whats = tuple(what for what in WHAT if what != "torch_pruning" or depth <= LAST_DEPTH)
        done["depths"][str(depth)] = medians(f"mlp_{depth}", whats, 1 - KEPT**0.5)
        path.write_text(json.dumps(done, indent=1) + "\n")


def page(done: dict[str, Any]) -> str:
    """The page of the documentation."""
    versions = ", ".join(f"{name} {number}" for name, number in done["versions"].items())
    lines = ["# Time and memory", "", *(__doc__ or "").strip().splitlines()[5:], "", f"({versions})", ""]
    lines += [*(f"- **{what.replace('_', ' ')}**: {said}" for what, said in WHAT.items()), ""]
    lines += [
        "The last columns are `prune` and `prune stock` over torch-pruning alone. Much of the difference is",
        "forward passes, three of them, seven where there is attention; torch-pruning runs the model once.",
        "`prune_channels` counts MACs in the forward that it traces and in one after the cut, and checks by",
        "experiment that channels hang together as the graph says and that a model without a head is the model that",
        "ignores it. torch-pruning's time grows with the square of the number of layers, because it scans the whole",
        "graph for every group.",
        "",
    ]
    rows = done["models"] | {f"MLP of {depth} layers": row for depth, row in done["depths"].items()}
    lines += ["## Models", "", *_table(rows), "", "## Depth: MLPs of width 16", ""]
    lines += ["Milliseconds for each layer; constant where time grows linearly.", ""]
    lines += ["| layers | " + " | ".join(what.replace("_", " ") for what in WHAT) + " |", "|---|" + "---|" * len(WHAT)]
    for depth, row in done["depths"].items():
        cells = [f"{1000 * row[what]['seconds'] / int(depth):.2f}" if what in row else "not run" for what in WHAT]
        lines.append(f"| {depth} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _table(rows: dict[str, Any]) -> list[str]:
    header = ["model", *(f"{what.replace('_', ' ')}: s, MiB" for what in WHAT), "time", "memory"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for name, row in rows.items():
        found = {what: row.get(what) for what in WHAT}
        cells = [f"{r['seconds']:.2f}, {r['bytes'] / 2**20:.0f}" if r else "not run" for r in found.values()]
        for key in ("seconds", "bytes"):
            alone = row.get("torch_pruning", {}).get(key)
            shares = [f"{row[what][key] / alone:.2f}x" for what in ("prune", "prune_stock")] if alone else ["-"]
            cells.append(" and ".join(shares))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def reset_peak() -> None:
    """Makes VmHWM, the most that this process held at once, begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(key: str) -> int:
    """Bytes that this process holds, "VmRSS", or held at most, "VmHWM"."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    path = args.out.with_suffix(".json")
    if not args.table:
        warnings.simplefilter("ignore")
        import timm  # noqa: F401 (here, so that the processes of the measurements need not)
        import torch
        import torch_pruning  # noqa: F401

        import bayesprune  # noqa: F401

        torch.set_num_threads(1)
        run(path)
    args.out.with_suffix(".md").write_text(page(json.loads(path.read_text())))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
