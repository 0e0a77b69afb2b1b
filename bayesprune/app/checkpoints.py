"""What a job of several trainings needs to go on after it was killed, as if it had not been.

The job is run again from its start. Trainings that had ended are not repeated: their last state is put into the model,
together with the state of all random numbers; the one that was running goes on from its last checkpoint; scores are
remembered. What lies between (conversion, removal) follows from these, to the last bit.
"""

import json
import logging
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from bayesprune.app.tasks.task import Checkpoint, Progress, Split, Task, Training
from bayesprune.errors import StorageError
from bayesprune.reports import Metric
from bayesprune.storage.state import read_state, write_state, write_whole

_LOGGER = logging.getLogger(__name__)
_JOB, _RUNNING, _ENDED = "job.json", "running.safetensors", "ended-{number:03}.safetensors"


class CheckpointEvery(NamedTuple):
    """The interval at which the running training is written: a number of optimizer steps, or of seconds."""

    steps: float = float("inf")
    seconds: float = float("inf")

    @classmethod
    def parse(cls, text: str) -> "CheckpointEvery":
        """An interval from "500" (steps), "30s", "10min" or "2h".

        Raises:
            ValueError: it is none of these, or zero.
        """
        found = re.fullmatch(r"(\d+)\s*(s|min|h)?", text.strip())
        number = int(found[1]) if found else 0
        if not found or not number:
            raise ValueError(f'a checkpoint every {text!r}; expected steps or a time: "500", "30s", "10min" or "2h".')
        if found[2] is None:
            return cls(steps=number)
        return cls(seconds=number * {"s": 1, "min": 60, "h": 3600}[found[2]])


class Checkpoints:
    """The directory of a job's checkpoints.

    Its files hold tensors, numbers and names; loading them runs no code. Each is written beside its final name first.
    """

    def __init__(
        self,
        directory: Path,
        request: Mapping[str, Any],
        every: CheckpointEvery,
        *,
        generators: Sequence[torch.Generator] = (),
        is_writer: bool = True,
    ) -> None:
        """Finds what an earlier run of the same job left, if anything.

        Args:
            directory: Made where it is missing.
            request: Everything that decides the result, as JSON values; a job with another one is not gone on with.
            every: How often the running training is written.
            generators: Random generators beside the global ones.
            is_writer: False in all processes but one.

        Raises:
            StorageError: the directory has the checkpoints of another job, or cannot be read or written.
        """
        self._directory, self._every, self._generators, self._is_writer = directory, every, generators, is_writer
        self._request = json.loads(json.dumps(dict(request)))
        self._scores: list[float] = []
        path = directory / _JOB
        if not (path.is_file() and self._go_on(path)) and is_writer:
            directory.mkdir(parents=True, exist_ok=True)
            self._write_job()

    def score(self, number: int, measure: Callable[[], float]) -> float:
        """The score of this number, measured if it is not known."""
        if number < len(self._scores):
            return self._scores[number]
        self._scores.append(measure())
        self._write_job()
        return self._scores[number]

    def restore_end(self, number: int, model: nn.Module) -> bool:
        """Puts the end of this training into the model, if there was one."""
        path = self._directory / _ENDED.format(number=number)
        if not path.is_file():
            return False
        state = _read(path)
        model.load_state_dict(state["model"])
        model.eval()
        set_random_state(state["random"], self._generators)
        return True

    def end(self, number: int, model: nn.Module) -> None:
        """Keeps the end of this training."""
        if self._is_writer:
            state = {"model": model.state_dict(), "random": random_state(self._generators)}
            write_state(self._directory / _ENDED.format(number=number), state)
            (self._directory / _RUNNING).unlink(missing_ok=True)

    def running(self, number: int) -> "Running":
        """The checkpoint of this training while it runs."""
        return Running(self._directory / _RUNNING, number, self._every, self._generators, self._is_writer)

    def remove(self) -> None:
        """Deletes all of them, once the result is saved."""
        if self._is_writer:
            shutil.rmtree(self._directory)

    def _go_on(self, path: Path) -> bool:
        """Takes up what an earlier run has left; whether it left anything but its options."""
        try:
            job = json.loads(path.read_text(encoding="utf-8"))
            request, scores = dict(job["request"]), [float(score) for score in job["scores"]]
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path} is damaged ({error}); delete {self._directory} to start again.") from error
        if not scores and not any(self._directory.glob("*.safetensors")):
            return False
        both = request.keys() | self._request.keys()
        if changed := sorted(key for key in both if request.get(key) != self._request.get(key)):
            shown = ", ".join(f"{key} {request.get(key)!r} (now {self._request.get(key)!r})" for key in changed)
            raise StorageError(
                f"{self._directory} has the checkpoints of an unfinished job with other options: {shown}. Give the "
                "same options to go on with it, or delete that directory to start again."
            )
        self._scores = scores
        _LOGGER.info("going on from the checkpoints in %s", self._directory)
        return True

    def _write_job(self) -> None:
        if self._is_writer:
            text = json.dumps({"request": self._request, "scores": self._scores}, indent=1)
            write_whole(self._directory / _JOB, lambda path: path.write_text(text + "\n", encoding="utf-8"))


