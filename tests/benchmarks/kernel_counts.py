"""How many kernels a training step launches, over the deterministic step: a number that no machine changes.

    python tests/benchmarks/kernel_counts.py          # what docs/benchmarks/kernels.json has not yet, and its page
    python tests/benchmarks/kernel_counts.py --only mlp --names --out kernels.json   # prints which kernels a row adds
    python tests/benchmarks/kernel_counts.py --table  # only the page

One eager step of zero_grad, forward, loss, backward, the hook and AdamW (foreach, on both sides) is counted on a
processor, but along the paths that are taken on a GPU: each operation of torch that reaches a device counts once, views
and allocations not. A `_foreach_` operation counts once where its tensors are alike, as torch then has one kernel for
all of them, and once for every tensor where it has to go through them one by one.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import torch
from speed_ways import LR, NETWORKS, NUM_DATA, Task, task
from torch import Tensor
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.utils._python_dispatch import TorchDispatchMode

import bayesprune as bp
from bayesprune.foundation import device
from bayesprune.layers import variational_layers

OUT = Path("docs/benchmarks/kernels.json")
ROWS = (
    ("per_channel", "weight_sampling"),
    ("per_weight", "weight_sampling"),
    ("rank_one", "weight_sampling"),
    ("per_channel", "local_reparameterization"),
    ("rank_one", "local_reparameterization"),
    ("per_weight", "local_reparameterization"),
)
PHASES = ("forward", "backward", "hook and optimizer")
_STEPS = 4  # a step in so many has a forward at the means, for batch norm
_FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"),
    *("_unsafe_view", "promote_types", "_record_function_enter_new", "_record_function_exit", "_local_scalar_dense"),
}


@dataclass(frozen=True)
class Settings:
    """What the counts depend on."""

    torch_version: str = str(torch.__version__)
    steps: int = _STEPS


class Counting(TorchDispatchMode):
    """Counts kernels by the names of operations, while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func._schema.name.partition("::")[2]
        is_seed = name == "random_"  # of the stream on the processor
        if not (func.is_view or name in _FREE or is_seed):
            self.kernels[name] += num_kernels(args) if name.startswith("_foreach_") else 1
        return func(*args, **(kwargs or {}))


def num_kernels(args: Sequence[Any]) -> int:
    """One where the lists of an operation hold tensors alike in shape, strides and dtype, else one for each."""
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
    alike = all(
        one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype
        for others in lists[1:]
        for one, other in zip(lists[0], others, strict=True)
    )
    is_dense = all(is_non_overlapping_and_dense_or_false(one) for tensors in lists for one in tensors)
    return 1 if alike and is_dense and len({one.dtype for one in lists[0]}) == 1 else len(lists[0])


def count(of: Task, std: str | None, estimator: str | None) -> list[Counter[str]]:
    """Kernels by phase and name, summed over the steps."""
    model = copy.deepcopy(of.net)
    if std is not None:
        model = bp.to_variational(model, std=std)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, foreach=True)
    if std is not None:
        bp.attach(optimizer, model, num_data=NUM_DATA)
        for _, layer in variational_layers(model):
            layer.estimator = str(estimator)
    model.train()
    found = [Counter() for _ in PHASES]
    for number in range(-2, _STEPS):  # what is made once is made in the first two
        optimizer.zero_grad()
        loss = _counted(lambda: of.loss(model(of.x)), found[0], number)
        _counted(loss.backward, found[1], number)
        _counted(optimizer.step, found[2], number)
    return found


def _counted(run: Callable[[], Any], into: Counter[str], number: int) -> Any:
    with Counting() as counting:
        result = run()
    if number >= 0:
        into.update(counting.kernels)
    return result


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, the library takes the paths for devices on which a kernel has to be launched."""
    before, device.CHEAP_CALLS = device.CHEAP_CALLS, set()
    try:
        yield
    finally:
        device.CHEAP_CALLS = before


def counted(name: str, *, names: bool = False) -> dict[str, Any]:
    """A run of the results file: kernels a step, by row and phase."""
    of, rows = task(name), {}
    with as_on_a_gpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = count(of, None, None)
        for std, estimator in ROWS:
            found = count(of, std, estimator)
            rows[f"{std}, {estimator}"] = [sum(phase.values()) / _STEPS for phase in found]
            ratio = sum(rows[f"{std}, {estimator}"]) / sum(sum(phase.values()) / _STEPS for phase in base)
            print(f"  {name}: {std}, {estimator}: {sum(rows[f'{std}, {estimator}']):.0f}, {ratio:.2f}", flush=True)
            for phase, mine, its in zip(PHASES, found, base, strict=True) if names else ():
                more = {key: value / _STEPS for key, value in (mine - its).most_common()}
                print(f"    {phase}: {', '.join(f'{key} {value:g}' for key, value in more.items())}")
    return {"name": name, "deterministic": [sum(phase.values()) / _STEPS for phase in base], "rows": rows}


def page(runs: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# Kernels of a training step", "", *(__doc__ or "").split("\n\n", 2)[2].strip().splitlines(), ""]
    lines = [
        "# Kernels of a training step",
        "",
        "Written by `python tests/benchmarks/kernel_counts.py`.",
        "",
        *lines[2:],
    ]
    for run in runs:
        base = sum(run["deterministic"])
        lines += [f"## {NETWORKS[run['name']]}", "", f"| | kernels | over the deterministic | {' | '.join(PHASES)} |"]
        lines += ["|---|---|---|---|---|---|"]
        for row, phases in {"deterministic": run["deterministic"], **run["rows"]}.items():
            cells = " | ".join(f"{phase:.0f}" for phase in phases)
            lines.append(f"| {row} | {sum(phases):.0f} | {sum(phases) / base:.2f} | {cells} |")
        lines.append("")
    return "\n".join([*lines, f"Settings: {', '.join(f'{key} {value}' for key, value in settings.items())}.", ""])


def main() -> None:
    """Counts, and writes the results and the page."""
    parser = common.parser("Kernels of a training step.", str(OUT))
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), help="these networks alone")
    parser.add_argument("--names", action="store_true", help="print the kernels that each row adds, by name")
    options = parser.parse_args()
    settings = asdict(Settings())
    torch.set_num_threads(1)
    runs = common.read(options.out, settings)
    done = {run["name"] for run in runs}
    for name in [] if options.table else options.only:
        if name not in done:
            runs.append(counted(name, names=options.names))
            common.write(options.out, settings, runs)
    options.out.with_suffix(".md").write_text(page(runs, settings), encoding="utf-8")


if __name__ == "__main__":
    main()
