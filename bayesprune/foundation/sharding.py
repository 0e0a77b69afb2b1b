"""Tensors that FSDP 2 has cut over processes, whole; and whole tensors that every process has, cut the same way."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bayesprune.errors import UnsupportedModelError


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself; one that is sharded over processes, gathered. Every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


def whole_mask(tensor: Tensor, value: bool) -> Tensor:
    """A mask of one value with the tensor's whole shape, and with its memory format unless it is sharded."""
    if hasattr(tensor, "full_tensor"):
        return torch.full(tensor.shape, value, dtype=torch.bool, device=tensor.device)
    return torch.full_like(tensor, value, dtype=torch.bool)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of the model are sharded over processes, by FSDP 2 or otherwise.

    A forward may leave those of FSDP 2 whole for a while; the model is sharded all the same.
    """
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters()) or any(
        kind.__name__ == "FSDPModule" for module in model.modules() for kind in type(module).__mro__
    )


def check_module(model: Any, caller: str) -> None:
    """Refuses what is no model.

    Raises:
        TypeError: so it is.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} got a {type(model).__name__} in place of a model; expected a torch.nn.Module.")


def check_whole(model: nn.Module, caller: str) -> None:
    """Refuses what is no model, and one that is sharded over processes, and says how to gather it.

    Raises:
        TypeError: it is no model.
        UnsupportedModelError: it is sharded.
    """
    check_module(model, caller)
    if is_sharded(model):
        raise UnsupportedModelError(
            f"{caller} got a model that is sharded over processes and needs it whole: gather its values in every "
            "process with torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)), load them into an unsharded copy (made before "
            "fully_shard), and pass that."
        )


def whole_values(state: Any) -> Any:
    """The same nested dicts, lists and tuples, with all tensors whole. Every process must call it."""
    return tree_map(lambda value: full_tensor(value) if isinstance(value, Tensor) else value, state)


def shard_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor, whole in every process, cut as `other` of the same shape is; nothing is sent."""
    if not hasattr(other, "full_tensor") or hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # absent from a torch built without torch.distributed

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)  # type: ignore[attr-defined]


def shard_values_like(parameter: Tensor, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, those of the parameter's shape sharded as it is: what an optimizer knows of the parameter."""
    return {
        key: shard_like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
        for key, value in values.items()
    }


def place_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A sharded tensor, or one of which each process has a summand, cut as `other` is; others as they are."""
    return tensor.redistribute(placements=other.placements) if hasattr(other, "full_tensor") else tensor  # type: ignore[attr-defined]
