"""The usual ways to make a network's file small: HAC's recipe (k-means, Huffman), 8 bits with LZMA, and ISO NNC."""

import heapq
import lzma
import subprocess
from collections import Counter
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn


@torch.no_grad()
def k_means_huffman(model: nn.Module, num_clusters: int) -> int:
    """Weights that are not zero go to the nearest of k means of their layer; bytes as Huffman codes.

    Marino et al. (2022), HAC and sHAC with CWS, for each layer the shorter: one code word for each weight, zeros having
    one as well; or for each that is not zero, with its row in as many bits as that takes and where each column begins.
    Beside it a table of float32 means and one byte of code length for each. Biases are float16. No header is counted.
    The model is changed in place.
    """
    bits = 0
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.copy_(parameter.half())
            bits += 16 * parameter.numel()
            continue
        kept = parameter != 0
        values = parameter[kept]
        means, which = _k_means(values, num_clusters)
        parameter[kept] = means[which]
        symbols = torch.zeros(parameter.shape, dtype=torch.long)
        symbols[kept] = which + 1
        rows, columns = parameter.flatten(1).shape
        starts = columns * len(values).bit_length()
        sparse = _huffman_bits(which) + len(values) * (rows - 1).bit_length() + starts
        bits += min(_huffman_bits(symbols), sparse) + 40 * num_clusters
    return (bits + 7) // 8


@torch.no_grad()
def eight_bits(model: nn.Module) -> int:
    """One symmetric 8-bit grid for each tensor, and LZMA over all integers and scales; in place."""
    data = bytearray()
    for parameter in model.parameters():
        scale = parameter.abs().max() / 127
        integers = (parameter / scale).round().to(torch.int8)
        parameter.copy_(integers * scale)
        data += scale.reshape(1).numpy().tobytes() + integers.contiguous().view(-1).numpy().tobytes()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
    return len(lzma.compress(bytes(data), format=lzma.FORMAT_RAW, filters=filters))


@torch.no_grad()
def nnc(model: nn.Module, qp: int, interpreter: str) -> int:
    """ISO/IEC 15938-17 by nncodec: DeepCABAC and trellis-coded quantization of all parameters; bytes of its stream.

    The model is changed in place. `interpreter` is that of an environment with nncodec, see `nncodec_peer.py`.
    """
    with TemporaryDirectory() as directory:
        source, out = Path(directory) / "in.npz", Path(directory) / "out.npz"
        arrays = {name: parameter.numpy() for name, parameter in model.named_parameters()}
        np.savez(source, allow_pickle=False, **arrays)
        program = Path(__file__).with_name("nncodec_peer.py")
        command = [interpreter, str(program), str(source), str(out), str(qp)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        with np.load(out) as arrays:
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.from_numpy(arrays[name]))
    return int(answer.stdout.split()[-1])


def _k_means(values: Tensor, number: int, sweeps: int = 50) -> tuple[Tensor, Tensor]:
    """Means and the nearest of each value; the start is spread evenly over the range (Han et al., 2016)."""
    means = torch.linspace(float(values.min()), float(values.max()), number)
    which = torch.zeros(len(values), dtype=torch.long)
    for _ in range(sweeps):
        which = (values[:, None] - means).abs().argmin(1)
        counts = torch.bincount(which, minlength=number)
        sums = torch.zeros(number).index_add_(0, which, values)
        means = torch.where(counts > 0, sums / counts.clamp_min(1), means)
    return means, which


def _huffman_bits(symbols: Tensor) -> int:
    """Total length of the Huffman codes of all symbols."""
    ties = count()
    heap = [(number, next(ties)) for number in Counter(symbols.flatten().tolist()).values()]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        total += first[0] + second[0]
        heapq.heappush(heap, (first[0] + second[0], next(ties)))
    return total
