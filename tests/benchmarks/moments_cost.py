"""Cost of moments on one thread, beside the deterministic pass and weight samples: an MLP, ResNet-18, a BERT encoder.

    python tests/benchmarks/moments_cost.py --out docs/benchmarks/moments_cost.json

Every pass of a network runs in turn, once a round, and once before, not counted, to have its own data in the caches. A
cost is the median over rounds of its processor time over that of the deterministic pass in the same round. Networks
that the results file already has are not measured again; the table is written beside it as Markdown. FastBNNs is
measured where it is installed (`pip install fastbnns`).
"""

import copy
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import bayesprune as bp
from bayesprune.moments import parts

NETWORKS = ("mlp", "resnet18", "bert")
TITLES = {
    "mlp": "MLP 784-512-512-10, batch 128",
    "resnet18": "ResNet-18 (timm), 64x64, batch 16",
    "bert": "BERT encoder (4 layers, 256 wide, 4 heads), 64 tokens, batch 16",
}
BASE, COMPILED = "deterministic", "deterministic, compiled"
MOMENTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("per_weight, shared", "per_weight", {}),
    ("per_weight, diagonal", "per_weight", {"covariance": "diagonal"}),
    ("per_channel, shared", "per_channel", {}),
)
TARGETS = {"mlp": 2.5, "resnet18": 4.0, "bert": 2.5}


@dataclass(frozen=True)
class Settings:
    """All that a measurement depends on beside the machine."""

    torch_version: str = str(torch.__version__)
    instructions: str = torch.backends.cpu.get_cpu_capability()
    num_threads: int = 1
    rounds: int = 11
    num_samples: int = 20


class Pass(NamedTuple):
    """One way to run a network.

    Attributes:
        name: Its row.
        model: Whose parameters are trained, and whose mode decides.
        forward: Maps the input to logits, as a tensor, as `Moments`, or as a list of mean and variance.
        repeats: Forwards that make one prediction; more than one is not trained.
    """

    name: str
    model: nn.Module
    forward: Callable[[Tensor], Any]
    repeats: int = 1


def build(network: str) -> tuple[nn.Module, Tensor]:
    """The deterministic network with ten classes and a batch for it."""
    if network == "mlp":
        layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
        return nn.Sequential(*layers), torch.randn(128, 784)
    if network == "resnet18":
        import timm

        return timm.create_model("resnet18", num_classes=10), torch.randn(16, 3, 64, 64)
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=1000, num_labels=10, **shape, **dropout)
    return BertForSequenceClassification(config), torch.randint(0, 1000, (16, 64))


def passes(net: nn.Module, settings: Settings) -> Iterator[Pass]:
    """The rows of the table, the deterministic pass first."""
    yield Pass(BASE, net, net)
    yield Pass(COMPILED, net, torch.compile(net, dynamic=False))
    for name, std, chosen in MOMENTS:
        model = bp.to_variational(copy.deepcopy(net), std=std)
        yield Pass(f"moments, {name}", model, _with(chosen, _under(model, "moments")))
        yield Pass(f"moments, {name}, compiled", model, _with(chosen, bp.prediction.compile_moments(model)))
    sampled = bp.to_variational(copy.deepcopy(net))
    yield Pass("weight sampling, 1 draw", sampled, _under(sampled, "weight_sampling"))
    forward = _under(sampled, "weight_sampling")
    yield Pass(f"weight sampling, {settings.num_samples} draws", sampled, forward, settings.num_samples)
    if importlib.util.find_spec("fastbnns") is not None:
        from fastbnns.bnn.base import BNN
        from fastbnns.bnn.types import MuVar

        peer = BNN(copy.deepcopy(net))
        yield Pass("FastBNNs 0.4.3, moments", peer, lambda x: peer(MuVar(x)))


def _under(model: nn.Module, estimator: str) -> Callable[[Tensor], Any]:
    def forward(x: Tensor) -> Any:
        with bp.sampling(model, estimator):
            return model(x)

    return forward


