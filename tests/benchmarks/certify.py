"""Verified accuracy of the MNIST network, dense and cut to 97-71-33, between certificates and an attack.

    python tests/benchmarks/certify.py --data-dir DATA --work WORK
    python tests/benchmarks/certify.py --table

WORK is the folder of mnist.py's networks; what it lacks is trained. Rows that docs/benchmarks/certify.json has are not
repeated.
"""

import copy
import time
from itertools import product
from pathlib import Path
from typing import Any

import common
import torch
from mnist import Benchmark, _cutter, _phase, error
from mnist_methods import Network, mlp, network, train, without_posterior
from mnist_tasks import POSTERIOR, TASKS
from mnist_units import compact

import bayesprune as bp

EPSILONS = (0.01, 0.02, 0.03, 0.05, 0.1)
NETWORKS = ("784-300-100", "97-71-33")
SETTINGS = {"images": 100, "sdp_images": 20, "sdp_steps": 150, "attack_steps": 40}

TEXT = """# Certificates of the MNIST network

Written by `python tests/benchmarks/certify.py --table` from certify.json, the results of the same program; run it with
`--data-dir` and `--work` to make the rows again.

784-300-100-10 as it was trained, and cut to 97 inputs and 71 and 33 units by its posterior as in [MNIST](mnist.md);
neither training knew of attacks. Entries of an image go from 0 to 1, and so do the changed ones. The first {images}
test images; the semidefinite bound the first {sdp_images}, {sdp_steps} steps. It works on what the linear bound left
open and the attack did not break; its seconds contain those of the linear bound. One core, shared with other work:
compare the seconds of a table among themselves.

Each cell: percent verified by the bound, the number of images in brackets above it. "Attack" is the percent that is
still right under projected gradient descent ({attack_steps} steps, two starts), which no bound can exceed.

**Read it with these in mind.** Intervals prove next to nothing of networks that were not trained for them; lines prove
most of what can be proved up to 0.02, and the semidefinite bound closes a part of the rest for a thousand times the
cost. The pruned network withstands more, and more of it is proved, for two reasons that the table does not separate: it
has fewer ReLUs whose sign is open, and it reads 97 pixels, so that a change of the other 687 does nothing. Its linear
certificate is some thirty times cheaper. Its semidefinite one is cheaper by less per image, because far fewer of its
images are left out as broken by the attack, and each step on so small a network is overhead for the most part.
"""


def units_cut(benchmark: Benchmark, seed: int) -> Network:
    """97-71-33 by the posterior, as the rows of mnist.py have it."""
    path = benchmark.work / f"certify-units-{seed}.pt"
    if not path.exists():
        task = next(task for task in TASKS if task.name == "MNIST units")
        data = benchmark.data(task, validation=False)
        net, _ = benchmark.tuned(task, POSTERIOR, seed, None, validation=False)
        torch.manual_seed(seed + 100)
        for level in task.levels:
            train(net, data, _phase(task.cut, level.cut), cut=_cutter(net, task, level, POSTERIOR), cuts=24)
            compact(net)
        done = without_posterior(net)
        train(done, data, _phase(task.after, task.levels[-1].after))
        common.keep(done, path)
    return torch.load(path, weights_only=False)


def made(benchmark: Benchmark, name: str, seed: int) -> Network:
    """The network of this name."""
    if name == NETWORKS[1]:
        return units_cut(benchmark, seed)
    task = next(task for task in TASKS if task.name == "MNIST units")
    state, _ = benchmark.dense(task, seed, benchmark.data(task, validation=False), validation=False)
    net = network(mlp(), prior=None)
    net.model.load_state_dict({k: v for k, v in state.items() if "log_std" not in k}, strict=False)
    return net


