"""Bytes against accuracy for networks that were trained elsewhere, rounded from 1,024 training examples.

    python tests/benchmarks/bits_trained.py --data-dir DATA --network resnet20 [--nncodec NNC/bin/python]
    python tests/benchmarks/bits_trained.py --data-dir DATA --network resnet20 --train [medium]
    python tests/benchmarks/bits_trained.py --table

Each control has one width for all tensors, a step for each row, and the same compensation as ours, by the same code:
each layer is fitted to what it gave before rounding, or, "each layer alone", GPTQ with the inputs that layers had
before rounding. Ours then has to fit the bytes of that control's coded file. Where weights were removed first,
`prune_one_shot` did so with the same examples, in rows of both kinds. "Posterior" is what `quantize` gives a stock
model: by the gradients of its logits; "of the loss", by those of its loss, which fade where a network is sure. ISO NNC
is that of nncodec, whose environment is made by hand (`nncodec_peer.py`). Rows that are "trained on" are held to their
grids (`bits.StraightThrough`) for about half an epoch, or for two where they say so, taught by the dense network
(temperature 4, weight 0.9); their learning rates were chosen on validation images with seed 0. All others train
nothing. Files that have no header are counted without one. Seeds are draws of the examples. Finished rows are written
at once and skipped when the program runs again.
"""

import copy
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import common
import torch
from bits import HEADER, file_size
from bits_controls import eight_bits, k_means_huffman, nnc
from fair_tasks import LRS, Task, is_right, task
from fair_training import RECALIBRATION_BATCHES, Way, train
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.reports import accuracy

Row = dict[str, Any]
WIDTHS = (8, 4, 3)
KEPT = (1.0, 0.4)
"""Shares of the weights, before the rounding."""
CLUSTERS = (32, 16)
QPS = (-34, -30, -26, -22, -18)
"""Quantization parameters of ISO NNC, from fine to coarse: four more double the step."""
TIMES = 20
"""What is asked of the posterior beside the controls' bytes: a file so many times smaller than float32."""
TRAINED_WIDTH = 2
"""Of the control that is trained on; ours has to fit its bytes."""
SETTINGS = {"widths": WIDTHS, "kept": KEPT, "clusters": CLUSTERS, "times": TIMES}
ONE, OURS, SMALL = "one width", "posterior", f"posterior, {TIMES} times smaller"
ALONE = ", each layer alone"
COMPENSATIONS: dict[str, Any] = {"": True, ALONE: "alone"}
"""What rows say of the compensation, and what `quantize` is told."""
BY_LOSS = f"posterior of the loss{ALONE}"
"""By the gradients of the loss, labels drawn from the predictions, in place of those of the logits."""
TRAINED = {"short": "trained on", "medium": "trained on for two epochs"}
"""What rows of each regime say behind the method."""
UNITS = {"k-means + Huffman": "means", "ISO NNC": "qp"}
"""Of what a control is asked for, where it is not bits."""
TITLES = {
    "resnet20": "ResNet-20, CIFAR-10: accuracy in %, 5,000 test images",
    "resnet56": "ResNet-56, CIFAR-10: accuracy in %, 5,000 test images",
    "minilm": "MiniLM, SST-2: accuracy in %, 872 sentences",
    "tinystories": "Llama of 656,000 parameters, TinyStories: perplexity of the test text",
}


@dataclass(frozen=True)
class Net:
    """A trained network, the examples of a seed, and its figure on test data."""

    dense: nn.Module
    calibration: Callable[[int], list[Any]]
    figure: Callable[[nn.Module], float]


def resnet(name: str, data_dir: Path) -> Net:
    """A CIFAR-10 ResNet."""
    of = task(name, data_dir)

    def accuracy(model: nn.Module) -> float:
        return 100 * float(is_right(model, of.images["test"]).double().mean())

    return Net(bp.to_deterministic(copy.deepcopy(of.dense)), of.calibration, accuracy)


