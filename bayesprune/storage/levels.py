"""Smaller versions of a saved model beside it: what each keeps of the saved tensors, and what it has of its own.

A level that lost channels is some positions of every dimension of the saved tensors; one that lost single weights is
the saved tensors with zeros. Where a value is another one (statistics of batch norm, biases, weights that make up for
what went), the file holds the level's own. So the saved model is as it was, to the last bit, and each level is what was
handed to `save`, to the last bit.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayesprune.errors import StorageError
from bayesprune.foundation.target import Target
from bayesprune.storage.parsing import inflated
from bayesprune.storage.spec import ModelRecord, Shape
from bayesprune.storage.values import decode, encode, is_encoded

KINDS = ("macs", "params", "weights")
"""What a level may keep a fraction of."""

LEVELS = "levels.safetensors"
POSITIONS, SIZES = "positions", "sizes"
"""Names of the tensors that hold sets of positions one after the other, and how many each set has."""

Kept = tuple[Tensor | None, ...]
"""Positions that each dimension of a tensor keeps, in order; None where it keeps all."""


@dataclass(frozen=True)
class Level:
    """A smaller version of a model; `bayesprune.elastic.levels` makes them, and `save(levels=...)` puts them beside it.

    Attributes:
        target: What it keeps, and its name: "macs=0.5", "params=0.5", "weights=0.1".
        model: The smaller model, an ordinary one. Whatever was done to its values, it is saved as it is; but what is
            not a value of the larger model takes space of its own.
        kept: By name of a tensor of the state dict, which positions of the larger model's its dimensions are; those
            that were not cut are not named.
        moved: By name, what was added to a tensor's kept positions: where such differences lie on a grid, a coded file
            holds them in few bits.
    """

    target: str
    model: nn.Module
    kept: Mapping[str, Kept] = field(default_factory=dict)
    moved: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LevelRecord:
    """What a saved directory says of a level.

    Attributes:
        attributes: Those that differ from the saved model's, by module.
        kept: By tensor and dimension the number of a set of positions, None for all of them.
        zeroed: By tensor how many of the levels that have zeros in it have fewer zeros.
        own: By tensor dtype and shape of the level's own values, in the order in which they are stored.
        added: Tensors of which the file holds what is added to the kept positions of the saved ones.
        computed: Names of its buffers outside the state dict that are saved all the same.
    """

    attributes: dict[str, dict[str, Any]]
    kept: dict[str, list[int | None]]
    zeroed: dict[str, int]
    own: dict[str, tuple[str, Shape]]
    added: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, empty ones left out."""
        fields = {
            "attributes": {name: {k: encode(v) for k, v in a.items()} for name, a in self.attributes.items()},
            "kept": self.kept,
            "zeroed": self.zeroed,
            "own": {name: [dtype, *shape] for name, (dtype, shape) in self.own.items()},
            "added": list(self.added),
            "computed": list(self.computed),
        }
        return {k: v for k, v in fields.items() if v}

    @classmethod
    def from_json(cls, value: Any, where: str) -> "LevelRecord":
        """The record of a file's JSON value.

        Raises:
            StorageError: a field is not as `to_json` writes it; `where` says in which file.
        """
        found = value if isinstance(value, dict) else {"attributes": value}
        parts = {key: found.get(key, {}) for key in ("attributes", "kept", "zeroed", "own")}
        names = {key: found.get(key, []) for key in ("added", "computed")}
        checks = {"attributes": _is_attributes, "kept": _is_kept, "zeroed": _is_count, "own": _is_own}
        if not all(isinstance(part, dict) and all(map(checks[key], part.values())) for key, part in parts.items()) or (
            not all(isinstance(part, list) and all(isinstance(n, str) for n in part) for part in names.values())
        ):
            raise StorageError(f"{where} describes a level that cannot be read. The file is damaged.")
        return cls(
            attributes={name: {k: decode(v) for k, v in a.items()} for name, a in parts["attributes"].items()},
            kept=parts["kept"],
            zeroed=parts["zeroed"],
            own={name: (dtype, tuple(shape)) for name, (dtype, *shape) in parts["own"].items()},
            added=tuple(names["added"]),
            computed=tuple(names["computed"]),
        )


