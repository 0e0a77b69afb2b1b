"""What of a smaller model is faster, and what only smaller: PyTorch, torch.export and ONNX Runtime on one core.

    python tests/benchmarks/running.py --data-dir DATA
    python tests/benchmarks/running.py --table

DATA holds weights (see `cifar_resnet.py`). Every model is the CIFAR-10 ResNet-20; seconds are those of one core for a
batch of 32 images, the median of runs that take turns. Accuracy is not looked at here.
"""

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import onnxruntime
import torch
import torch_pruning as tp
from cifar_resnet import trained_resnet20
from torch import nn

import bayesprune as bp
from bayesprune.bits import to_onnx_int8

BATCH, ROUNDS = 32, 15
SETTINGS = {"batch": BATCH, "rounds": ROUNDS, "threads": 1}
TEXT = """# Running it: what is faster, what only smaller

Written by `python tests/benchmarks/running.py --table` from running.json, the results of the same program; run it with
`--data-dir` to make the rows again.

A CIFAR-10 ResNet-20 as it is, with half of its MACs (`prune_channels`), with a tenth of its single weights (zeros),
and with 6-bit weights (`quantize(bits=6)`), exported by `torch.export` and by
`torch.onnx.export(dynamo=True, optimize=False)`. Milliseconds of one core for {batch} images, the median of {rounds}
rounds in which all take turns; the machine was busy, so a tenth more or less says nothing. "int8" is after
`to_onnx_int8`. "Largest difference" is that of ONNX Runtime's outputs from PyTorch's. Some 300 kB of each ONNX file are
its graph.

"""


def models(data_dir: Path) -> dict[str, nn.Module]:
    """The four networks."""
    dense = trained_resnet20(data_dir).eval().to(memory_format=torch.contiguous_format)
    x = torch.randn(64, 3, 32, 32)
    cut, sparse, rounded = (copy.deepcopy(dense) for _ in range(3))
    bp.prune_channels(cut, x[:1], "macs=0.5", importance=tp.importance.MagnitudeImportance())
    sparse = bp.to_variational(sparse)
    bp.prune_weights(sparse, "weights=0.1")
    bp.quantize(rounded, [(x, torch.arange(64) % 10)], bits=6, compensate=False)
    zeros = bp.to_deterministic(sparse).eval()
    return {"as it is": dense, "macs=0.5": cut, "weights=0.1": zeros, "6 bits": rounded}


def session(program: Any) -> onnxruntime.InferenceSession:
    """A session on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(program.SerializeToString(), options)


@torch.no_grad()
def measure(named: dict[str, nn.Module]) -> list[dict[str, Any]]:
    """A row for each model."""
    x = torch.randn(BATCH, 3, 32, 32)
    ways: dict[tuple[str, str], Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, model in named.items():
        exported = torch.export.export(model, (x,)).module()
        program = torch.onnx.export(model, (x,), dynamo=True, optimize=False, verbose=False).model_proto
        row: dict[str, Any] = {"model": name, "onnx_bytes": len(program.SerializeToString())}
        running = session(program)
        feed = {running.get_inputs()[0].name: x.numpy()}
        difference = torch.from_numpy(running.run(None, feed)[0]) - model(x)
        row["difference"] = float(difference.abs().max())
        ways[name, "torch_ms"] = lambda model=model: model(x)
        ways[name, "export_ms"] = lambda model=exported: model(x)
        ways[name, "onnx_ms"] = lambda running=running, feed=feed: running.run(None, feed)
        if to_onnx_int8(program):
            packed = session(program)
            row["int8_bytes"] = len(program.SerializeToString())
            ways[name, "int8_ms"] = lambda running=packed, feed=feed: running.run(None, feed)
        rows[name] = row
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in ways}
    for _ in range(ROUNDS):
        for key, run in ways.items():
            start = time.process_time()
            run()
            seconds[key].append(time.process_time() - start)
    for (name, way), each in seconds.items():
        rows[name][way] = round(1000 * statistics.median(each), 1)
    return list(rows.values())


def page(rows: list[dict[str, Any]]) -> str:
    """The table."""
    names = ("torch_ms", "export_ms", "onnx_ms", "int8_ms", "onnx_bytes", "int8_bytes")
    heads = ("PyTorch, ms", "torch.export, ms", "ONNX Runtime, ms", "int8, ms", "ONNX file, bytes", "int8 file, bytes")
    lines = ["| | " + " | ".join(heads) + " | largest difference |", "|---|" + "---|" * (len(names) + 1)]
    for row in rows:
        cells = [f"{row[name]:,}" if name in row else "" for name in names]
        lines.append(f"| {row['model']} | " + " | ".join(cells) + f" | {row['difference']:.1e} |")
    return TEXT.format(batch=BATCH, rounds=ROUNDS) + "\n".join(lines) + "\n"


def main() -> None:
    """Measures, then writes the page."""
    parser = common.parser("What is faster, and what only smaller.", "docs/benchmarks/running.json")
    options = parser.parse_args()
    if not options.table:
        if options.data_dir is None:
            parser.error("no data: give --data-dir or set BAYESPRUNE_DATA to the folder that holds weights")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        common.write(options.out, SETTINGS, measure(models(Path(options.data_dir))))
    options.out.with_suffix(".md").write_text(page(common.read(options.out, SETTINGS)), encoding="utf-8")


if __name__ == "__main__":
    main()