def page(settings: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The tables of verified accuracy and of seconds."""
    parts = [TEXT.format(**settings), "", "## Verified accuracy", ""]
    few, many = settings["sdp_images"], settings["images"]
    heads = [f"{method} ({images})" for method, images in _cells(settings)]
    parts += ["| network | eps | " + " | ".join([*heads, f"attack ({many})", f"attack ({few})"]) + " |"]
    parts += ["|---|---|" + "---|" * 6]
    for name, eps in product(NETWORKS, EPSILONS):
        cells = [
            _mean(rows, "verified", network=name, eps=eps, method=method, images=images)
            for method, images in _cells(settings)
        ]
        attacks = [
            _mean(rows, "withstands", network=name, eps=eps, method=method, images=settings[key])
            for method, key in (("linear", "images"), ("sdp", "sdp_images"))
        ]
        shown = [f"{value:.1f}" if value is not None else "" for value in (*cells, *attacks)]
        parts.append(f"| {name} | {eps:g} | " + " | ".join(shown) + " |")
    parts += [
        "",
        "## Seconds an image",
        "",
        "| network | eps | " + " | ".join(heads) + " |",
        "|---|---|---|---|---|---|",
    ]
    for name, eps in product(NETWORKS, EPSILONS):
        cells = [
            _mean(rows, "seconds", network=name, eps=eps, method=method, images=images)
            for method, images in _cells(settings)
        ]
        shown = [f"{value:.3g}" if value is not None else "" for value in cells]
        parts.append(f"| {name} | {eps:g} | " + " | ".join(shown) + " |")
    errors = {name: _mean(rows, "error", network=name) for name in NETWORKS}
    told = ", ".join(f"{name} {value:.2f}" for name, value in errors.items() if value is not None)
    seeds = sorted({row["seed"] for row in rows})
    return "\n".join([*parts, "", f"Test error in percent, all 10,000 images: {told}. Seeds: {seeds}.", ""])


def _cells(settings: dict[str, Any]) -> list[tuple[str, int]]:
    few, many = settings["sdp_images"], settings["images"]
    return [("interval", many), ("linear", many), ("linear", few), ("sdp", few)]


def _mean(rows: list[dict[str, Any]], value: str, **key: Any) -> float | None:
    found = [row[value] for row in rows if all(row[name] == wanted for name, wanted in key.items())]
    return sum(found) / len(found) if found else None


def main() -> None:
    """Runs what the results file does not have yet, then writes the page."""
    parser = common.parser("Certificates of the MNIST network.", "docs/benchmarks/certify.json")
    parser.add_argument("--work", type=Path, default=Path("work-mnist"), help="folder of mnist.py's networks")
    options = parser.parse_args()
    rows = common.read(options.out, SETTINGS)
    if not options.table:
        torch.set_num_threads(1)
        benchmark = Benchmark(options.work / "certify-rows.json", options.work, options.data_dir)
        for seed, name, (method, images), eps in product(options.seeds, NETWORKS, _cells(SETTINGS), EPSILONS):
            key = {"network": name, "seed": seed, "method": method, "eps": eps, "images": images}
            if not any(all(row[part] == wanted for part, wanted in key.items()) for row in rows):
                rows.append(key | measured(benchmark, key))
                common.write(options.out, SETTINGS, rows)
                print(time.strftime("%H:%M:%S"), rows[-1], flush=True)
    options.out.with_suffix(".md").write_text(page(SETTINGS, rows), encoding="utf-8")


def measured(benchmark: Benchmark, key: dict[str, Any]) -> dict[str, float]:
    """What one certificate found, in percent of the images; seconds an image."""
    net = made(benchmark, key["network"], key["seed"])
    data = benchmark.data(TASKS[1], validation=False)
    model = bp.to_deterministic(copy.deepcopy(net.model))
    x, y = net.see(data.test_images[: key["images"]]), data.test_labels[: key["images"]]
    steps = {"num_steps": SETTINGS["sdp_steps"], "attack_steps": SETTINGS["attack_steps"]}
    found = bp.certify(model, x, y, key["eps"], key["method"], box=(0.0, 1.0), **steps)
    return {
        "verified": round(100 * float(found.verified.double().mean()), 2),
        "withstands": round(100 * float((~found.attacked).double().mean()), 2),
        "seconds": round(found.seconds / len(y), 5),
        "error": error(net, data),
    }


if __name__ == "__main__":
    main()
