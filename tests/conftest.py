import gc
import os
import tempfile
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from bayesprune.foundation import latency

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_CACHE = tempfile.TemporaryDirectory(prefix="bayesprune-tests-")
os.environ.setdefault("HF_DATASETS_CACHE", _CACHE.name + "/datasets")
# a cache that outlives the tests may hold kernels for vectors of another processor, with wrong results on this one
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _CACHE.name + "/inductor")
torch.set_num_threads(1)
latency.SECONDS_PER_REPEAT = 0.0  # a repeat is one forward: how exact times are is for tests/reports/test_measure.py


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a module draws as it is imported is the same in every run."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """What was imported stays to the end, and is none of what trainers have the garbage collector look for."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fails_on_second_call(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], list[Any]]:
    """`fails_on_second_call(module, name)`: the function there has no memory the second time; gives its calls."""

    def replace(module: str, name: str) -> list[Any]:
        calls: list[Any] = []
        function = getattr(import_module(module), name)

        def fails(*args: Any, **options: Any) -> Any:
            calls.append(args)
            if len(calls) > 1:
                raise MemoryError
            return function(*args, **options)

        monkeypatch.setattr(f"{module}.{name}", fails)
        return calls

    return replace