@dataclass(frozen=True)
class Levels:
    """Which levels a saved directory has, and their sizes: what their tensors take in files of their own.

    Attributes:
        num_bytes: Of the saved model itself.
        sizes: Of the levels by name, in the order in which they were saved.
    """

    num_bytes: int = 0
    sizes: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {"bytes": self.num_bytes, "levels": self.sizes}

    @classmethod
    def from_json(cls, value: Any, where: str) -> "Levels":
        """The levels of a file's JSON value; none where it is None.

        Raises:
            StorageError: it is not as `to_json` writes it; `where` says in which file.
        """
        if value is None:
            return cls()
        found = value if isinstance(value, dict) else {}
        size, sizes = found.get("bytes"), found.get("levels")
        if type(size) is not int or size < 0 or not isinstance(sizes, dict) or not all(map(_is_count, sizes.values())):
            raise StorageError(f"{where} has levels that cannot be read. The file is damaged.")
        return cls(size, sizes)

    def number_of(self, target: str, where: str) -> int | None:
        """The number of the level that a target names; None for the saved model itself.

        Args:
            target: The name of a level, or "bytes=50000": the largest that takes at most so many.
            where: What holds the levels, for messages.

        Raises:
            ValueError: the target is not in the grammar.
            StorageError: there is no such level.
        """
        wanted = Target.parse(target, (*KINDS, "bytes"), "load")
        there = ", ".join(f"{name} ({size:,} bytes)" for name, size in self.sizes.items()) or "none"
        if wanted.kind == "bytes":
            sizes = {None: self.num_bytes} | dict(enumerate(self.sizes.values())) if self.sizes else {}
            fitting = {number: size for number, size in sizes.items() if size <= wanted.value}
            if fitting:
                return max(fitting, key=fitting.__getitem__)
            raise StorageError(f"{where} has no level of at most {wanted.value:,.0f} bytes; its levels are: {there}.")
        if str(wanted) not in self.sizes:
            raise StorageError(f"{where} has no level {str(wanted)!r}; its levels are: {there}.")
        return list(self.sizes).index(str(wanted))


def record_name(number: int) -> str:
    """The tensor of bytes that holds what is recorded of a level; JSON, deflated."""
    return f"record.{number}"


def ranks_name(name: str) -> str:
    """The tensor that says of each weight of another that is not zero how many levels keep it, as bits."""
    return f"ranks.{name}"


def own_name(number: int, dtype: str) -> str:
    """The tensor that holds the own values of a level in one dtype."""
    return f"own.{number}.{dtype}"


def moved_name(number: int, name: str) -> str:
    """The tensor that is added to the kept positions of another in a level."""
    return f"moved.{number}.{name}"


def record_of(file: Mapping[str, Tensor], number: int) -> LevelRecord:
    """What a file records of a level.

    Raises:
        StorageError: it records nothing that can be read.
    """
    found = file.get(record_name(number))
    if found is None or found.dtype != torch.uint8 or found.dim() != 1:
        raise StorageError(f"{LEVELS} holds no {record_name(number)!r}. It was damaged or changed: save again.")
    where = f"{record_name(number)!r} in {LEVELS}"
    return LevelRecord.from_json(inflated(found.numpy().tobytes(), where), where)


def tensor_names(level: LevelRecord, number: int) -> set[str]:
    """The tensors of the file that a level needs."""
    names = {own_name(number, dtype) for dtype, _ in level.own.values()} | set(map(ranks_name, level.zeroed))
    names |= {moved_name(number, name) for name in level.added}
    return names | ({POSITIONS, SIZES} if level.kept else set())


def smaller(
    spec: ModelRecord, tensors: Mapping[str, Tensor], level: LevelRecord, number: int, file: Mapping[str, Tensor]
) -> tuple[ModelRecord, dict[str, Tensor]]:
    """Spec and tensors of a level.

    Args:
        spec: Of the saved model.
        tensors: Of the saved model.
        level: What is recorded of the level.
        number: Its place among the levels.
        file: The tensors that `tensor_names` names.

    Raises:
        StorageError: they do not fit each other.
    """
    try:
        found = _tensors(spec, tensors, level, number, file)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise StorageError(
            f"{LEVELS} does not hold what it records of level {number} ({type(error).__name__}: {error}). "
            "It was damaged or changed: copy it anew from its source, or save again."
        ) from error
    attributes = {name: dict(values) for name, values in spec.attributes.items()}
    for name, values in level.attributes.items():
        attributes[name] = attributes.get(name, {}) | values
    shapes = {name: tuple(found[spec.tied.get(name, name)].shape) for name in spec.shapes}
    computed = {name: tuple(found[name].shape) for name in level.computed}
    return replace(spec, shapes=shapes, attributes=attributes, computed=computed), found


