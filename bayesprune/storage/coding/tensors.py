"""A tensor as runs of integers, without loss: where it is not zero, and what stands there.

Values that lie on a grid, integer times step with one step for the tensor or one for each of its rows, are written as
the integers (`bayesprune.quantize` makes such tensors; the grid is found again as the greatest common divisor of the
values, so that nothing has to be remembered). All others are split into bytes, that of the exponent apart.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayesprune.errors import StorageError
from bayesprune.storage.coding.stream import MAX_ALPHABET, MAX_LOWEST, Integers, SymbolReader, SymbolWriter, best_law

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What is coded, by the names of safetensors; tensors of other dtypes are kept as they are."""

_SPARSE = 0.25  # share of zeros from which on their places are written apart
_MAX_SPREAD = 40  # octaves between the smallest and the largest value of a grid
_MAX_BITS = 60  # of an integer that stands for a value
_WORTH = 7.8  # bits, below which a byte is coded
_BYTES, _GRID, _GRID_BY_ROW, _NUM_FORMS = 0, 1, 2, 3
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Bits = NDArray[np.uint64]


@dataclass(frozen=True)
class _Grid:
    """Values as integers times multiplier times 2^exponent, for all rows or for each."""

    form: int
    multipliers: Integers
    exponents: Integers
    integers: Integers

    def num_bits(self) -> float:
        """About how long it is, written."""
        runs = (self.integers, self.multipliers, self.exponents) if self.form == _GRID_BY_ROW else (self.integers,)
        laws = [best_law(run) for run in runs]
        counts = [np.bincount(run - law.lowest, minlength=law.size) for run, law in zip(runs, laws, strict=True)]
        return sum(law.num_bits(count) for law, count in zip(laws, counts, strict=True))

    def is_exact(self, bits: Bits, kept: NDArray[np.bool_], dtype: torch.dtype) -> bool:
        """Whether it gives the same bits again."""
        values = _times_steps(self.integers, self.multipliers, self.exponents, kept).to(dtype)
        return np.array_equal(_bits(values.view(1, -1)).reshape(-1), bits[kept])


def write_tensor(writer: SymbolWriter, tensor: Tensor) -> None:
    """Writes a tensor, whose shape and dtype the reader is told."""
    matrix = _matrix(tensor)
    bits = _bits(matrix)
    kept = bits != 0
    is_sparse = bool(kept.size) and float(kept.mean()) <= 1 - _SPARSE
    writer.number(is_sparse, 2)
    if is_sparse:
        _write_mask(writer, kept)
    else:
        kept = np.ones_like(kept)
    if not kept.any():
        return
    grid = _best_grid(matrix, bits, kept)
    writer.number(_BYTES if grid is None else grid.form, _NUM_FORMS)
    if grid is None:
        _write_bytes(writer, bits[kept], tensor.element_size())
        return
    for part in (grid.multipliers, grid.exponents):
        writer.symbols(part) if grid.form == _GRID_BY_ROW else writer.integer(int(part[0]))
    writer.symbols(grid.integers)