def _with(chosen: dict[str, Any], inner: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def forward(x: Tensor) -> Any:
        with bp.moments.settings(**chosen):
            return inner(x)

    return forward


def loss(output: Any, labels: Tensor) -> Tensor:
    """Cross-entropy, in expectation to second order where logits have variances."""
    output = getattr(output, "logits", output)
    mean, variance = output if isinstance(output, (list, tuple)) else parts(output)[:2]
    value = F.cross_entropy(mean, labels)
    if variance is None:
        return value
    p = mean.softmax(-1)
    return value + 0.5 * ((p - p.square()) * variance).sum(-1).mean()


def train_step(way: Pass, x: Tensor, labels: Tensor) -> None:
    """Forward and backward; the gradients are left in place."""
    loss(way.forward(x), labels).backward()


def predict(way: Pass, x: Tensor) -> None:
    """As many forwards as a prediction takes."""
    with torch.no_grad():
        for _ in range(way.repeats):
            way.forward(x)


def measure(network: str, settings: Settings) -> dict[str, Any]:
    """All rows of a network: times of a training step and a prediction, memory of a training step."""
    torch.manual_seed(0)
    net, x = build(network)
    labels = torch.randint(0, 10, (len(x),))
    found, failures = [], {}
    for way in passes(net, settings):
        failure = _failure(way, x, labels) if way.name.startswith("FastBNNs") else None
        if failure is None:
            found.append(way)
        else:
            failures[way.name] = failure
    result: dict[str, dict[str, Any]] = {way.name: {"name": way.name} for way in found}
    for phase, run in (("step", train_step), ("prediction", predict)):
        ways = [way for way in found if phase == "prediction" or way.repeats == 1]
        arguments = (x, labels) if phase == "step" else (x,)
        for way in ways:
            way.model.train(phase == "step")
            for _ in range(2):  # compiles, and fills the caches
                run(way, *arguments)
            way.model.zero_grad()
        times: dict[str, list[float]] = {way.name: [] for way in ways}
        for _ in range(settings.rounds):
            for way in ways:
                way.model.train(phase == "step")
                for _ in range(2 if way.repeats == 1 else 1):
                    way.model.zero_grad()
                    started = time.process_time()
                    run(way, *arguments)
                    taken = time.process_time() - started
                times[way.name].append(taken)
                way.model.zero_grad()
        for name, taken in times.items():
            result[name][phase] = _ratios(taken, times)
    for way in found:
        if way.repeats == 1:
            way.model.train()
            result[way.name]["memory"] = memory(way, x, labels)
    return {"network": network, "rows": list(result.values()), "failures": failures}


def _failure(way: Pass, x: Tensor, labels: Tensor) -> str | None:
    """Why a peer cannot train this network; None where it can."""
    try:
        train_step(way, x, labels)
    except (AttributeError, RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    way.model.zero_grad()
    return None


def _ratios(taken: list[float], times: dict[str, list[float]]) -> dict[str, float]:
    def over(base: str) -> float:
        return round(median(a / b for a, b in zip(taken, times[base], strict=True)), 3)

    return {"ms": round(1e3 * median(taken), 3), "of_deterministic": over(BASE), "of_compiled": over(COMPILED)}


def memory(way: Pass, x: Tensor, labels: Tensor) -> dict[str, float]:
    """MiB of parameters, buffers and Adam's two averages, and the most that a step allocates on top of them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        train_step(way, x, labels)
    way.model.zero_grad()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held, peak = 0, 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    parameters = sum(p.numel() * p.element_size() for p in way.model.parameters())
    static = 3 * parameters + sum(b.numel() * b.element_size() for b in way.model.buffers())
    return {"static_mib": round(static / 2**20, 2), "step_mib": round(peak / 2**20, 2)}


def table(runs: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Cost of moments on one thread",
        "",
        "Written by `python tests/benchmarks/moments_cost.py --table` from moments_cost.json, the results of the same",
        "program.",
        "",
        "Times are medians over rounds of the processor time of a pass over that of the deterministic pass in the",
        "same round, eager or compiled. A training step is forward, loss (cross-entropy, in expectation where there",
        "are variances) and backward, without an optimizer; a prediction is a forward without gradients in evaluation",
        "mode. Memory is that of parameters, buffers, Adam's two averages and the most that a step holds on top of",
        "them (gradients, saved activations), over that of the deterministic network; in brackets, what a step holds",
        "alone. All stds are trained; dropout is off.",
        "",
    ]
    for found in runs:
        rows = {row["name"]: row for row in found["rows"]}
        base = rows[BASE]
        lines += [
            f"## {TITLES[found['network']]}",
            "",
            _headline(base, TARGETS[found["network"]]),
            "",
            "| | step | step, of compiled | prediction | prediction, of compiled | memory |",
            "|---|---|---|---|---|---|",
        ]
        for row in found["rows"]:
            step, prediction = (_cells(row.get(phase)) for phase in ("step", "prediction"))
            lines.append(f"| {row['name']} | {step} | {prediction} | {_memory(row, base)} |")
        lines.append("")
        lines += [f"{name} fails: `{reason}`.\n" for name, reason in found["failures"].items()]
    values = ", ".join(f"{name} {value}" for name, value in settings.items())
    return "\n".join([*lines, f"Settings: {values}.", ""])


def _headline(base: dict[str, Any], target: float) -> str:
    used = f"{base['step']['ms']:.1f} ms a step, {base['prediction']['ms']:.1f} ms a prediction"
    whole = f"{sum(base['memory'].values()):.1f} MiB"
    return f"Deterministic: {used}, {whole}. Target of a compiled step with moments: {target}x, memory 2.9x."


def _cells(phase: dict[str, float] | None) -> str:
    return " | ".join(f"{phase[key]:.2f}" if phase else "" for key in ("of_deterministic", "of_compiled"))


def _memory(row: dict[str, Any], base: dict[str, Any]) -> str:
    if "memory" not in row:
        return ""
    used, plain = row["memory"], base["memory"]
    whole = sum(used.values()) / sum(plain.values())
    return f"{whole:.2f} ({used['step_mib'] / plain['step_mib']:.2f})"


def main() -> None:
    """Measures what the results file does not have yet, then writes the table."""
    parser = common.parser("Cost of moments.", "docs/benchmarks/moments_cost.json")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()
    settings = Settings()
    torch.set_num_threads(settings.num_threads)
    runs = common.read(options.out, asdict(settings))
    if not options.table:
        done = {found["network"] for found in runs}
        for network in options.networks:
            if network not in done:
                runs.append(measure(network, settings))
                common.write(options.out, asdict(settings), runs)
    options.out.with_suffix(".md").write_text(table(runs, asdict(settings)), encoding="utf-8")


if __name__ == "__main__":
    main()