def llama(name: str, data_dir: Path) -> Net:
    """The language model of TinyStories, with 128 stories to calibrate."""
    from tinystories import Benchmark, Settings

    benchmark = Benchmark(data_dir, Path(), [], Settings())
    return Net(
        benchmark.dense().eval(), benchmark.calibration, lambda model: benchmark.perplexity(model, benchmark.test)
    )


def minilm(name: str, data_dir: Path) -> Net:
    """The sentence classifier of SST-2, kept in the folder of `sst2.py`; embeddings are weights like all others."""
    from sst2 import Benchmark, Settings
    from sst2_at_once import calibration, dense

    benchmark = Benchmark(data_dir, Path("build/sst2"), Path(), [], Settings())
    return Net(
        dense(benchmark),
        partial(calibration, benchmark, is_labelled=True),
        lambda model: 100 * accuracy(model, benchmark.batches("dev")),
    )


NETWORKS = {"resnet20": resnet, "resnet56": resnet, "tinystories": llama, "minilm": minilm}


class Rows:
    """The results file."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def all(self) -> list[Row]:
        """Those that are finished."""
        return common.read(self.out, SETTINGS)

    def find(self, key: Row) -> Row | None:
        """The row with this key."""
        return next((row for row in self.all() if key.items() <= row.items()), None)

    def add(self, key: Row, make: Callable[[], Row]) -> Row:
        """The row with this key, measured where it is not there."""
        if (found := self.find(key)) is not None:
            return found
        start = time.process_time()
        row = key | make() | {"cpu_seconds": round(time.process_time() - start, 1)}
        common.write(self.out, SETTINGS, [*self.all(), row])
        print(time.strftime("%H:%M:%S"), row, flush=True)
        return row


def measure(
    rows: Rows, name: str, net: Net, seed: int, shares: list[float], asked: list[int], nncodec: str | None = None
) -> None:
    """All rows of a network and a draw of the examples; those of ISO NNC by this interpreter, where there is one."""
    random.seed(seed)
    torch.manual_seed(seed)
    size = 4 * sum(parameter.numel() for parameter in net.dense.parameters())
    key: Row = {"network": name}
    rows.add(key | {"method": "float32"}, lambda: {"bytes": size, "figure": net.figure(net.dense)})
    for kept in shares:
        model = copy.deepcopy(net.dense)
        batches = net.calibration(seed)
        key = {"network": name, "kept": kept, "seed": seed}
        if kept < 1:
            model = bp.to_variational(model, estimator="mean").eval()
            bp.prune_one_shot(model, batches, f"weights={kept}")
            model = bp.to_deterministic(model)
            rows.add(key | {"method": "float32, coded"}, lambda model=model: figures(net, model, file_size(model)))
        known = cache(partial(with_posterior, model, batches, bp.laplace.output_metric))
        known_by_loss = cache(partial(with_posterior, model, batches, bp.laplace.sampled_cross_entropy))
        for method, function, options in (
            ("8 bit + LZMA", eight_bits, (None,)),
            ("k-means + Huffman", k_means_huffman, CLUSTERS),
            ("ISO NNC", partial(nnc, interpreter=nncodec or ""), QPS if nncodec else ()),
        ):
            for option in options:
                rows.add(
                    key | {"method": method, "setting": option},
                    lambda function=function, option=option, model=model: control(net, model, function, option),
                )
        for said, compensate in COMPENSATIONS.items():
            make = partial(rounded, net, batches, compensate)
            if TIMES in asked:
                rows.add(
                    key | {"method": SMALL + said},
                    lambda known=known, make=make: make(known(), bytes=size // TIMES - HEADER),
                )
            for width in (width for width in WIDTHS if width in asked):
                one = rows.add(
                    key | {"method": ONE + said, "setting": width},
                    lambda width=width, known=known, make=make: make(known(), bits=width, per="channel"),
                )
                for method, posterior in ((OURS + said, known), (BY_LOSS, known_by_loss))[: 1 + (said == ALONE)]:
                    rows.add(
                        key | {"method": method, "setting": width},
                        lambda one=one, posterior=posterior, make=make: make(posterior(), bytes=one["bytes"] - HEADER),
                    )


def measure_training(rows: Rows, of: Task, net: Net, seed: int, regime: str) -> None:
    """The rows that are trained on, of a network and a draw of the examples."""
    batches = net.calibration(seed)
    size = next(row["bytes"] for row in rows.all() if row["network"] == of.name and row["method"] == "float32")
    one: Row = {}
    for (alone, compensate), (method, setting) in itertools.product(
        COMPENSATIONS.items(), ((ONE, TRAINED_WIDTH), (OURS, TRAINED_WIDTH), (SMALL, None))
    ):
        said = f"{method}{alone}, {TRAINED[regime]}"
        key: Row = {"network": of.name, "kept": 1.0, "method": said, "setting": setting}
        rates = LRS[of.name] if seed == 0 else [best_rate([row for row in rows.all() if key.items() <= row.items()])]
        for lr in rates:
            asked: Row = {"compensate": compensate}
            if method == ONE:
                asked |= {"bits": TRAINED_WIDTH, "per": "channel"}
            else:
                asked["bytes"] = (size // TIMES if method == SMALL else one["bytes"]) - HEADER
            row = rows.add(
                key | {"seed": seed, "lr": lr},
                lambda asked=asked, lr=lr: trained_on(net, of, batches, asked, lr, seed, regime),
            )
            one = row if method == ONE else one


def trained_on(net: Net, of: Task, batches: list[Any], asked: Row, lr: float, seed: int, regime: str) -> Row:
    """Rounded, then trained on, held to the grids."""
    model = copy.deepcopy(net.dense)
    report = bp.quantize(model, batches, **asked)
    torch.manual_seed(seed)
    num_steps, held = of.steps(regime), list[bp.bits.StraightThrough]()
    train(
        of,
        model,
        of.draw(num_steps, seed + 1_000, True),
        range(num_steps),
        num_steps,
        Way("posterior", "", "", "", lr=lr, distilled=True),
        before=lambda optimizer: held.append(bp.bits.StraightThrough(optimizer, model, report)),
    )
    bp.prune.recalibrate_batch_norm(model, of.draw(RECALIBRATION_BATCHES, seed + 100, True))
    held[0].finish()
    validation = 100 * float(is_right(model, of.images["validation"]).double().mean())
    return figures(net, model, file_size(model)) | {"validation": validation}


def best_rate(rows: list[Row]) -> float:
    """The learning rate that was best on validation images with seed 0."""
    return max((row for row in rows if row["seed"] == 0), key=lambda row: row["validation"])["lr"]


def with_posterior(model: nn.Module, batches: list[Any], metric: Callable[..., Tensor]) -> nn.Module:
    """A copy with the posterior that `quantize` gives a stock model, or that of another metric, once for all rows."""
    found = bp.to_variational(copy.deepcopy(model), estimator="mean").eval()
    return bp.laplace.fit_laplace(found, batches, loss=metric)


def rounded(net: Net, batches: list[Any], compensate: Any, model: nn.Module, **options: Any) -> Row:
    """A copy rounded with these examples, as an ordinary model."""
    found = copy.deepcopy(model)
    bp.quantize(found, batches, compensate=compensate, **options)
    found = bp.to_deterministic(found)
    return figures(net, found, file_size(found))


def control(net: Net, model: nn.Module, function: Callable[..., int], option: int | None) -> Row:
    """A copy made smaller by a function that returns the bytes."""
    found = copy.deepcopy(model)
    return figures(net, found, function(found, *(() if option is None else (option,))))


def figures(net: Net, model: nn.Module, size: int) -> Row:
    return {"bytes": size, "figure": net.figure(model)}


def page(rows: list[Row]) -> str:
    """The page of the documentation."""
    lines = ["# Bytes of trained networks", "", *(__doc__ or "").strip().splitlines(), ""]
    lines += [
        "Mean over the draws with its standard error, and how many where it is not three. `posterior` was asked for",
        "the bytes of the row of one width above it, or for a file so many times smaller than float32.",
    ]
    for name, title in TITLES.items():
        own = [row for row in rows if row["network"] == name]
        if not own:
            continue
        dense = next(row for row in own if row["method"] == "float32")
        lines += [
            "",
            f"## {title}",
            "",
            "| | weights kept | asked for | bytes | times | figure |",
            "|---|" + "---|" * 5,
        ]
        lines.append(f"| float32 | 1 | | {dense['bytes']:,} | 1 | {dense['figure']:.2f} |")
        kinds = {(row["kept"], row["method"], row.get("setting")): row for row in own if row is not dense}
        for kept, method, setting in sorted(kinds, key=lambda kind: place(*kind)):
            found = [
                row for row in own if (row.get("kept"), row["method"], row.get("setting")) == (kept, method, setting)
            ]
            if "lr" in found[0]:
                rate = best_rate(found)
                found = [row for row in found if row["lr"] == rate]
            size = sum(row["bytes"] for row in found) / len(found)
            asked = "" if setting is None else f"{setting} {UNITS.get(method, 'bits')}"
            is_ours = method.startswith(OURS) and ALONE not in method
            shown = f"**{method}**" if is_ours else method
            lines.append(
                f"| {shown} | {kept:g} | {asked} | {size:,.0f} | {dense['bytes'] / size:.1f} | {cell(found)} |"
            )
    return "\n".join(lines) + "\n"


def place(kept: float, method: str, setting: int | None) -> tuple[float, ...]:
    """Where a row of the table stands: what is given a width, or a control's bytes, beside its control."""
    ways = (ONE, OURS, ONE + ALONE, OURS + ALONE, BY_LOSS)
    if method in ways:
        return (-kept, False, True, -(setting or 0), ways.index(method))
    return (-kept, "trained" in method, False, 0, 0)


