"""Where the time of a training step goes: torch's kernels by kind, and what lies between them."""

import os
from collections import defaultdict
from collections.abc import Callable
from time import process_time
from typing import Any

from torch.profiler import ProfilerActivity, profile

KINDS = {
    "products": (
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "linear",
        "convolution",
        "mkldnn_convolution",
        "convolution_backward",
    ),
    "passes over tensors": ("mul", "add", "addcmul", "sub", "div", "square", "pow", "sum", "copy_", "fill_", "clamp"),
    "sums by products with vectors": ("mv", "addmv_"),
    "powers of two and roots": ("exp2", "exp", "sqrt", "rsqrt"),
    "Adam": ("_fused_adam_",),
}
REST, BETWEEN = "the network's other functions", "between kernels"
_STEPS = 8


def where_time_goes(run: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of a step by kind of kernel, and between them: Python, torch's dispatch, and the profiler itself."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own start and stop lines
    kinds = {name: kind for kind, names in KINDS.items() for name in names}
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        start = process_time()
        for _ in range(_STEPS):
            run()
        total = 1e3 * (process_time() - start) / _STEPS
    found: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        if event.key.startswith("aten::"):
            name = event.key.removeprefix("aten::")
            found[kinds.get(name, kinds.get(name.removesuffix("_"), REST))] += event.self_cpu_time_total / 1e3 / _STEPS
    return {kind: round(ms, 3) for kind, ms in (found | {BETWEEN: total - sum(found.values())}).items()}


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Lines of Markdown: kinds by rows that were profiled."""
    profiled = {name: row["profile"] for name, row in rows.items() if "profile" in row}
    if not profiled:
        return []
    lines = [f"| ms of a step | {' | '.join(profiled)} |", "|---" * (len(profiled) + 1) + "|"]
    for kind in (*KINDS, REST, BETWEEN):
        cells = (f"{found.get(kind, 0.0):.1f}" for found in profiled.values())
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return [*lines, ""]
