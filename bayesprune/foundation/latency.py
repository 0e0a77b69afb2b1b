"""Times of forwards: of models that take turns, and of every module of one model."""

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from bayesprune.foundation.batches import device_of, given, on_device
from bayesprune.foundation.model import booked_by_module, eval_mode, layers_called, run_forward, without_fast_path

SECONDS_PER_REPEAT = 0.05
_WARM_UP = 2


def seconds_in_turn(models: Sequence[nn.Module], example_inputs: Any, *, num_repeats: int) -> list[list[float]]:
    """Seconds of a forward of each model, (models, repeats), in evaluation mode without gradients.

    The models take turns, so that a machine that slows down slows all of them. A repeat is the mean over 50 ms, or one
    forward. As many threads run as torch uses now (`torch.get_num_threads`).

    Args:
        models: On any devices; their modes are as before afterwards.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        num_repeats: Repeats of each model, 1 or more.
    """
    from torch.utils.benchmark import Timer  # logs a line about CUDA when it is imported

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        timers: list[Timer] = []
        for model in models:
            stack.enter_context(eval_mode(model))
            inputs = given(model, on_device(example_inputs, device_of(model)))
            variables = {"model": model, "args": inputs.args, "kwargs": inputs.kwargs}
            timers.append(Timer("model(*args, **kwargs)", globals=variables, num_threads=torch.get_num_threads()))
        passes = [max(1, math.ceil(SECONDS_PER_REPEAT / timer.timeit(1).median)) for timer in timers]
        rounds = [
            [timer.timeit(number).median for timer, number in zip(timers, passes, strict=True)]
            for _ in range(num_repeats)
        ]
    return [list(seconds) for seconds in zip(*rounds, strict=True)]


def seconds_by_module(model: nn.Module, example_inputs: Any, *, num_repeats: int = 5) -> dict[str, float]:
    """Seconds that each module takes in a forward, without those of the modules inside it; medians over repeats.

    What a module does outside its children is booked under its own name, the model's under "". The sum is the time of
    a forward with hooks on every module, a little more than that of a forward alone.

    Args:
        model: On any device; its mode is as before afterwards.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        num_repeats: Forwards that are timed, after two that are not.
    """
    rounds: list[dict[str, float]] = []
    with torch.no_grad(), eval_mode(model), without_fast_path(), layers_called(model):
        for number in range(_WARM_UP + num_repeats):
            with booked_by_module(model, partial(_now, device_of(model))) as seconds:
                run_forward(model, example_inputs)
            if number >= _WARM_UP:
                rounds.append(seconds)
    names = {name for seconds in rounds for name in seconds}
    medians = {name: torch.tensor([seconds.get(name, 0.0) for seconds in rounds]).median() for name in names}
    return {name: float(median) for name, median in medians.items()}


def _now(device: torch.device) -> float:
    """Seconds of the clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
