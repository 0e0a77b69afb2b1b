"""Which positions of every tensor a cut keeps: the tensors are numbered, cut, and read."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.text import first_names
from bayesprune.storage.levels import Kept, gathered


@torch.no_grad()
def number_entries(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Puts in every tensor's place the numbers of its entries, in place; the shapes by name of the state dict.

    Gives what `kept_positions` reads once the model is cut. The model does not run meanwhile.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for module in model.modules():
        entries: dict[str, Any]
        for entries in (module._parameters, module._buffers):
            for name, tensor in entries.items():
                if tensor is None or name in module._non_persistent_buffers_set or not tensor.dim():
                    continue
                numbers = torch.arange(tensor.numel(), dtype=torch.double, device=tensor.device).view(tensor.shape)
                if isinstance(tensor, nn.Parameter):
                    tensor.grad, tensor.data = None, numbers
                else:
                    entries[name] = numbers
    return shapes


def kept_positions(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Kept]:
    """Of every tensor that was cut, the positions that each dimension keeps.

    Args:
        model: Numbered by `number_entries`, then cut.
        shapes: What that returned.

    Raises:
        UnsupportedModelError: a tensor lost other entries than whole positions of its dimensions.
    """
    found: dict[str, Kept] = {}
    other = []
    for name, tensor in model.state_dict().items():
        if tuple(tensor.shape) == shapes[name]:
            continue
        kept = _kept(tensor, shapes[name])
        if kept is None:
            other.append(name)
        else:
            found[name] = kept
    if other:
        raise UnsupportedModelError(
            f"{first_names(other)} lose entries that are no whole positions of their dimensions, as experts that rank "
            "their units each by itself do; such a model is no level of the larger one. Cut and save it by itself."
        )
    return found


def fill_kept(model: nn.Module, kept: Mapping[str, Kept], values: Mapping[str, Tensor]) -> None:
    """Gives a numbered and cut model the values of the larger one, in place, in their dtypes."""
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    for module in model.modules():
        entries: dict[str, Any]
        for entries in (module._parameters, module._buffers):
            for key, tensor in entries.items():
                name = names.get(id(tensor))
                if tensor is None or name is None:
                    continue
                value = gathered(values[name], kept.get(name, ())).detach().clone()
                if isinstance(tensor, nn.Parameter):
                    tensor.data = value
                else:
                    entries[key] = value


def _kept(tensor: Tensor, shape: tuple[int, ...]) -> Kept | None:
    """Positions by dimension; None where the entries are not all combinations of some."""
    if tensor.dim() != len(shape) or not tensor.numel():
        return None
    whole = torch.empty(shape, device="meta")
    numbers = tensor.detach().to("cpu", torch.long)
    found, total = [], torch.zeros((), dtype=torch.long)
    for dim, (size, stride) in enumerate(zip(shape, whole.stride(), strict=True)):
        line = numbers[(0,) * dim + (slice(None),) + (0,) * (len(shape) - dim - 1)]
        positions = line // stride % size
        total = total + (positions * stride).view(-1, *(1,) * (len(shape) - dim - 1))
        found.append(None if len(positions) == size else positions)
    return tuple(found) if torch.equal(total, numbers) else None
