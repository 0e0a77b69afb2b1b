"""The state of an attachment for files that hold no pickle: tensors by name, and JSON that says where each belongs."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def flattened(state: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of nested dicts and lists by their paths, and the rest as JSON values; `restored` is the opposite.

    JSON has text keys alone, and no tuples: a dict becomes {"dict": its pairs}, a tuple {"tuple": its entries}, and a
    tensor {"tensor": its path}.
    """
    tensors: dict[str, Tensor] = {}

    def outline(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            assert path not in tensors, "a path leads to one value"
            tensors[path] = value
            return {"tensor": path}
        if isinstance(value, Mapping):
            return {"dict": [[key, outline(entry, f"{path}/{key}")] for key, entry in value.items()]}
        if isinstance(value, list | tuple):
            entries = [outline(entry, f"{path}/{index}") for index, entry in enumerate(value)]
            return {"tuple": entries} if isinstance(value, tuple) else entries
        return value

    return tensors, outline(state, "attachment")


def restored(tensors: Mapping[str, Tensor], outline: Any) -> Any:
    """The state that `flattened` took apart.

    Raises:
        KeyError: a tensor is missing.
    """
    if isinstance(outline, list):
        return [restored(tensors, entry) for entry in outline]
    if not isinstance(outline, dict):
        return outline
    ((kind, content),) = outline.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(restored(tensors, entry) for entry in content)
    return {key: restored(tensors, entry) for key, entry in content}
