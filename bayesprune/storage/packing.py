"""What `save` writes of smaller versions of a model: what differs from the model itself, and nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bayesprune.foundation.target import Target
from bayesprune.storage import coding
from bayesprune.storage.levels import (
    KINDS,
    POSITIONS,
    SIZES,
    Level,
    LevelRecord,
    Levels,
    gathered,
    moved_name,
    own_name,
    ranks,
    ranks_name,
    record_name,
)
from bayesprune.storage.parsing import deflated
from bayesprune.storage.spec import ModelRecord, describe_model, unsaved_buffers


@dataclass(frozen=True)
class Described:
    """A level, its spec relative to the larger model, and its tensors."""

    level: Level
    spec: ModelRecord
    tensors: Mapping[str, Tensor]


def level_spec(level: Level, model: nn.Module, spec: ModelRecord) -> ModelRecord:
    """The spec of a level, with the attributes that differ from the larger model.

    Args:
        level: The level.
        model: The larger model.
        spec: Of the larger model.

    Raises:
        ValueError: it is no smaller version of this model.
        UnsupportedModelError: its state dict holds something that safetensors cannot.
    """
    found, whole = describe_model(level.model, model), describe_model(model, model)
    same = ("classes", "constants", "buffers", "tied", "variational")
    other = [name for name in same if getattr(found, name) != getattr(whole, name)]
    if found.shapes.keys() != whole.shapes.keys():
        other.append("names of tensors")
    if found.variational or whole.variational:
        raise ValueError(
            f"levels of a model with posteriors, or a level {level.target!r} that has some; expected ordinary models: "
            "call to_deterministic(model) first."
        )
    if other:
        raise ValueError(
            f"the level {level.target!r} has other {', '.join(other)} than the model to save; expected the same model "
            "with fewer channels or weights, as bp.elastic.levels makes them."
        )
    before = unsaved_buffers(model)
    computed = {
        name: tuple(buffer.shape)
        for name, buffer in unsaved_buffers(level.model).items()
        if name in spec.computed or not _equal(before[name], buffer)
    }
    return replace(found, computed=computed)


def packed(
    tensors: Mapping[str, Tensor], levels: Sequence[Described], *, coded: bool
) -> tuple[Levels, dict[str, Tensor]]:
    """What the record says of levels, and the tensors of their file.

    Args:
        tensors: Of the saved model, on the CPU.
        levels: In the order in which they are listed.
        coded: Whether the file will be.
    """
    sets: dict[tuple[int, ...], int] = {}
    file: dict[str, Tensor] = {}
    zeroed: list[dict[str, int]] = [{} for _ in levels]
    for name, tensor in tensors.items():
        chain = _chain(tensor, [its.tensors.get(name) for its in levels])
        for place, number in enumerate(chain):
            zeroed[number][name] = place
        if chain:
            file[ranks_name(name)] = ranks(tensor, [levels[number].tensors[name] for number in chain])
    sizes: dict[str, int] = {}
    for number, its in enumerate(levels):
        record, own, moved = _record(tensors, its, zeroed[number], sets)
        for dtype in dict.fromkeys(value.dtype for value in own.values()):
            same = [value.flatten() for value in own.values() if value.dtype == dtype]
            file[own_name(number, _word(dtype))] = torch.cat(same)
        file |= {moved_name(number, name): value for name, value in moved.items()}
        file[record_name(number)] = torch.frombuffer(bytearray(deflated(record.to_json())), dtype=torch.uint8)
        sizes[str(Target.parse(its.level.target, KINDS, "save"))] = _size(its.tensors, coded=coded)
    if sets:
        file[POSITIONS] = torch.tensor([place for found in sets for place in found], dtype=torch.int32)
        file[SIZES] = torch.tensor([len(found) for found in sets], dtype=torch.int32)
    return Levels(_size(tensors, coded=coded), sizes), file


def _record(
    tensors: Mapping[str, Tensor], described: Described, zeroed: dict[str, int], sets: dict[tuple[int, ...], int]
) -> tuple[LevelRecord, dict[str, Tensor], dict[str, Tensor]]:
    """What is recorded of a level, its own values, and what others are moved by; new sets of positions get numbers."""
    level = described.level
    kept: dict[str, list[int | None]] = {}
    own: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    for name, value in described.tensors.items():
        if name in zeroed:
            continue
        dims = level.kept.get(name, ())
        part = gathered(tensors[name], dims) if name in tensors else None
        if part is None or not _equal(part, value):
            moved = level.moved.get(name)
            if part is None or moved is None or not _equal(part + moved.to("cpu"), value):
                own[name] = value
                continue
            added[name] = moved.detach().to("cpu").contiguous()
        numbers = [None if its is None else sets.setdefault(tuple(its.tolist()), len(sets)) for its in dims]
        while numbers and numbers[-1] is None:
            numbers.pop()
        if numbers:
            kept[name] = numbers
    record = LevelRecord(
        attributes=described.spec.attributes,
        kept=kept,
        zeroed=zeroed,
        own={name: (_word(value.dtype), tuple(value.shape)) for name, value in own.items()},
        added=tuple(added),
        computed=tuple(described.spec.computed),
    )
    return record, own, added


def _chain(tensor: Tensor, smaller: Sequence[Tensor | None]) -> list[int]:
    """Which of them are the tensor with zeros, from the fewest on, each with all zeros of the one before."""
    found = {
        number: its != 0
        for number, its in enumerate(smaller)
        if its is not None
        and its.shape == tensor.shape
        and its.dtype == tensor.dtype
        and not _equal(its, tensor)
        and bool(((its == tensor) | (its == 0)).all())
    }
    chain: list[int] = []
    for number in sorted(found, key=lambda number: -int(found[number].sum())):
        if not chain or not bool((found[number] & ~found[chain[-1]]).any()):
            chain.append(number)
    return chain


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether shape, dtype and values are the same; values that are no numbers are the same as no other."""
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.to("cpu"), other.to("cpu"))


def _size(tensors: Mapping[str, Tensor], *, coded: bool) -> int:
    """What tensors take in a file of their own, header apart."""
    return sum(tensor.nbytes for tensor in (coding.encoded(tensors) if coded else tensors).values())


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_levels(levels: Sequence[Level]) -> None:
    """Refuses levels that are none, or whose names are no targets, or twice the same.

    Raises:
        ValueError: they are.
    """
    for level in levels:
        if not isinstance(level, Level):
            raise ValueError(
                f"levels holds {level!r}; expected what bp.elastic.levels(model, x, [...]) makes of targets such as "
                '"macs=0.5".'
            )
    names = [str(Target.parse(level.target, KINDS, "save")) for level in levels]
    if len(set(names)) < len(names):
        raise ValueError(f"levels has two of one name: {', '.join(names)}. Give each target once.")
