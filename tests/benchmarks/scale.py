"""Time and memory of pruning large models by stage: random ViT-B, ViT-L, ConvNeXt-L and Llamas of 2,048 wide layers.

    python tests/benchmarks/scale.py             # what docs/benchmarks/scale.json has not yet, and its page
    python tests/benchmarks/scale.py --only vit_large_patch16_224 --chains files     # these alone
    python tests/benchmarks/scale.py --imports   # the time of `import bayesprune` over that of `import torch`
    python tests/benchmarks/scale.py --table     # only the page

Every model goes through four chains of stages, each in a process of its own, on one thread. Time is that of the
processor. Memory is what the process holds before a stage, and by how much it grows in it at most.
"""

import copy
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import common
import torch
from overhead import in_process, memory, reset_peak
from scale_page import WITHOUT_DATA, page
from torch import nn

import bayesprune as bp
from bayesprune.laplace import KroneckerPosterior
from bayesprune.prune.channels import prune as channels
from bayesprune.prune.graph.find import groups_in
from bayesprune.prune.graph.group import ChannelGroup
from bayesprune.prune.graph.observe import Observed
from bayesprune.prune.graph.removal import lost_inputs
from bayesprune.prune.scores.channels import Importance, lowest_units, unit_scores

OUT = Path("docs/benchmarks/scale.json")
QUICK = "quick"
MODELS = ("vit_base_patch16_224", "vit_large_patch16_224", "convnext_large", "llama 2", "llama 4", "llama 16")
_PARTS = {  # of prune_channels with data: the functions that it calls
    "groups_in": "graph",
    "unit_costs": "posterior and scores",
    "searched_tilt": "search over divisions",
    "compensate": "compensation",
    "_attempt": "cut",
    "recalibrate_if_better": "check of batch norm",
}
_ROUNDS = 7  # of imports

Stage = Callable[[str, Callable[[], Any]], Any]


@dataclass(frozen=True)
class Settings:
    """What the measurements depend on beside the machine."""

    torch_version: str = str(torch.__version__)
    num_threads: int = 1
    std: str = "per_channel"
    target: str = "macs=0.5"
    images: tuple[int, int] = (2, 4)
    sequences: tuple[int, int, int] = (2, 2, 128)


def build(name: str, settings: Settings) -> tuple[nn.Module, Any, list[Any]]:
    """A model with random weights, example inputs, and batches of calibration data."""
    torch.manual_seed(0)
    if name == QUICK:
        layers = [nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)]
        return nn.Sequential(*layers).eval(), torch.randn(1, 8), [torch.randn(16, 8) for _ in range(2)]
    if name.startswith("llama"):
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=int(name.split()[1]),
            num_attention_heads=32,
            num_key_value_heads=8,
        )
        number, *shape = settings.sequences
        batches = [{"input_ids": torch.randint(0, 1024, tuple(shape))} for _ in range(number)]
        return LlamaForCausalLM(config).eval(), {"input_ids": batches[0]["input_ids"][:1]}, batches
    import timm

    number, size = settings.images
    batches = [torch.randn(size, 3, 224, 224) for _ in range(number)]
    return timm.create_model(name).eval(), batches[0][:1], batches