def _tensors(
    spec: ModelRecord, tensors: Mapping[str, Tensor], level: LevelRecord, number: int, file: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    sets = _sets(file) if level.kept else []
    names = [name for name in spec.shapes if name not in spec.tied] + list(level.computed)
    own = dict(_split(level, number, file))
    found: dict[str, Tensor] = {}
    for name in names:
        if name in own:
            found[name] = own[name]
            continue
        dims = [None if its is None else sets[its] for its in level.kept.get(name, ())]
        found[name] = gathered(tensors[name], dims)
        if name in level.zeroed:
            found[name] = zeroed(found[name], file[ranks_name(name)], level.zeroed[name])
        if name in level.added:
            moved = file[moved_name(number, name)]
            if (moved.shape, moved.dtype) != (found[name].shape, found[name].dtype):
                raise ValueError(f"{name} is {_described(found[name])}, what moves it {_described(moved)}")
            found[name] = found[name] + moved
    return found


def _split(level: LevelRecord, number: int, file: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The own values of a level by name."""
    for dtype in dict.fromkeys(dtype for dtype, _ in level.own.values()):
        shapes = {name: shape for name, (its, shape) in level.own.items() if its == dtype}
        whole = file[own_name(number, dtype)]
        if whole.dtype != getattr(torch, dtype):
            raise ValueError(f"{own_name(number, dtype)} is {whole.dtype}")
        parts = whole.split([math.prod(shape) for shape in shapes.values()])
        yield from ((name, part.reshape(shape)) for (name, shape), part in zip(shapes.items(), parts, strict=True))


def _sets(file: Mapping[str, Tensor]) -> list[Tensor]:
    return list(file[POSITIONS].long().split(file[SIZES].tolist()))


def gathered(tensor: Tensor, kept: Sequence[Tensor | None]) -> Tensor:
    """The kept positions of a tensor; the tensor itself where it keeps all.

    Raises:
        ValueError: there are more dimensions than it has.
        IndexError: a position is none, or there are more than the dimension has.
    """
    if len(kept) > tensor.dim():
        raise ValueError(f"positions in {len(kept)} dimensions of a tensor of shape {tuple(tensor.shape)}")
    for dim, positions in enumerate(kept):
        if positions is not None:
            if len(positions) > tensor.shape[dim] or (len(positions) and int(positions.min()) < 0):
                raise IndexError(f"{len(positions)} positions of {tensor.shape[dim]}, the first {int(positions.min())}")
            tensor = tensor.index_select(dim, positions.to(tensor.device))
    return tensor


def ranks(tensor: Tensor, smaller: Sequence[Tensor]) -> Tensor:
    """How many of the tensors that have more and more zeros keep each value that is not zero, (bits, bytes).

    Each row holds one bit of the numbers, eight in a byte, the lowest bit first.
    """
    nonzero = tensor.flatten() != 0
    counts = torch.stack([its.flatten()[nonzero] != 0 for its in smaller]).sum(0).numpy()
    planes = [np.packbits(counts >> bit & 1) for bit in range(len(smaller).bit_length())]
    return torch.from_numpy(np.stack(planes))


def zeroed(tensor: Tensor, ranks: Tensor, place: int) -> Tensor:
    """The tensor with zeros where no more than `place` levels keep the value.

    Raises:
        ValueError: the ranks are not those of the tensor.
    """
    nonzero = tensor.flatten() != 0
    number = int(nonzero.sum())
    if ranks.dtype != torch.uint8 or ranks.dim() != 2 or ranks.shape[1] != -(-number // 8):
        raise ValueError(f"ranks of shape {tuple(ranks.shape)} for {number} values")
    planes = np.unpackbits(ranks.numpy(), axis=1, count=number).astype(np.int64)
    counts = torch.from_numpy((planes << np.arange(len(planes))[:, None]).sum(0))
    found = tensor.flatten().clone()
    found[nonzero.nonzero()[:, 0][counts <= place]] = 0
    return found.view_as(tensor)


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_attributes(value: Any) -> bool:
    return isinstance(value, dict) and all(is_encoded(item) for item in value.values())


def _is_kept(value: Any) -> bool:
    return isinstance(value, list) and all(item is None or _is_count(item) for item in value)


def _is_own(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], str)
        and isinstance(getattr(torch, value[0], None), torch.dtype)
        and all(map(_is_count, value[1:]))
    )