def cell(rows: list[Row]) -> str:
    """Mean figure, standard error where there are several, and how many where it is not three."""
    figure = common.spread([row["figure"] for row in rows], 2, of_mean=True)
    return figure + ("" if len(rows) == 3 else f" ({len(rows)})")


def main() -> None:
    """Runs what the results file does not have, or writes the page."""
    options = common.parser("Bytes of trained networks.", "docs/benchmarks/bits_trained.json")
    options.add_argument("--network", choices=NETWORKS, default="resnet20")
    options.add_argument(
        "--kept", type=float, nargs="+", choices=KEPT, default=list(KEPT), help="shares of the weights, without --train"
    )
    options.add_argument(
        "--asked",
        type=int,
        nargs="+",
        choices=(*WIDTHS, TIMES),
        default=[*WIDTHS, TIMES],
        help=f"widths of rows, and {TIMES} for those so many times smaller, without --train",
    )
    options.add_argument("--nncodec", metavar="PYTHON", help="interpreter of an environment with nncodec")
    options.add_argument(
        "--train", nargs="?", choices=TRAINED, const="short", help="the rows that are trained on; of the ResNets"
    )
    args = options.parse_args()
    if args.table:
        args.out.with_suffix(".md").write_text(page(common.read(args.out, SETTINGS)), encoding="utf-8")
        return
    if args.data_dir is None:
        raise SystemExit("--data-dir or BAYESPRUNE_DATA is needed: the folder with cifar10, text and weights.")
    torch.set_num_threads(1)
    net = NETWORKS[args.network](args.network, Path(args.data_dir))
    for seed in args.seeds:
        if args.train:
            measure_training(Rows(args.out), task(args.network, Path(args.data_dir)), net, seed, args.train)
        else:
            measure(Rows(args.out), args.network, net, seed, args.kept, args.asked, args.nncodec)


if __name__ == "__main__":
    main()
