"""Covariance beyond the diagonal: what positions share, and low-rank deviations that every function passes on.

The weights of a layer are the same at every position of an image and every token of a text, so the noise of a unit
hardly averages away over positions. Beside the variance v of every entry stands `shared`, the mean covariance between
two positions of the same unit: a low-rank covariance with one direction a unit. It has size 1 in the dimensions along
which it is shared, so it costs next to nothing, and its shape says by itself which dimensions are positions.

The covariance of a tensor is diag(residual) + sum_k u_k u_k^T. A posterior starts with random signs, u_k = std * r_k /
sqrt(K), whose outer products are its covariance in expectation; a function of several
tensors passes them on as J u_k, by forward-mode differentiation at the means, and the residual by its rule for
independent numbers. So the covariance of anything with anything is there, to first order and with the spread of K
samples: a variance has a relative standard error of about sqrt(2 / K).

Cost: K products for each tensor with directions, or uncertain weight, that a product takes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from bayesprune.foundation import noise
from bayesprune.moments.memory import KnownMoments, MomentTensors
from bayesprune.moments.registry import lineariser
from bayesprune.moments.settings import current
from bayesprune.moments.tensor import Moments, parts, plain


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


def shared_dims(x: MomentTensors) -> set[int]:
    """The dimensions, counted from the end, along which covariance is known."""
    if x.shared is None:
        return set()
    shared, shape = aligned(x.shared, x.mean.dim()).shape, x.mean.shape
    return {dim - len(shape) for dim, size in enumerate(shape) if size > 1 and shared[dim] == 1}


def shared_along(x: MomentTensors, dims: set[int]) -> Tensor | None:
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


def common_dims(*operands: MomentTensors) -> set[int]:
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


Product = Callable[[Tensor, Tensor], Tensor]


def through_weights(
    product: Product, x: KnownMoments, weight: MomentTensors, bias: MomentTensors, mean: Tensor, feature_dim: int
) -> Moments:
    """The output of an operation on an input and independent weights, in K directions and a residual.

    The noise of the weights starts here: u_k = f(m, std * r_k) / sqrt(K). Cost: K products for an uncertain weight, K
    for an input with directions, and up to two for what is in neither.

    Args:
        product: f(input, weight), linear in both; the input may have another dimension in front.
        x: The input.
        weight: The weight's mean and variance.
        bias: The bias' mean and variance (O), if there is one.
        mean: The output's mean.
        feature_dim: The (negative) dimension of the features in the output.
    """
    count = current().num_directions if x.directions is None else len(x.directions)
    directions, dtype = [], torch.promote_types(mean.dtype, torch.float32)

    def drawn(variance: Tensor) -> list[Tensor]:
        std = variance.to(dtype).sqrt() * count**-0.5
        signs = noise.many_signs(count, std.shape, device=std.device, dtype=dtype)
        return [std * sign for sign in signs]

    with torch.autocast(mean.device.type, enabled=False):
        w = weight.mean.to(dtype)
        if x.directions is not None:
            directions.append(product(x.directions, w))
        if weight.variance is not None:
            m = x.parts.mean.to(dtype)
            directions.append(torch.stack([product(m, draw) for draw in drawn(weight.variance)]))
        if bias.variance is not None:
            shape = (count, *(1,) * (mean.dim() + feature_dim), -1, *(1,) * (-feature_dim - 1))
            directions.append(torch.stack(drawn(bias.variance)).reshape(shape).expand(count, *mean.shape))
        residual = product(x.residual, w.square()) if x.residual is not None else None
        if x.parts.variance is not None and weight.variance is not None:
            second = product(x.parts.variance, weight.variance)
            residual = second if residual is None else residual + second
    return Moments.along(mean, sum(directions[1:], start=directions[0]), residual)


@lineariser
def linearised(function: Callable[..., Any], rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for tensors with directions, from the function itself and its rule for independent numbers."""

    def along(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        found = {i: known for i, leaf in enumerate(leaves) if (known := _known(leaf)) is not None}
        rest = [_residual(leaf) for leaf in leaves]
        is_uncertain = any(isinstance(leaf, Moments) for leaf in rest)
        result = _called(rule if is_uncertain else function, rest, spec)
        tangents = _pushed(function, leaves, spec, found)
        flat, out_spec = tree_flatten(result)
        pairs = zip(flat, tree_flatten(tangents)[0], strict=True)
        return tree_unflatten([_joined(*pair) for pair in pairs], out_spec)

    return along


def _known(leaf: Any) -> KnownMoments | None:
    known = leaf.source.known() if isinstance(leaf, Moments) else None
    return known if known is not None and known.directions is not None else None


def _residual(leaf: Any) -> Any:
    known = _known(leaf)
    if known is None:
        return leaf
    return known.parts.mean if known.residual is None else Moments(known.parts.mean, known.residual)


def _called(function: Callable[..., Any], leaves: list[Any], spec: Any) -> Any:
    args, kwargs = tree_unflatten(leaves, spec)
    return function(*args, **kwargs)


def _pushed(function: Callable[..., Any], leaves: list[Any], spec: Any, found: dict[int, KnownMoments]) -> Any:
    """The directions of the results: (K, *shape) for each tensor that the function returns."""
    directions = [known.directions for known in found.values() if known.directions is not None]
    means = [plain(leaves[i]).to(known.directions.dtype) for i, known in found.items()]  # type: ignore[union-attr]
    dtype = means[0].dtype

    def at(*tensors: Tensor) -> Any:
        filled = [_raised(plain(leaf), dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for i, tensor in zip(found, tensors, strict=True):
            filled[i] = tensor
        return _called(function, filled, spec)

    def push(*tangents: Tensor) -> Any:
        return torch.func.jvp(at, tuple(means), tangents)[1]

    device = means[0].device.type
    with torch.autocast(device, enabled=False), sdpa_kernel(SDPBackend.MATH):
        return torch.func.vmap(push)(*directions)


def _raised(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _joined(result: Any, directions: Tensor) -> Any:
    if not isinstance(result, Tensor) or not (result.is_floating_point() or result.is_complex()):
        return result
    mean, residual, _ = parts(result)
    return Moments.along(mean, directions, residual)
