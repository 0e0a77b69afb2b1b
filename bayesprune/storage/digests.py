"""SHA-256 of what is saved: of every tensor in its file's header, of every JSON file in one of them.

They find damage, not malice: whoever can write the files can write digests that fit.
A tensor's digest covers its dtype and shape as well, so a damaged header does not give the same bytes another meaning.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bayesprune.errors import StorageError
from bayesprune.storage.parsing import parse_json

KEY = "sha256"
_MAX_NAMED = 4
_ADVICE = "It was damaged or changed after it was saved: copy it anew from its source, or save the model again."


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    found = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    data = tensor.detach().cpu().contiguous().flatten()
    if data.is_complex():
        data = torch.view_as_real(data).flatten()
    found.update(data.view(torch.uint8).numpy().data)
    return found.hexdigest()


def tensor_header(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The header entry of a safetensors file that holds the digests of these tensors."""
    return {KEY: json.dumps({name: tensor_digest(tensor) for name, tensor in tensors.items()})}


def check_tensors(tensors: Mapping[str, Tensor], header: Mapping[str, str], where: str) -> None:
    """Refuses tensors that are not those whose digests the header holds.

    Args:
        tensors: Of one file.
        header: Its metadata.
        where: The file's name, for the message.

    Raises:
        StorageError: a tensor has another digest, or none.
    """
    recorded = parse_json(header.get(KEY, "null").encode(), f"the entry {KEY!r} in the header of {where}")
    if not isinstance(recorded, dict):
        raise StorageError(f"the header of {where} holds no digests of its tensors under {KEY!r}. {_ADVICE}")
    other = [name for name, tensor in tensors.items() if recorded.get(name) != tensor_digest(tensor)]
    if other:
        names = ", ".join(map(repr, other[:_MAX_NAMED])) + (" ..." if len(other) > _MAX_NAMED else "")
        raise StorageError(
            f"{len(other)} of {len(tensors)} tensors of {where} do not have the SHA-256 they were saved with: {names}. "
            f"{_ADVICE}"
        )


def json_digest(value: Any) -> str:
    """SHA-256 of a JSON value as it is read again, whatever the order of its keys and its white space."""
    value = json.loads(json.dumps(value))  # keys are texts now, which sort otherwise than numbers
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its own digest among its values."""
    content = {key: item for key, item in value.items() if key != KEY}
    return content | {KEY: json_digest(content)}


def check_seal(value: Mapping[str, Any], where: str) -> None:
    """Refuses an object that is not as `sealed` left it.

    Raises:
        StorageError: its digest is another one, or missing.
    """
    check_json({key: item for key, item in value.items() if key != KEY}, value.get(KEY), where)


def check_json(value: Any, digest: Any, where: str) -> None:
    """Refuses a JSON value that does not have this digest.

    Raises:
        StorageError: it has another one.
    """
    if json_digest(value) != digest:
        raise StorageError(f"{where} does not have the SHA-256 it was saved with. {_ADVICE}")
