"""JSON from a file that is not to be trusted: bytes, values and depth are bounded before anything is made of them."""

import json
from typing import Any

from bayesprune.errors import StorageError

MAX_BYTES = 64 * 2**20
MAX_VALUES = 10**6  # an empty list takes three bytes of a file and a hundred of memory
MAX_DEPTH = 100


def parse_json(data: bytes, where: str) -> Any:
    """The value of JSON text whose size is bounded before anything is made of it.

    Args:
        data: The text.
        where: What holds it, for the message.

    Raises:
        StorageError: it is too large or nested too deeply, is not JSON, or names a key twice.
    """
    if len(data) > MAX_BYTES:
        raise StorageError(f"{where} has more than {MAX_BYTES:,} bytes, which is the most that is read.")
    if (count := sum(map(data.count, (b",", b"[", b"{")))) > MAX_VALUES:
        raise StorageError(f"{where} has some {count:,} values; expected at most {MAX_VALUES:,}.")
    too_deep = StorageError(f"{where} is nested too deeply; expected at most {MAX_DEPTH} levels.")
    try:
        value = json.loads(data, object_pairs_hook=_once)
    except RecursionError as error:
        raise too_deep from error
    except ValueError as error:  # not UTF-8, not JSON
        raise StorageError(f"{where} is not valid JSON: {error}. It is damaged or truncated; save again.") from error
    if _depth(value) > MAX_DEPTH:
        raise too_deep
    return value


def _depth(value: Any) -> int:
    """How many lists and objects stand inside each other, found without recursion."""
    depth, level = 0, [value]
    while level := [node for node in level if isinstance(node, (dict, list))]:
        depth += 1
        level = [item for node in level for item in (node.values() if isinstance(node, dict) else node)]
    return depth


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; of a key that stands there twice, readers would take one or the other."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("it names a key twice in one object")
    return value
