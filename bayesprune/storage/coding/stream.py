"""Runs of small integers as one stream of asymmetric numeral systems (ANS; Duda et al., 2015), by `constriction`.

The frequencies of a run are described in a few bytes before it: by a table, or by a law with one parameter, whichever
makes the whole shorter. They are integers, made of integers alone, so that every machine has the same ones. What does
not get shorter is kept as it is, beside the stream.
"""

import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bayesprune.errors import StorageError

MAX_ALPHABET, MAX_LOWEST = 4096, 2**30
_MAX_LEVEL = 63
_MANTISSAS = np.array([256, 304, 362, 431], dtype=np.int64)  # 2^8, and that times 2^(1/4), 2^(1/2), 2^(3/4)
_UNIFORM, _TABLE, _LINEAR, _SQUARE = range(4)
_NUM_LAWS, _NUM_SLOPES = 4, 64
_LINEAR_SHIFT, _SQUARE_SHIFT = 12, 20
_MAX_BITS = 62

Integers = NDArray[np.int64]


class SymbolWriter:
    """What is written comes back from a `SymbolReader` in the same order."""

    def __init__(self) -> None:
        self._constriction = require_coding()
        self._runs: list[tuple[NDArray[np.int32], Any]] = []
        self._raw: list[bytes] = []

    def number(self, value: int, size: int) -> None:
        """A number of 0 to size - 1, all equally likely; size is below 2^24."""
        if size > 1:
            self._runs.append((np.array([value], dtype=np.int32), self._constriction.stream.model.Uniform(size)))

    def integer(self, value: int) -> None:
        """An integer of up to 62 bits, the shorter the smaller it is."""
        magnitude = 2 * value if value >= 0 else -2 * value - 1
        num_bits = magnitude.bit_length()
        self.number(num_bits, _MAX_BITS + 2)
        for start in range(0, num_bits, 16):
            width = min(16, num_bits - start)
            self.number((magnitude >> start) & ((1 << width) - 1), 1 << width)

    def raw(self, data: bytes) -> None:
        """Bytes as they are."""
        self._raw.append(data)

    def symbols(self, values: Integers) -> None:
        """Integers within 4,096 of each other, the lowest within 2^30 of 0, whose number the reader knows."""
        if len(values) == 0:
            return
        law = best_law(values)
        law.write(self)
        if law.size > 1:
            self._runs.append(((values - law.lowest).astype(np.int32), self._model(law)))

    def finish(self) -> bytes:
        """All of it: the raw bytes, and the stream."""
        coder = self._constriction.stream.stack.AnsCoder()
        for values, model in reversed(self._runs):
            coder.encode_reverse(values, model)
        words = np.asarray(coder.get_compressed(), dtype=np.uint32)
        raw = b"".join(self._raw)
        return len(raw).to_bytes(5, "little") + raw + words.astype("<u4").tobytes()

    def _model(self, law: "Law") -> Any:
        return _model(self._constriction, law)


class SymbolReader:
    """Reads what a `SymbolWriter` wrote; damage gives other numbers, or an error, and never more than is asked for.

    Raises:
        StorageError: `constriction` is missing, or there is no stream.
    """

    def __init__(self, data: bytes) -> None:
        self._constriction = require_coding()
        num_raw = int.from_bytes(data[:5], "little")
        if len(data) < 5 + num_raw or (len(data) - 5 - num_raw) % 4:
            raise StorageError("a coded stream is truncated")
        self._raw = memoryview(data)[5 : 5 + num_raw]
        words = np.frombuffer(data, dtype="<u4", offset=5 + num_raw)
        words = words.astype(np.uint32) if sys.byteorder == "big" else words.copy()
        self._coder = self._constriction.stream.stack.AnsCoder(words)

    def number(self, size: int) -> int:
        """A number of 0 to size - 1."""
        if size < 2:
            return 0
        return int(self._coder.decode(self._constriction.stream.model.Uniform(size), 1)[0])

    def integer(self) -> int:
        """An integer that `SymbolWriter.integer` wrote."""
        num_bits = self.number(_MAX_BITS + 2)
        magnitude = 0
        for start in range(0, num_bits, 16):
            magnitude |= self.number(1 << min(16, num_bits - start)) << start
        return -(magnitude + 1) // 2 if magnitude % 2 else magnitude // 2

    def raw(self, number: int) -> memoryview:
        """The next bytes that were kept as they are.

        Raises:
            StorageError: there are fewer.
        """
        if number > len(self._raw):
            raise StorageError("a coded stream holds fewer bytes than it says")
        found, self._raw = self._raw[:number], self._raw[number:]
        return found

    def symbols(self, number: int) -> NDArray[np.int32]:
        """So many integers.

        Raises:
            StorageError: their frequencies are none that are written.
        """
        if number == 0:
            return np.zeros(0, dtype=np.int32)
        law = Law.read(self)
        if law.size == 1:
            return np.full(number, law.lowest, dtype=np.int32)
        found = self._coder.decode(_model(self._constriction, law), number)
        return np.add(found, law.lowest, dtype=np.int32)