def read_tensor(reader: SymbolReader, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor of this shape and dtype that `write_tensor` wrote.

    Raises:
        StorageError: the stream holds none.
    """
    empty = torch.empty(shape, dtype=dtype)
    rows, columns = _matrix(empty).shape
    number = rows * columns
    kept = _read_mask(reader, rows, columns) if reader.number(2) else None
    count = number if kept is None else int(np.count_nonzero(kept))
    if not count:
        return torch.zeros(shape, dtype=dtype)
    form = reader.number(_NUM_FORMS)
    if form == _BYTES:
        values = _from_bits(_read_bytes(reader, count, empty.element_size()), dtype)
    else:
        values = _read_grid(reader, form, count, rows, columns, kept).to(dtype)
    if kept is None:
        return values.view(shape)
    found = torch.zeros(number, dtype=dtype)
    found[torch.from_numpy(kept.reshape(-1))] = values
    return found.view(shape)


def as_integers(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Integers and steps whose product a tensor is, exactly; None where its values lie on no grid of fewer than 4,096.

    Returns:
        int64 in the shape of the tensor, and float64 with one entry, or one for each entry of the first dimension, in
        as many dimensions.
    """
    matrix = _matrix(tensor + 0)  # a zero has no sign
    bits = _bits(matrix)
    grid = _best_grid(matrix, bits, np.ones(bits.shape, dtype=bool))
    if grid is None:
        return None
    steps = torch.from_numpy(np.ldexp(grid.multipliers.astype(np.float64), grid.exponents.astype(np.int32)))
    shape = (-1, *(1,) * (tensor.dim() - 1)) if tensor.dim() else ()
    return torch.from_numpy(grid.integers).view(tensor.shape), steps.view(shape)


def entropy_bits(tensor: Tensor) -> float:
    """Zero-order entropy of a tensor's values in bits: of all of them together, zeros among them."""
    _, counts = np.unique(_bits(_matrix(tensor)), return_counts=True)
    shares = counts / max(1, counts.sum())
    return float(-(counts @ np.log2(shares)))


def _write_mask(writer: SymbolWriter, kept: NDArray[np.bool_]) -> None:
    """Which rows and columns have any, and which places of those."""
    rows, columns = (np.asarray(kept.any(axis)) for axis in (1, 0))
    for side in (rows, columns):
        writer.symbols(side.astype(np.int64))
    inside = kept[rows][:, columns]
    writer.symbols(inside.reshape(-1).astype(np.int64))


def _read_mask(reader: SymbolReader, num_rows: int, num_columns: int) -> NDArray[np.bool_]:
    rows, columns = (_binary(reader, size) for size in (num_rows, num_columns))
    kept = np.zeros((num_rows, num_columns), dtype=bool)
    number = int(rows.sum()) * int(columns.sum())
    kept[np.ix_(rows, columns)] = _binary(reader, number).reshape(int(rows.sum()), int(columns.sum()))
    return kept


def _binary(reader: SymbolReader, number: int) -> NDArray[np.bool_]:
    found = reader.symbols(number)
    if number and (found.min() < 0 or found.max() > 1):
        raise StorageError("a coded stream has places that are neither zero nor kept")
    return found.astype(bool)


def _best_grid(matrix: Tensor, bits: Bits, kept: NDArray[np.bool_]) -> _Grid | None:
    """The grid of the kept values with the shortest run of integers; None where they lie on none."""
    values = matrix.double().numpy()
    if not np.isfinite(values).all():
        return None
    mantissas, exponents = np.frexp(values)
    used = exponents[values != 0]
    if not used.size or used.max() - used.min() > _MAX_SPREAD:
        return None
    powers = _trailing_zeros((mantissas * 2.0**53).astype(np.int64)) + exponents - 53
    base = int(powers[values != 0].min())
    if int(used.max()) - base > _MAX_BITS:
        return None
    wholes = np.ldexp(values, -base).astype(np.int64)
    found = [_grid(wholes, base, kept, by_row=by_row) for by_row in (False, True)]
    exact = [grid for grid in found if grid is not None and grid.is_exact(bits, kept, matrix.dtype)]
    return min(exact, key=lambda grid: grid.num_bits(), default=None)


def _grid(wholes: Integers, base: int, kept: NDArray[np.bool_], *, by_row: bool) -> _Grid | None:
    """The coarsest grid, one or one for each row, on which wholes times 2^base lie; None where no runs hold it."""
    divisors = np.maximum(np.gcd.reduce(wholes if by_row else wholes.reshape(1, -1), axis=1), 1)
    integers = (wholes // divisors[:, None])[kept]
    twos = _trailing_zeros(divisors)
    multipliers = divisors >> twos
    runs = (integers, multipliers) if by_row else (integers,)
    for run in runs:
        lowest = int(run.min())
        if int(run.max()) - lowest >= MAX_ALPHABET or abs(lowest) > MAX_LOWEST:
            return None
    return _Grid(_GRID_BY_ROW if by_row else _GRID, multipliers, twos + base, integers)


def _read_grid(
    reader: SymbolReader, form: int, count: int, rows: int, columns: int, kept: NDArray[np.bool_] | None
) -> Tensor:
    if form == _GRID:
        multiplier, exponent = (np.array([reader.integer()]) for _ in range(2))
    else:
        multiplier, exponent = (reader.symbols(rows) for _ in range(2))
    if np.abs(exponent).max() > 2000:
        raise StorageError("a coded stream has a step that no number is")
    places = np.broadcast_to(True, (rows, columns)) if kept is None else kept
    return _times_steps(reader.symbols(count), multiplier, exponent, places)


def _times_steps(integers: NDArray, multiplier: NDArray, exponent: NDArray, kept: NDArray[np.bool_]) -> Tensor:
    """The values at kept places, float64."""
    steps = np.ldexp(multiplier.astype(np.float64), exponent.astype(np.int32))
    factor = steps if len(steps) == 1 else np.repeat(steps, np.count_nonzero(kept, axis=1))
    return torch.from_numpy(integers * factor)


def _write_bytes(writer: SymbolWriter, bits: Bits, size: int) -> None:
    """Byte by byte, from the top, the sign last."""
    width = np.uint64(8 * size)
    top = width - np.uint64(1)
    turned = (bits << np.uint64(1)) | (bits >> top)
    for place in reversed(range(size)):
        plane = ((turned >> np.uint64(8 * place)) & np.uint64(255)).astype(np.int64)
        law = best_law(plane)
        is_coded = law.num_bits(np.bincount(plane - law.lowest, minlength=law.size)) < _WORTH * len(plane)
        writer.number(is_coded, 2)
        writer.symbols(plane) if is_coded else writer.raw(plane.astype(np.uint8).tobytes())


def _read_bytes(reader: SymbolReader, count: int, size: int) -> Bits:
    turned = np.zeros(count, dtype=np.uint64)
    for place in reversed(range(size)):
        plane = reader.symbols(count) if reader.number(2) else np.frombuffer(reader.raw(count), dtype=np.uint8)
        turned |= (plane.astype(np.uint64) & np.uint64(255)) << np.uint64(8 * place)
    top = np.uint64(8 * size - 1)
    return (turned >> np.uint64(1)) | ((turned & np.uint64(1)) << top)


def _matrix(tensor: Tensor) -> Tensor:
    """A row for each entry of the first dimension."""
    return tensor.reshape(tensor.shape[0], -1) if tensor.dim() > 1 and tensor.numel() else tensor.reshape(1, -1)


def _bits(matrix: Tensor) -> Bits:
    carried = matrix.contiguous().view(_CARRIERS[matrix.element_size()]).numpy()
    return carried.view(f"u{matrix.element_size()}").astype(np.uint64)


def _from_bits(bits: Bits, dtype: torch.dtype) -> Tensor:
    size = dtype.itemsize
    narrow = bits.astype(f"u{size}").view(f"i{size}" if size > 1 else "u1")
    return torch.from_numpy(narrow).view(dtype)


def _trailing_zeros(values: Integers) -> Integers:
    """How often 2 divides each; 0 of 0."""
    lowest = values & -values
    return np.where(values != 0, np.log2(np.maximum(lowest, 1).astype(np.float64)).astype(np.int64), 0)
