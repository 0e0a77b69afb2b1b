"""How much a file may have built: what a dense model may hold is bounded by what the saved one holds.

A saved model may be far smaller than the dense one it is built from, but it has about as many layers, and nobody keeps
one weight in hundreds. So a file of a few kilobytes does not make a process build for hours, or fill the memory.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.parameter import is_lazy

from bayesprune.errors import StorageError

MAX_INTEGER = 2**28
_UNBOUNDED = ("theta", "base", "seed", "max_length", "_id", "_ids")  # numbers that are no sizes
_PARTS_PER_PART, _MIN_PARTS = 8, 2_000
_BYTES_PER_BYTE, _MIN_BYTES = 256, 2**30


def check_integers(value: Any, where: str, key: str = "") -> None:
    """Refuses whole numbers that no size of a layer is, of which a constructor would make lists or tensors.

    Raises:
        StorageError: there is one; the message names it.
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            check_integers(item, where, str(name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_integers(item, where, key)
    elif isinstance(value, int) and abs(value) > MAX_INTEGER and not any(part in key for part in _UNBOUNDED):
        digits = str(value) if abs(value) < 10**20 else "a number of more than 20 digits"
        raise StorageError(f"{where}: {key!r} is {digits}; expected at most {MAX_INTEGER:,}. It is damaged.")


@contextmanager
def bounded_building(saved: Mapping[str, Tensor], num_modules: int) -> Iterator[None]:
    """Inside, building a model that is out of all proportion to the saved one is stopped.

    Args:
        saved: The tensors of the saved model; on the meta device they say as much.
        num_modules: How many modules without children it has.

    Raises:
        StorageError: more modules, parameters and buffers were made than eight times as many as the saved model has, or
            more bytes of them than 256 times as many, beyond what is little in any case.
    """
    max_parts = _PARTS_PER_PART * (num_modules + len(saved)) + _MIN_PARTS
    max_bytes = _BYTES_PER_BYTE * sum(tensor.nbytes for tensor in saved.values()) + _MIN_BYTES
    thread, made = threading.get_ident(), {"parts": 0, "bytes": 0}

    def count(owner: nn.Module, name: str, part: nn.Module | Tensor | None) -> None:
        if threading.get_ident() != thread or part is None:
            return
        made["parts"] += 1
        made["bytes"] += part.nbytes if isinstance(part, Tensor) and not is_lazy(part) else 0
        for what, most in (("parts", max_parts), ("bytes", max_bytes)):
            if made[what] > most:
                raise StorageError(
                    f"the dense model that the files describe has more than {most:,} {what}, which is out of all "
                    f"proportion to what they hold ({len(saved):,} tensors). They are damaged, or not ours."
                )

    handles = [
        hooks.register_module_module_registration_hook(count),
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
