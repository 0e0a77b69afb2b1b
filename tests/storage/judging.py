"""Loads a damaged directory and says what came of it: the right model, a clear error, or one of five failures."""

import json
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.errors import StorageError
from bayesprune.storage.spec import describe_model
from tests.storage.mutations import CRAFTED, MUTATIONS
from tests.storage.watching import PACKAGE, watching

RIGHT, OURS, THEIRS, OTHER = "right model", "StorageError", "the host's own error", "what the changed file says"
WRONG, CRASH, SLOW, MEMORY = "silent wrong load", "crash", "too slow", "too much memory"
OUTSIDE = "reads, asks or runs something else"
FAILURES = (WRONG, CRASH, SLOW, MEMORY, OUTSIDE)
Route = Callable[[Path], nn.Module]


class TooSlow(BaseException):
    """No handler of the code under test may take it for an error of a file."""


@dataclass(frozen=True)
class Case:
    """A kind of saved directory.

    Attributes:
        save: Writes the model of a seed to a directory.
        routes: The calls that load it, by name.
        inputs: What outputs are compared on.
    """

    save: Callable[[Path, int], None]
    routes: dict[str, Route]
    inputs: Tensor


@dataclass
class Workshop:
    """A case's directory, damaged and restored again and again."""

    case: Case
    root: Path
    files: dict[str, bytes] = field(default_factory=dict)
    expected: dict[str, Any] = field(default_factory=dict)
    foreign: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.directory, self.other = self.root / "saved", self.root / "other"
        self.case.save(self.directory, 0)
        self.case.save(self.other, 1)
        self.files = {path.name: path.read_bytes() for path in self.directory.iterdir()}
        self.expected = {name: facts(load(self.directory), self.case.inputs) for name, load in self.case.routes.items()}
        self.foreign = next(iter(self.case.routes.values()))(self.other).state_dict()

    def judge(self, kind: str, route: str, seed: str, *, seconds: float) -> tuple[str, str, float]:
        """The verdict on one mutation, what was said, and how long the load took."""
        self._restore()
        MUTATIONS[kind](random.Random(seed), self.directory, self.other)
        start = time.perf_counter()
        with watching(self.directory, ours_alone=route != "bp.load") as events:
            try:
                with time_limit(seconds):
                    model = self.case.routes[route](self.directory)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # noqa: BLE001  (every one is a verdict)
                verdict = _of_error(error, route)
            else:
                verdict = self._of_model(model, kind, route) if not events else (OUTSIDE, "")
        taken = time.perf_counter() - start
        return (OUTSIDE, "; ".join(events), taken) if events else (*verdict, taken)

    def _of_model(self, model: nn.Module, kind: str, route: str) -> tuple[str, str]:
        if kind in CRAFTED:
            own = self.expected[route]["tensors"]
            taken = [
                name
                for name, tensor in model.state_dict().items()
                if name in self.foreign and _same(tensor, self.foreign[name]) and not _same(tensor, own.get(name))
            ]
            return (OUTSIDE, f"{taken[0]} is that of another directory") if taken else (OTHER, "")
        difference = _difference(facts(model, self.case.inputs), self.expected[route])
        return (WRONG, difference) if difference else (RIGHT, "")

    def _restore(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        for name, data in self.files.items():
            (self.directory / name).write_bytes(data)


def facts(model: nn.Module, inputs: Tensor) -> dict[str, Any]:
    """All that a load must bring back, as JSON and tensors."""
    with torch.no_grad():
        output = model.eval()(inputs)
    config = getattr(model, "config", None)
    return {
        "tensors": model.state_dict(),
        "outputs": {"": output if isinstance(output, Tensor) else output.logits},
        "spec": json.dumps(describe_model(model).to_json(), sort_keys=True),
        "config": None if config is None else config.to_json_string(),
        "preparation": repr(getattr(model, "pretrained_cfg", None)),
    }


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooSlow after this time."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _of_error(error: BaseException, route: str) -> tuple[str, str]:
    said = f"{type(error).__name__}: {error}"[:300]
    if isinstance(error, StorageError):
        return OURS, said
    frames = [entry.filename for entry in traceback.extract_tb(error.__traceback__)]
    if route != "bp.load" and not any(name.startswith(PACKAGE) for name in frames):
        return THEIRS, said
    if isinstance(error, TooSlow):
        return SLOW, traceback.format_exc()[-600:]
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return MEMORY, traceback.format_exc()[-600:]
    return CRASH, "".join(traceback.format_exception(error))[-900:]


def _same(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and tensor.dtype == other.dtype and torch.equal(tensor, other)


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    for key, value in expected.items():
        if isinstance(value, dict):
            same = value.keys() == found[key].keys() and all(
                torch.equal(v, found[key][k]) and v.dtype == found[key][k].dtype for k, v in value.items()
            )
        else:
            same = value == found[key]
        if not same:
            return f"other {key}"
    return ""