class Running(Checkpoint):
    """The checkpoint of one training, in a file."""

    def __init__(
        self, path: Path, number: int, every: CheckpointEvery, generators: Sequence[torch.Generator], is_writer: bool
    ) -> None:
        """Use `Checkpoints.running`."""
        self._path, self._number, self._every = path, number, every
        self._generators, self._is_writer = generators, is_writer
        self._random: dict[str, Any] | None = None
        self._step, self._time = 0, time.monotonic()

    def saved(self) -> dict[str, Any] | None:
        """The state and the `step` that were given to `keep` last; None where this training had not come so far."""
        if not self._path.is_file():
            return None
        state = _read(self._path)
        if state["number"] != self._number:
            return None
        self._random, self._step = state["random"], state["state"]["step"]
        return state["state"]

    def restore_random_state(self) -> None:
        """Random numbers go on as they would have; to be called when everything else is where it was."""
        assert self._random is not None, "saved() found a checkpoint"
        set_random_state(self._random, self._generators)

    def is_due(self, step: int) -> bool:
        """Whether the interval has passed since the last time."""
        return step - self._step >= self._every.steps or time.monotonic() - self._time >= self._every.seconds

    def keep(self, step: int, state: Mapping[str, Any]) -> None:
        """Writes the state after this step, counted from 1."""
        if self._is_writer:
            random_numbers = random_state(self._generators)
            write_state(
                self._path, {"number": self._number, "state": {**state, "step": step}, "random": random_numbers}
            )
        self._step, self._time = step, time.monotonic()


class ResumableTask(Task):
    """A task whose trainings and scores are remembered by their order."""

    def __init__(self, task: Task, checkpoints: Checkpoints) -> None:
        """Wraps the task."""
        self.task, self.checkpoints = task, checkpoints
        self.description, self.metric, self.generators = task.description, task.metric, task.generators
        self.example_inputs, self.calibration, self.is_main = task.example_inputs, task.calibration, task.is_main
        self.is_sharded = task.is_sharded
        self._num_trainings = self._num_scores = 0

    metric: Metric

    def train(
        self, model: nn.Module, progress: Progress, training: Training, *, checkpoint: Checkpoint | None = None
    ) -> None:
        """As `Task.train`; a training that ended before the kill is not repeated."""
        number = self._num_trainings
        self._num_trainings += 1
        if self.checkpoints.restore_end(number, model):
            progress.say("done before, its checkpoint is taken")
            return
        self.task.train(model, progress, training, checkpoint=checkpoint or self.checkpoints.running(number))
        self.checkpoints.end(number, model)

    def score(self, model: nn.Module, split: Split) -> float:
        """As `Task.score`; those of the validation split are remembered."""
        if split != "validation":
            return self.task.score(model, split)
        number = self._num_scores
        self._num_scores += 1
        with torch.random.fork_rng(
            devices=[]
        ):  # a loader draws a seed, which it would not if the score were remembered
            return self.checkpoints.score(number, lambda: self.task.score(model, split))

    def examples(self, split: Split) -> Iterable[Any]:
        """As `Task.examples`."""
        return self.task.examples(split)

    def save_preparation(self, directory: Path) -> None:
        """As `Task.save_preparation`."""
        self.task.save_preparation(directory)

    def loading_instructions(self, directory: Path) -> str:
        """As `Task.loading_instructions`."""
        return self.task.loading_instructions(directory)

    def close(self) -> None:
        """Deletes the checkpoints: the result is saved."""
        self.task.close()
        self.checkpoints.remove()


def random_state(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """The state of Python's, numpy's and torch's global random numbers and of these generators."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (what augmentation of others draws from)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_state(state: Mapping[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """The opposite of `random_state`."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    for generator, values in zip(generators, state["generators"], strict=True):
        generator.set_state(values)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_state(path)
    except StorageError as error:
        raise StorageError(f"{error} Delete {path.parent} to start again.") from error