class Stages:
    """What the stages of a chain took, in the order in which they began; one may run inside another.

    Attributes:
        rows: Of each its name, the processor seconds, the bytes that the process held before and at most.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._open: list[dict[str, Any]] = []

    def run(self, title: str, what: Callable[[], Any]) -> Any:
        """What the function returns."""
        row = {"name": title, "held": memory("VmRSS"), "peak": 0}
        self._see_peak()
        self.rows.append(row)
        self._open.append(row)
        start = time.process_time()
        result = what()
        row["seconds"] = round(time.process_time() - start, 3)
        self._see_peak()
        self._open.pop()
        size = (row["peak"] - row["held"]) / 2**30
        print(f"  {title}: {row['seconds']:.1f} s, {size:.2f} GiB", flush=True)
        return result

    def _see_peak(self) -> None:
        highest = memory("VmHWM")
        for row in self._open:
            row["peak"] = max(row["peak"], highest)
        reset_peak()


def measured(name: str, chain: str, settings: Settings) -> dict[str, Any]:
    """A run of the results file."""
    model, inputs, batches = build(name, settings)
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    stages = Stages()
    stages.run("convert", lambda: bp.to_variational(model, std=settings.std))
    CHAINS[chain](model, inputs, batches, settings, stages.run)
    return {"name": name, "chain": chain, "parameters": num_weights, "stages": stages.rows}


def files(model: nn.Module, inputs: Any, batches: list[Any], settings: Settings, stage: Stage) -> None:
    """Pruning without data, saving and loading."""
    stage("prune_channels, no data", lambda: bp.prune_channels(model, inputs, settings.target))
    bp.to_deterministic(model)
    with tempfile.TemporaryDirectory() as directory:
        stage("save", lambda: bp.save(model, directory))
        is_plain = isinstance(model, nn.Sequential)
        stage("load", lambda: bp.load(directory, model=copy.deepcopy(model) if is_plain else None))


def posterior(model: nn.Module, inputs: Any, batches: list[Any], settings: Settings, stage: Stage) -> None:
    """A posterior, ranking by it, and conditioning on half of the units of each group."""
    loss = bp.laplace.output_metric

    def fit() -> KroneckerPosterior:
        return bp.laplace.fit_kronecker(model, batches, loss=loss, num_positions=128)

    fitted = stage("fit_kronecker", fit)
    groups = stage("graph", lambda: groups_in(Observed(model, inputs)).groups)
    lost = stage("unit scores", lambda: _lost(groups, bp.prune.UnitSNRImportance(model, fitted)))
    stage("condition_on_channels", lambda: bp.laplace.condition_on_channels(model, fitted, lost))


def compensation(model: nn.Module, inputs: Any, batches: list[Any], settings: Settings, stage: Stage) -> None:
    """Making up for half of the units of each group."""
    lost = _lost(groups_in(Observed(model, inputs)).groups, bp.SNRImportance())
    stage("compensate", lambda: bp.laplace.compensate(model, batches, lost))


def _lost(groups: Iterable[ChannelGroup], importance: Importance) -> dict[str, list[int]]:
    """The inputs that layers lose when the worse half of the units of each group goes."""
    scored = [found for group in groups if (found := unit_scores(importance, group)) is not None]
    return lost_inputs([(its.group, lowest_units(its.group, its.scores, len(its.scores) // 2)) for its in scored])


def data(model: nn.Module, inputs: Any, batches: list[Any], settings: Settings, stage: Stage) -> None:
    """Pruning with data, and what its parts take."""
    with ExitStack() as stack:
        for name, title in _PARTS.items():
            run = getattr(channels, name)
            timed = partial(stage, f"prune_channels, data: {title}")
            stack.enter_context(mock.patch.object(channels, name, partial(_staged, timed, run)))
        stage("prune_channels, data", lambda: bp.prune_channels(model, inputs, settings.target, data=batches))


def _staged(stage: Callable[[Callable[[], Any]], Any], run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return stage(partial(run, *args, **kwargs))


CHAINS = {"files": files, "posterior": posterior, "compensation": compensation, "data": data}


def import_times(rounds: int = _ROUNDS) -> dict[str, list[float]]:
    """Processor seconds of fresh processes that import torch, and that import this library, which take turns."""
    programs = {"torch": "import torch", "bayesprune": "import bayesprune"}
    found: dict[str, list[float]] = {name: [] for name in programs}
    ending = "; import time; print(time.process_time())"
    for _ in range(rounds):
        for name, program in programs.items():
            ran = subprocess.run([sys.executable, "-c", program + ending], capture_output=True, text=True, check=True)
            found[name].append(float(ran.stdout))
    return found


def names_of(options: Namespace) -> Iterator[tuple[str, str]]:
    """Models and chains that the options ask for."""
    names = [QUICK] if options.quick else MODELS
    for name in names:
        for chain in CHAINS:
            is_wanted = options.only is None or name in options.only
            if is_wanted and chain in options.chains and not (chain == "data" and name in WITHOUT_DATA):
                yield name, chain


def main() -> None:
    """Measures what the results file does not have yet, then writes the page."""
    parser = common.parser("Pruning at scale.", str(OUT))
    parser.add_argument("--only", nargs="+", help="these models alone, such as 'llama 2'")
    parser.add_argument("--chains", nargs="+", default=list(CHAINS), help=", ".join(CHAINS))
    parser.add_argument("--imports", action="store_true", help="the time of imports, and nothing else")
    parser.add_argument("--quick", action="store_true", help="a network of a few weights: whether the program runs")
    options = parser.parse_args()
    settings = Settings()
    torch.set_num_threads(settings.num_threads)
    runs = common.read(options.out, asdict(settings))
    if options.imports or (options.quick and not options.table):
        runs = [run for run in runs if run["chain"] != "imports"]
        runs.append({"name": "imports", "chain": "imports", "seconds": import_times(1 if options.quick else _ROUNDS)})
        common.write(options.out, asdict(settings), runs)
    done = {(run["name"], run["chain"]) for run in runs}
    for name, chain in [] if options.table or options.imports else names_of(options):
        if (name, chain) not in done:
            print(f"{name}, {chain}:", flush=True)
            runs.append(in_process(measured, name, chain, settings))
            common.write(options.out, asdict(settings), runs)
    options.out.with_suffix(".md").write_text(page(runs, asdict(settings)), encoding="utf-8")


if __name__ == "__main__":
    main()