@dataclass(frozen=True)
class Law:
    """Frequencies of the integers from `lowest` on.

    Attributes:
        lowest: The first integer.
        size: How many there are.
        kind: Uniform, a table, or falling from a centre linearly or by the square, in quarters of an octave.
        numbers: Of a table, a level of 0 to 63 for each; of a fall, the centre and the number of its slope.
    """

    lowest: int
    size: int
    kind: int = _UNIFORM
    numbers: tuple[int, ...] = ()

    @cached_property
    def frequencies(self) -> Integers:
        """One for each integer; their scale means nothing."""
        return _from_levels(self._levels())

    def num_bits(self, counts: Integers) -> float:
        """How long a run of integers with these counts is, with the law itself."""
        shares = self.frequencies / self.frequencies.sum()
        return self._own_bits() - float(counts @ np.log2(np.maximum(shares, 2.0**-24)))

    def write(self, writer: SymbolWriter) -> None:
        """Writes the law."""
        writer.integer(self.lowest)
        writer.integer(self.size - 1)
        if self.size == 1:
            return
        writer.number(self.kind, _NUM_LAWS)
        for number, size in zip(self.numbers, self._sizes(), strict=True):
            writer.number(number, size)

    @classmethod
    def read(cls, reader: SymbolReader) -> "Law":
        """The law that `write` wrote.

        Raises:
            StorageError: it is out of bounds.
        """
        lowest, size = reader.integer(), reader.integer() + 1
        if not 1 <= size <= MAX_ALPHABET or abs(lowest) > MAX_LOWEST:
            raise StorageError("a coded stream has frequencies that are out of bounds")
        if size == 1:
            return cls(lowest, 1)
        law = cls(lowest, size, reader.number(_NUM_LAWS))
        return cls(lowest, size, law.kind, tuple(reader.number(each) for each in law._sizes()))

    def _sizes(self) -> list[int]:
        if self.kind == _TABLE:
            return [_MAX_LEVEL + 1] * self.size
        return [] if self.kind == _UNIFORM else [self.size, _NUM_SLOPES]

    def _own_bits(self) -> float:
        return 6.0 * self.size if self.kind == _TABLE else 0.0 if self.kind == _UNIFORM else 6 + np.log2(self.size)

    def _levels(self) -> Integers:
        if self.kind == _UNIFORM:
            return np.full(self.size, 1, dtype=np.int64)
        if self.kind == _TABLE:
            return np.array(self.numbers, dtype=np.int64)
        return _falling(self.kind, self.size, self.numbers[0], _from_levels(np.array([self.numbers[1]]))[0])


def best_law(values: Integers) -> Law:
    """The law with which a run is shortest, the law's own length included.

    Raises:
        ValueError: the integers are too many different ones.
    """
    lowest = int(values.min())
    size = int(values.max()) - lowest + 1
    if size > MAX_ALPHABET:
        raise ValueError(f"a run of integers from {lowest} to {lowest + size - 1}; expected at most {MAX_ALPHABET}.")
    if size == 1:
        return Law(lowest, 1)
    counts = np.bincount(values - lowest, minlength=size)
    slopes = _from_levels(np.arange(_NUM_SLOPES))
    centre = round(float(counts @ np.arange(size)) / len(values))
    found = [Law(lowest, size), Law(lowest, size, _TABLE, _table(counts))]
    for kind in (_LINEAR, _SQUARE):
        frequencies = _from_levels(_falling(kind, size, centre, slopes[:, None]))
        shares = frequencies / frequencies.sum(1, keepdims=True)
        lengths = -np.log2(np.maximum(shares, 2.0**-24)) @ counts
        found.append(Law(lowest, size, kind, (centre, int(lengths.argmin()))))
    return min(found, key=lambda law: law.num_bits(counts))


def _table(counts: Integers) -> tuple[int, ...]:
    """Levels of counts, the largest at the top; 0 is for what does not occur."""
    octaves = np.log2(np.maximum(counts, 1) / counts.max())
    levels = np.clip(np.rint(_MAX_LEVEL + 4 * octaves), 1, _MAX_LEVEL).astype(int)
    return tuple(np.where(counts > 0, levels, 0).tolist())


def _falling(kind: int, size: int, centre: int, slope: Any) -> Integers:
    distances = np.abs(np.arange(size, dtype=np.int64) - centre)
    fall = distances * slope >> _LINEAR_SHIFT if kind == _LINEAR else distances**2 * slope >> _SQUARE_SHIFT
    return np.maximum(1, _MAX_LEVEL - fall)


def _from_levels(levels: Integers) -> Integers:
    """2^(level / 4), rounded, times 2^8; none for level 0 of a table, which has the least that there is."""
    return np.where(levels > 0, _MANTISSAS[levels % 4] << levels // 4, levels + 0)


def _model(library: Any, law: Law) -> Any:
    if law.kind == _UNIFORM:
        return library.stream.model.Uniform(law.size)
    frequencies = law.frequencies
    if not frequencies.any():
        raise StorageError("a coded stream has frequencies that are all zero")
    shares = frequencies / np.float64(frequencies.sum())
    return library.stream.model.Categorical(shares, perfect=False)


def require_coding() -> Any:
    """The package `constriction`.

    Raises:
        StorageError: it is missing.
    """
    try:
        import constriction
    except ImportError as error:
        raise StorageError(
            f"entropy-coded files need the package constriction ({error}): pip install 'bayesprune[coding]'."
        ) from error
    return constriction
