"""What has no posterior, such as norms and their running statistics: it keeps 11 significant bits, as in float16."""

import copy
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from bayesprune.convert import to_deterministic

_BITS = 11


def ordinary_names(model: nn.Module) -> Collection[str]:
    """Names of the tensors that the state dict has once the model is an ordinary one."""
    return to_deterministic(copy.deepcopy(model)).state_dict().keys()


def ordinary_tensors(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """The tensors of these names, by name."""
    found = model.state_dict()
    return {name: found[name] for name in found if name in names and isinstance(found[name], Tensor)}


def without_posterior(tensors: dict[str, Tensor], own: Collection[Tensor]) -> Iterator[Tensor]:
    """Those with a fractional part that are none of `own`."""
    taken = {tensor.data_ptr() for tensor in own}
    yield from (t for t in tensors.values() if t.is_floating_point() and t.data_ptr() not in taken)


def significant(tensor: Tensor) -> Tensor:
    """The values with 11 significant bits."""
    mantissas, exponents = torch.frexp(tensor)
    return torch.ldexp((mantissas * 2**_BITS).round() / 2**_BITS, exponents)
