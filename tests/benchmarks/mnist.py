"""MNIST, Fashion-MNIST and LeNet-5 cut to few weights and to few units, by the posterior and by its controls.

Every row of a task starts from the same dense network of its seed, sees the same number of gradients and the same
images. After a tuning phase (variational, plain, or with an L1 penalty) one line of training is cut further and
further; at each level a copy of it is trained on without noise, penalty or further cuts, and measured.

    python tests/benchmarks/mnist.py --data-dir DATA --work WORK
    python tests/benchmarks/mnist.py --table

DATA holds MNIST/raw/*.gz and FashionMNIST/raw/*.gz. Rows that docs/benchmarks/mnist.json has are not repeated; `--work`
keeps the networks before the cuts, which rows share. The L1 weights are chosen here, on the training set's last tenth.
"""

import copy
import gzip
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import common
import torch
from mnist_methods import (
    BATCH,
    Data,
    Network,
    Phase,
    group_lasso,
    keep_weights,
    l1,
    lenet5,
    mlp,
    network,
    num_kept,
    train,
    weight_score,
    without_posterior,
)
from mnist_stops import RULES, stop
from mnist_table import page
from mnist_tasks import ALL, L1, SELECTED, STRUCTURES, TASKS, TUNED, Level, Task
from mnist_units import compact, keep_units, live_units

import bayesprune as bp


def load(directory: Path, name: str, *, validation: bool) -> Data:
    """The data set; with `validation` the last tenth of its training set stands in for the test set."""
    raw = directory / name / "raw"

    def images(part: str) -> torch.Tensor:
        return _read(raw / f"{part}-images-idx3-ubyte.gz", header=16).view(-1, 28, 28).float() / 255

    def labels(part: str) -> torch.Tensor:
        return _read(raw / f"{part}-labels-idx1-ubyte.gz", header=8).long()

    x, y = images("train"), labels("train")
    if validation:
        number = len(y) * 9 // 10
        return Data(x[:number], y[:number], x[number:], y[number:])
    return Data(x, y, images("t10k"), labels("t10k"))


def _read(path: Path, *, header: int) -> torch.Tensor:
    with gzip.open(path) as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)[header:]


@torch.no_grad()
def error(net: Network, data: Data) -> float:
    """Percent of the test (or validation) images given another label, at the posterior means."""
    net.model.eval()
    outputs = [net.model(net.see(images)) for images in data.test_images.split(1000)]
    return round(100 * float((torch.cat(outputs).argmax(1) != data.test_labels).double().mean()), 3)


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and rows of a results file."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["settings"], found["runs"]


