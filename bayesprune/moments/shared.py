"""The covariance that positions share because they met the same weights, kept as one number a unit.

The weights of a layer are the same at every position of an image and every token of a text, so the noise of a unit
hardly averages away over positions. Beside the variance v of every entry stands `shared`, the mean covariance between
two positions of the same unit: a low-rank covariance with one direction a unit. It has size 1 in the dimensions along
which it is shared, so it costs next to nothing, and its shape says by itself which dimensions are positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bayesprune.moments.settings import current
from bayesprune.moments.tensor import Parts


def is_tracked() -> bool:
    """Whether covariance between positions is kept."""
    return current().covariance == "shared"


def collapse(x: Tensor) -> Tensor:
    """A tensor without its repetitions: dimensions that were expanded have size 1 again."""
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if size > 1 and stride == 0:
            x = x.narrow(dim, 0, 1)
    return x


def mean_over(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The mean over the dimensions that have size 1 in `shape`, which aligns with x from the right; they stay, as 1."""
    shape = (1,) * (x.dim() - len(shape)) + tuple(shape)
    dims = [dim for dim, size in enumerate(shape) if size == 1 and x.shape[dim] > 1]
    return x.mean(dims, keepdim=True) if dims else x


def products_of_pairs(x: Tensor, shape: Sequence[int]) -> Tensor:
    """The mean of x_p x_q over pairs of different positions: what a common factor's variance is multiplied by.

    The mean over all pairs, which is the square of the mean, has too much of x_p^2 in it where positions are few.
    """
    mean = mean_over(x, shape)
    count = x.numel() // max(mean.numel(), 1)
    if count == 1:
        return mean.square()
    return (mean.square() * count - mean_over(x.square(), shape)) / (count - 1)


def shared_dims(x: Parts) -> set[int]:
    """The dimensions, counted from the end, along which covariance is known."""
    if x.shared is None:
        return set()
    shared, shape = aligned(x.shared, x.mean.dim()).shape, x.mean.shape
    return {dim - len(shape) for dim, size in enumerate(shape) if size > 1 and shared[dim] == 1}


def shared_along(x: Parts, dims: set[int]) -> Tensor | None:
    """Mean covariance between the entries of x along these (negative) dimensions; None is zero.

    A tensor that is itself repeated along all of them shares its whole variance.
    """
    if x.variance is None:
        return None
    own = {dim for dim in dims if -dim <= x.mean.dim() and x.mean.shape[dim] > 1}
    if not own:
        return x.variance
    if x.shared is None or not own & shared_dims(x):
        return None
    shared = aligned(x.shared, x.mean.dim())
    rest = [dim for dim in own if shared.shape[dim] > 1]
    return shared.mean(rest, keepdim=True) if rest else shared


def common_dims(*operands: Parts) -> set[int]:
    """The dimensions along which a function of these shares covariance: theirs, else those they spread over."""
    if not is_tracked():
        return set()
    uncertain = [x for x in operands if x.variance is not None]
    found = set[int]().union(*(shared_dims(x) for x in uncertain))
    if found:
        return found
    shape = torch.broadcast_shapes(*(x.mean.shape for x in operands if isinstance(x.mean, Tensor)))
    sizes = [aligned(x.mean, len(shape)).shape for x in uncertain]
    return {dim for dim in range(-len(shape), 0) if shape[dim] > 1 and any(size[dim] == 1 for size in sizes)}


def aligned(x: Tensor, num_dims: int) -> Tensor:
    """The tensor with leading dimensions of size 1 up to this number."""
    return x.reshape((1,) * (num_dims - x.dim()) + tuple(x.shape))
