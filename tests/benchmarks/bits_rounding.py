"""Where a rounded weight goes, chosen on images that rounding did not see: the nearest place, or error and length.

    python tests/benchmarks/bits_rounding.py --data-dir DATA --work WORK

Networks, sizes and batches are those of `bits.py`. By error and length, a weight w goes to the k of its grid of step D
with the least 6 (w / D - k)^2 + s length(k), the length in nats by the histogram of the integers themselves
(entropy-constrained quantization: Chou et al., 1989); s = 1 trades nats of likelihood for nats of code at the rate that
the steps do, s = 0 is the nearest. Judged on the last 5,000 training images, which took no part in the compensation;
the networks were trained on them, as on all others.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import bits_networks as networks
import common
import torch
import torch.nn.functional as F
from bits import BATCH, BYTES, HEADER, LEVELS, NUM_BATCHES, file_size
from mnist import Benchmark
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.bits import quantization, rounding
from bayesprune.bits.steps import Grid

NETWORK = "MNIST 784-300-100-10"
STRENGTHS = (0.0, 0.1, 0.25, 0.5, 1.0)
HELD_OUT = 5000
SETTINGS = {"network": NETWORK, "strengths": list(STRENGTHS), "held_out": HELD_OUT}
_SWEEPS = 3  # of histogram and choice, until the lengths fit what they are the lengths of


@contextmanager
def by_length(strength: float) -> Iterator[None]:
    """Inside, `quantize` rounds by error and length."""
    before = quantization.round_alone, quantization.round_columns
    if strength:
        quantization.round_alone, quantization.round_columns = partial(_alone, strength), partial(_columns, strength)
    try:
        yield
    finally:
        quantization.round_alone, quantization.round_columns = before


def _alone(strength: float, mean: Tensor, kept: Tensor, grid: Grid) -> Tensor:
    lengths = _lengths(strength, mean, kept, grid.step, grid.limit)
    integers = _shortest(strength, mean.double(), grid.step, grid.limit, lengths)
    return (torch.where(kept, integers, 0.0) * grid.step + 0.0).to(mean.dtype)


def _columns(strength: float, mean: Tensor, kept: Tensor, step: Tensor, plan: Any, limits: Any) -> Tensor:
    lengths = _lengths(strength, mean, kept, step, limits[0])
    before = rounding.nearest
    rounding.nearest = lambda values, its, limit: _shortest(strength, values, its, limit, lengths)
    try:
        return rounding.round_columns(mean, kept, step, plan, limits)
    finally:
        rounding.nearest = before


def _lengths(strength: float, mean: Tensor, kept: Tensor, step: Tensor, limit: int) -> Tensor:
    lengths = torch.zeros(2 * limit + 1, dtype=torch.double)
    for _ in range(_SWEEPS):
        integers = torch.where(kept, _shortest(strength, mean.double(), step, limit, lengths), 0.0)
        counts = torch.bincount(integers.flatten().long() + limit, minlength=len(lengths)).double()
        lengths = -((counts + 0.5) / (counts.sum() + 0.5 * max(1, int((counts > 0).sum())))).log()
    return lengths


def _shortest(strength: float, values: Tensor, step: Tensor, limit: int, lengths: Tensor) -> Tensor:
    """Of the nearest integer, its neighbour towards zero, and zero, that with the least error and length."""

    def cost(integers: Tensor) -> Tensor:
        return 6 * (scaled - integers).square() + strength * lengths[integers.long() + limit]

    scaled = values / step
    best = scaled.round().clamp(-limit, limit)
    least = cost(best)
    for other in (best - best.sign(), torch.zeros_like(best)):
        other_cost = cost(other)
        best, least = torch.where(other_cost < least, other, best), torch.minimum(other_cost, least)
    return best


@torch.no_grad()
def judged(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Percent of the images given another label, and the cross entropy in nats."""
    model.eval()
    logits = torch.cat([model(part[:, None]) for part in images.split(1000)])
    wrong = 100 * float((logits.argmax(1) != labels).double().mean())
    return {"error": round(wrong, 3), "nats": round(float(F.cross_entropy(logits, labels)), 5)}


def main() -> None:
    """Runs what the results file does not have yet."""
    options = networks.options_of("Two ways to round, on validation images.", "docs/benchmarks/bits_rounding.json")
    torch.set_num_threads(1)
    rows = common.read(options.out, SETTINGS)
    benchmark = Benchmark(options.work / "none.json", options.work, Path(options.data_dir))
    data = networks.data_of(benchmark, NETWORK)
    batches = list(zip(data.images[:, None].split(BATCH), data.labels.split(BATCH), strict=True))[:NUM_BATCHES]
    for seed in options.seeds:
        model = networks.with_all_inputs(networks.pruned(benchmark, NETWORK, LEVELS[NETWORK], seed))
        for compensated in (True, False):
            for strength in STRENGTHS:
                for size in BYTES[NETWORK]:
                    key = {"seed": seed, "compensated": compensated, "strength": strength, "size": size}
                    if any(all(row[name] == value for name, value in key.items()) for row in rows):
                        continue
                    found = copy.deepcopy(model)
                    with by_length(strength):
                        bp.quantize(found, batches if compensated else None, bytes=size - HEADER, compensate="alone")
                    held_out = judged(found, data.images[-HELD_OUT:], data.labels[-HELD_OUT:])
                    rows.append(key | {"bytes": file_size(found)} | held_out)
                    common.write(options.out, SETTINGS, rows)
                    print(time.strftime("%H:%M:%S"), rows[-1], flush=True)


if __name__ == "__main__":
    main()