class Benchmark:
    """The rows of the results file, and the networks that they start from."""

    def __init__(self, out: Path, work: Path, data_dir: Path) -> None:
        self.out, self.work, self.data_dir = out, work, data_dir
        self.work.mkdir(parents=True, exist_ok=True)
        tasks = {task.name: json.loads(json.dumps(asdict(task))) for task in TASKS}
        self.settings = {"batch": BATCH, "tasks": tasks}
        self.rows: list[dict[str, Any]] = []
        if out.exists():
            found, self.rows = read(out)
            for name in sorted({row["task"] for row in self.rows}):
                if found["tasks"][name] != tasks.get(name):
                    raise SystemExit(f"{out} holds rows of {name} made with other settings; use another --out.")
        self._data: dict[tuple[str, bool], Data] = {}

    def data(self, task: Task, *, validation: bool) -> Data:
        key = (task.data, validation)
        if key not in self._data:
            self._data[key] = load(self.data_dir, *key[:1], validation=validation)
        return self._data[key]

    def find(self, **key: Any) -> dict[str, Any] | None:
        return next((row for row in self.rows if all(row.get(name) == value for name, value in key.items())), None)

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        self.rows.append(row)
        common.write(self.out, self.settings, self.rows)
        self.out.with_suffix(".md").write_text(page(self.settings, self.rows), encoding="utf-8")
        shown = [f"{level['target']}: {level['error']:.2f}" for level in row["levels"]]
        print(time.strftime("%H:%M:%S"), *(row[k] for k in ("task", "method", "seed")), *shown, flush=True)
        return row

    def selected(self, task: Task, method: str) -> float:
        """The setting with the lowest validation error at the task's level of selection, with seed 0."""
        found = {}
        for value in task.choices(method):
            key = {"section": "selection", "task": task.name, "method": method, "seed": 0, SELECTED[method]: value}
            row = self.find(**key) or self.add(key | self.run(task, method, 0, value, validation=True))
            found[value] = row["levels"][-1]["error"]
        return min(found, key=found.__getitem__)

    def measure(self, task: Task, method: str, seed: int) -> None:
        key = {"section": "final", "task": task.name, "method": method, "seed": seed}
        if self.find(**key) is None:
            value = self.selected(task, method) if method in SELECTED else None
            self.add(key | {SELECTED.get(method, "l1"): value} | self.run(task, method, seed, value, validation=False))

    def measure_stop(self, task: Task, rule: str, seed: int) -> None:
        """Where a rule without a number stops, at once."""
        key = {"section": "stops", "task": task.name, "method": rule, "seed": seed}
        if self.find(**key) is None:
            data = self.data(task, validation=False)
            start, _ = self.dense(task, seed, data, validation=False)
            torch.manual_seed(seed + 50)
            phase = replace(task.tune, epochs=12)
            net = stop(rule, start, data, phase)
            share = num_kept(net) / net.total
            level = {"target": "by itself", "share": share, "live": live_units(net), "error": error(net, data)}
            self.add(key | {"levels": [level], "epochs": phase.epochs})

    def run(self, task: Task, method: str, seed: int, setting: float | None, *, validation: bool) -> dict[str, Any]:
        """The cascade of one row."""
        started, data = time.monotonic(), self.data(task, validation=validation)
        if method == TUNED:
            assert setting is not None, "it was selected"
            tune, cut = replace(task.tune, temperature=setting), replace(task.cut, temperature=setting)
            task = replace(task, tune=tune, cut=cut)
        net, before = self.tuned(task, method, seed, setting, validation=validation)
        row: dict[str, Any] = {"error_before": error(net, data), "levels": []}
        if method in STRUCTURES and not task.by_units:
            row["below_1"] = _without_noise(net, data)
        torch.manual_seed(seed + 100)
        net.observes = method in ("obd", "taylor")
        steps = before
        for level in task.levels[: task.selected_at + 1] if validation else task.levels:
            steps += train(net, data, _phase(task.cut, level.cut), cut=_cutter(net, task, level, method), cuts=24)
            compact(net)
            done = without_posterior(net)
            at_once = error(done, data)
            after = train(done, data, _phase(task.after, level.after)) if level.after else 0
            row["levels"].append(
                {
                    "target": level.target,
                    "kept": num_kept(done),
                    "share": num_kept(done) / done.total,
                    "live": live_units(done),
                    "error_at_once": at_once,
                    "error": error(done, data),
                    "gradient_evaluations": steps + after,
                }
            )
        return row | {"seconds": round(time.monotonic() - started)}

    def tuned(
        self, task: Task, method: str, seed: int, setting: float | None, *, validation: bool
    ) -> tuple[Network, int]:
        """The network before the cuts, and the gradients that it has seen; kept in the work directory."""
        data = self.data(task, validation=validation)
        start, steps = self.dense(task, seed, data, validation=validation)
        kind = method.replace(", ", "-") if method in (*STRUCTURES, L1) else "plain"
        kind += f"-{'group' if task.by_units else 'weight'}" if method == L1 else ""
        kind += "" if setting is None else f"-{setting:g}"
        path = self.work / f"{task.data}-{task.net}-{kind}-{seed}-{validation}.pt"
        phase_steps = round(task.tune.epochs * (len(data.labels) // BATCH))
        penalty = None
        if method == L1:
            assert setting is not None, "it was selected"
            penalty = (group_lasso if task.by_units else l1)(setting)
        if path.exists():
            net = torch.load(path, weights_only=False)
            net.penalty = penalty
            return net, steps + phase_steps
        prior = bp.priors.ARD("weight") if method in STRUCTURES else None
        std = STRUCTURES.get(method, "per_weight")
        net = network({"mlp": mlp, "lenet5": lenet5}[task.net](), prior=prior, std=std)
        net.model.load_state_dict({k: v for k, v in start.items() if "log_std" not in k}, strict=False)
        net.penalty = penalty
        torch.manual_seed(seed + 50)
        train(net, data, task.tune)
        common.keep(replace(net, penalty=None), path)
        return net, steps + phase_steps

    def dense(self, task: Task, seed: int, data: Data, *, validation: bool) -> tuple[dict[str, torch.Tensor], int]:
        path = self.work / f"{task.data}-{task.net}-dense-{seed}-{validation}.pt"
        steps = round(task.dense.epochs * (len(data.labels) // BATCH))
        if not path.exists():
            torch.manual_seed(seed)
            net = network({"mlp": mlp, "lenet5": lenet5}[task.net](), prior=None)
            train(net, data, task.dense)
            common.keep(net.model.state_dict(), path)
        return torch.load(path, weights_only=True), steps


def _phase(phase: Phase, epochs: float) -> Phase:
    return replace(phase, epochs=epochs)


def _cutter(net: Network, task: Task, level: Level, method: str) -> Callable[[float], None]:
    """What removes weights or units on the way from what the network has now to the level."""
    score = weight_score(method, net, by_units=task.by_units)
    if isinstance(level.target, tuple):
        pairs = list(zip(live_units(net), level.target, strict=True))
        return lambda t: keep_units(net, [_between(begin, end, t) for begin, end in pairs], score)
    start, count = num_kept(net), round(level.target * net.total / 100)
    return lambda t: keep_weights(net, _between(start, count, t), score)


def _between(begin: float, end: float, done: float) -> int:
    """The cubic ramp of gradual pruning."""
    return round(min(begin, end + (begin - end) * (1 - done) ** 3))


def _without_noise(net: Network, data: Data) -> dict[str, float]:
    """Where SNR < 1 stops by itself: share of the weights that go, and the error at once."""
    cut = copy.deepcopy(net)
    report = bp.prune_weights(cut.model, "snr=1")
    return {"share": report.sparsity, "error": error(cut, data)}


def main() -> None:
    """Runs what the results file does not have yet, then writes the page."""
    parser = common.parser(
        "MNIST, Fashion-MNIST and LeNet-5 at few weights and few units.", "docs/benchmarks/mnist.json"
    )
    parser.add_argument("--work", type=Path, default=Path("work-mnist"), help="folder for networks that rows share")
    parser.add_argument("--tasks", nargs="+", choices=[task.name for task in TASKS], default=None)
    parser.add_argument("--methods", nargs="+", choices=[*ALL, *STRUCTURES, "stops"], default=[*ALL, "stops"])
    options = parser.parse_args()
    if options.table:
        settings, rows = read(options.out)
        options.out.with_suffix(".md").write_text(page(settings, rows), encoding="utf-8")
        return
    if options.data_dir is None:
        parser.error("no data: give --data-dir or set BAYESPRUNE_DATA to the folder that holds MNIST/raw/*.gz")
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    benchmark = Benchmark(options.out, options.work, Path(options.data_dir))
    chosen = [task for task in TASKS if options.tasks is None or task.name in options.tasks]
    cheap = [method for method in STRUCTURES if method != TUNED]
    for method in options.methods:
        if method == "stops":
            for task in chosen:
                for rule in RULES if task.net == "mlp" and not task.by_units else ():
                    for seed in options.seeds:
                        benchmark.measure_stop(task, rule, seed)
        for seed in options.seeds:
            for task in chosen:
                is_tuned = method == TUNED and task.temperatures
                if method in task.methods or is_tuned or (method in cheap and task.net == "mlp"):
                    benchmark.measure(task, method, seed)


if __name__ == "__main__":
    main()
