"""How the stds of one weight tensor are parametrised: log stds that add up, each of a broadcastable shape.

`per_weight` is the mean field; `per_channel`, one std per output unit or kernel, is that of extended variational
inference (Dera et al., 2019); `rank_one` is an outer product of a std per output and one per input.
A structure maps the tensor's shape and its output dimensions to the shapes of its parts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bayesprune.estimators import Factors

Shape = tuple[int, ...]
Structure = Callable[[Shape, Shape], dict[str, Shape]]


def per_weight(shape: Shape, unit_dims: Shape) -> dict[str, Shape]:
    """One log std for every weight."""
    return {"log_std": shape}


def per_channel(shape: Shape, unit_dims: Shape) -> dict[str, Shape]:
    """One log std for every output unit."""
    return {"log_std": _broadcastable(shape, unit_dims)}


def rank_one(shape: Shape, unit_dims: Shape) -> dict[str, Shape]:
    """A log std for every output plus one for every input (of a group, in a grouped convolution)."""
    row = unit_dims[-1:]
    column = (1 - row[0],)
    return {"row_log_std": _broadcastable(shape, row), "column_log_std": _broadcastable(shape, column)}


STRUCTURES: dict[str, Structure] = {"per_weight": per_weight, "rank_one": rank_one, "per_channel": per_channel}
SUFFIXES = ("log_std", "row_log_std", "column_log_std")


def part_shapes(std: str, shape: Shape, unit_dims: Shape, *, num_stacked: int = 0) -> dict[str, Shape]:
    """The shapes of the log-std parts by suffix; a bias (one dimension) has one for every entry.

    Of layers stacked in one tensor, which the first dimensions number, each has its own.
    """
    stacked, own = shape[:num_stacked], shape[num_stacked:]
    structure = STRUCTURES["per_weight" if len(own) < 2 else std]
    parts = structure(own, tuple(dim - num_stacked for dim in unit_dims if dim >= num_stacked))
    return {suffix: (*stacked, *part) for suffix, part in parts.items()}


def factors(log_stds: tuple[Tensor, ...], *, unit_dim: int, groups: int) -> Factors | None:
    """The parts of a weight's log std as rows and columns of its groups; None where they are no outer product.

    Of the first two dimensions `unit_dim` counts output units (of one group, where it is 1), the other one inputs; what
    dimension 0 counts, it counts for all groups.
    """
    rows, columns = log_stds[0], log_stds[1] if len(log_stds) > 1 else None
    others = [size for dim, size in enumerate(rows.shape) if dim != unit_dim]
    if any(size != 1 for size in others):
        return None
    by_group = rows.view(groups, -1) if unit_dim == 0 else rows.view(1, -1).expand(groups, -1)
    if columns is None:
        return Factors(by_group, None)
    return Factors(by_group, columns.view(1, -1) if unit_dim == 0 else columns.view(groups, -1))


def _broadcastable(shape: Shape, dims: Shape) -> Shape:
    return tuple(size if dim in dims else 1 for dim, size in enumerate(shape))


def not_narrowed(
    fn: Callable[[Tensor], Tensor], spared: Callable[[Tensor], bool] = lambda tensor: True
) -> Callable[[Tensor], Tensor]:
    """The function for `nn.Module._apply`, but where it casts a spared tensor to half precision it only moves it."""

    def apply(tensor: Tensor) -> Tensor:
        applied = fn(tensor)
        is_narrowed = applied.dtype in (torch.float16, torch.bfloat16)
        return tensor.to(applied.device) if is_narrowed and spared(tensor) else applied

    return apply
