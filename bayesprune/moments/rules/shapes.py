"""Rules for what moves entries and does not mix them: views, indices, repetitions, casts. Exact; no product.

The shared part has size 1 along positions. It is expanded (a view), moved as the mean is, and the dimensions that are
still repetitions collapse again. What is shared is exact too, but where positions merge with others (`reshaped`).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from bayesprune.moments.covariance import aligned, collapse, is_tracked
from bayesprune.moments.registry import follows_directions, register_rule
from bayesprune.moments.tensor import Moments, is_uncertain, parts, plain


def moved(x: Moments, view: Callable[[Tensor], Any]) -> Any:
    """The view of every part; a tensor or a tuple of tensors, as the function returns."""
    mean, variance, shared = parts(x)
    means, variances = view(mean), view(variance)  # type: ignore[arg-type]
    if shared is None:
        return tree_map(Moments, means, variances)
    # Without strides of 0 of its own, only positions are found to be repetitions.
    found = view(aligned(shared, mean.dim()).contiguous().expand(mean.shape))
    return tree_map(lambda m, v, s: Moments(m, v, collapse(s)), means, variances, found)


def copied(x: Moments, function: Callable[[Tensor], Tensor]) -> Moments:
    """Entries picked or repeated by a function that picks the same ones at every position.

    Its result is aligned with x from the right: positions are positions still, and the function is constant along them.
    """
    mean, variance, shared = parts(x)
    assert variance is not None, "a rule is for uncertain tensors"
    if shared is not None:
        shared = aligned(shared, mean.dim())
        positions = [d - mean.dim() for d in range(mean.dim()) if shared.shape[d] == 1 and mean.shape[d] > 1]
        shared = function(shared.expand(mean.shape))
        for dim in positions:
            shared = shared.narrow(dim, 0, 1)
    return Moments(function(mean), function(variance), shared)


def spread(x: Moments, function: Callable[[Tensor], Tensor]) -> Moments:
    """Entries repeated along dimensions of size 1 or new ones, as `expand` and `repeat` do.

    Copies share all they have, which is kept where nothing else is shared; beside positions they are taken as apart.
    """
    result = copied(x, function)
    mean, variance, shared = parts(result)
    assert variance is not None, "a rule is for uncertain tensors"
    before = aligned(plain(x), mean.dim()).shape
    is_copy = all(old in (1, new) for old, new in zip(before, mean.shape, strict=True)) and before != mean.shape
    if shared is not None or not is_copy or not is_tracked():
        return result
    return Moments(mean, variance, aligned(parts(x).variance, mean.dim()))  # type: ignore[arg-type]


def reshaped(x: Any, *shape: Any) -> Moments:
    """The entries in another shape.

    Merging position dimensions gives a position dimension. Positions merged with others (the pixels of
    a window with the windows of an image) make positions of all, which share the mean; but in the first dimension, the
    examples, and in the last, features, entries stay apart. What the first dimension splits into are examples and
    positions again: models merge tokens or windows with examples for a layer, and part them behind it.
    """
    mean, variance, shared = parts(x)
    assert variance is not None, "a rule is for uncertain tensors"
    means, variances = mean.reshape(*shape), variance.reshape(*shape)
    if shared is None or not mean.numel():
        return Moments(means, variances)
    shared, sizes, parted = aligned(shared, mean.dim()), list[int](), list[int]()
    for old, new in _groups(mean.shape, means.shape):
        wide = [dim for dim in old if mean.shape[dim] > 1]
        positions = [dim for dim in wide if shared.shape[dim] == 1]
        others = [dim for dim in wide if shared.shape[dim] > 1]
        if others and (0 in others or means.dim() - 1 in new):
            shared = shared.expand([size if d in positions else -1 for d, size in enumerate(mean.shape)])
            positions = []
        elif positions and others:
            shared = shared.mean(others, keepdim=True)
        if wide == [0] and not positions and means.dim() - 1 not in new:
            parted = [dim for dim in new if means.shape[dim] > 1][1:]
        sizes += [1 if positions else means.shape[dim] for dim in new]
    shared = shared.reshape(sizes)
    return Moments(means, variances, shared.mean(parted, keepdim=True) if parted else shared)


@register_rule(Tensor.__getitem__)
def get_item(x: Moments, index: Any) -> Any:
    """Slices are views; one list of indices picks along its dimension; where there are more, nothing is shared."""
    index = index if isinstance(index, tuple) else (index,)
    index = tuple(plain(item) if isinstance(item, Tensor) else item for item in index)
    lists = [item for item in index if not (item is None or item is Ellipsis or isinstance(item, int | slice))]
    lists += [item for item in index if isinstance(item, bool)]
    if not lists:
        return moved(x, lambda part: part[index])
    rest = [item for item in index if item is not lists[0]]
    if len(lists) == 1 and all(item in (Ellipsis, slice(None)) for item in rest) and _is_list(lists[0]):
        return copied(x, lambda part: part[index])
    mean, variance, _ = parts(x)
    assert variance is not None, "a rule is for uncertain tensors"
    return Moments(mean[index], variance[index])


@register_rule(Tensor.__iter__)
@follows_directions
def iterate(x: Moments) -> Iterator[Tensor]:
    """The slices along the first dimension."""
    return iter(x.unbind(0))


@register_rule(torch.as_strided, Tensor.as_strided)
def as_strided(input: Moments, size: Any, stride: Any, storage_offset: int | None = None) -> Moments:
    """Entries by their places in memory, which windows that overlap take several times.

    Raises:
        NotImplementedError: it reaches for entries beside those of the tensor.
    """
    mean, variance, shared = parts(input)
    assert variance is not None, "a rule is for uncertain tensors"
    result, before = mean.as_strided(size, stride, storage_offset), mean.storage_offset()
    own = torch.arange(mean.numel(), device=mean.device).view(mean.shape)
    start = before if storage_offset is None else storage_offset
    last = max(before + _reach(mean), start + _reach(result))
    lookup = torch.full((last + 1,), -1, device=mean.device)
    lookup.as_strided(mean.shape, mean.stride(), before).copy_(own)
    places = lookup.as_strided(size, stride, start)
    if bool((places < 0).any()):
        raise NotImplementedError("moments: as_strided reached beside the tensor; call it on the tensor itself.")

    def taken(part: Tensor) -> Tensor:
        return part.reshape(-1)[places]

    if shared is None:
        return Moments(result, taken(variance))
    shared = aligned(shared, mean.dim())
    units = taken(torch.arange(shared.numel(), device=mean.device).view(shared.shape).expand(mean.shape))
    shared = taken(shared.expand(mean.shape))
    for dim in range(units.dim()):
        if bool((units == units.narrow(dim, 0, 1)).all()):
            units, shared = units.narrow(dim, 0, 1), shared.narrow(dim, 0, 1)
    return Moments(result, taken(variance), shared)


@register_rule(torch.repeat_interleave, Tensor.repeat_interleave)
def repeat_interleave(input: Moments, repeats: Any, dim: int | None = None, **options: Any) -> Moments:
    """Each entry several times in a row."""
    if dim is None:
        return repeat_interleave(reshaped(input, -1), repeats, 0, **options)
    return copied(input, lambda part: part.repeat_interleave(repeats, dim, **options))


@register_rule(torch.roll, Tensor.roll)
def roll(input: Any, shifts: Any, dims: Any = ()) -> Moments:
    """Entries moved round."""
    if dims is None or dims == ():
        return reshaped(reshaped(input, -1).roll(shifts, 0), input.shape)
    return copied(input, lambda part: part.roll(shifts, dims))


def picked(x: Moments, function: Callable[[Tensor], Tensor], dim: int) -> Moments:
    """Entries picked along a dimension, others at each position; positions share as they did, picked units do not."""
    mean, variance, shared = parts(x)
    if shared is not None and (aligned(shared, mean.dim()).shape[dim] != 1 or mean.shape[dim] == 1):
        x = Moments(mean, variance)
    return copied(x, function)


@register_rule(torch.pixel_shuffle, F.pixel_shuffle)
def pixel_shuffle(input: Moments, upscale_factor: int) -> Moments:
    """Channels (..., C r r, H, W) to pixels (..., C, H r, W r), which share the mean of what the channels did."""
    return _regrouped(
        input,
        lambda part: F.pixel_shuffle(part, upscale_factor),
        lambda shared: shared.unflatten(-3, (-1, upscale_factor**2)).mean(-3),
    )


@register_rule(torch.pixel_unshuffle, F.pixel_unshuffle)
def pixel_unshuffle(input: Moments, downscale_factor: int) -> Moments:
    """Pixels (..., C, H r, W r) to channels (..., C r r, H, W)."""
    return _regrouped(
        input,
        lambda part: F.pixel_unshuffle(part, downscale_factor),
        lambda shared: shared.repeat_interleave(downscale_factor**2, -3),
    )


def _regrouped(x: Moments, function: Callable[[Tensor], Tensor], regroup: Callable[[Tensor], Tensor]) -> Moments:
    """Pixels and channels exchanged; `regroup` does it to what all pixels share."""
    mean, variance, shared = parts(x)
    assert variance is not None, "a rule is for uncertain tensors"
    if shared is not None:
        shared = aligned(shared, mean.dim())
        shared = regroup(shared) if shared.shape[-2:] == (1, 1) else None
    return Moments(function(mean), function(variance), shared)


def _reach(x: Tensor) -> int:
    """The place of the last entry in memory, from that of the first."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _is_list(index: Any) -> bool:
    return torch.as_tensor(index).dim() == 1


def _groups(old: torch.Size, new: torch.Size) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of old and new dimensions that hold the same entries."""
    groups, i, j = list[tuple[list[int], list[int]]](), 0, 0
    while i < len(old) or j < len(new):
        olds, news, have, want = list[int](), list[int](), 1, 1
        while have != want or not (olds or news):
            if j == len(new) or (have <= want and i < len(old)):
                olds, have, i = [*olds, i], have * old[i], i + 1
            else:
                news, want, j = [*news, j], want * new[j], j + 1
        groups.append((olds, news))
    return groups


def _named(*names: str) -> list[Callable[..., Any]]:
    return [getattr(owner, name) for owner in (torch, Tensor) for name in names if hasattr(owner, name)]


def _register(rule: Callable[..., Any], *functions: Callable[..., Any]) -> None:
    """A rule that gets the function first; of arguments beside the tensor, the means are all it needs."""
    for function in functions:

        def guarded(x: Any, *args: Any, _function: Callable[..., Any] = function, **kwargs: Any) -> Any:
            args, kwargs = tree_map(lambda leaf: plain(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            return rule(_function, x, *args, **kwargs) if is_uncertain(x) else _function(plain(x), *args, **kwargs)

        register_rule(function)(guarded)


def _register_through(rule: Callable[..., Any], *functions: Callable[..., Any]) -> None:
    """The same for a rule that takes a tensor and a function of one tensor."""
    _register(lambda function, x, *args, **kwargs: rule(x, lambda part: function(part, *args, **kwargs)), *functions)


def _reshaped_like(function: Callable[..., Any], x: Moments, *args: Any, **kwargs: Any) -> Moments:
    return reshaped(x, function(plain(x), *args, **kwargs).shape)


def _by_number(function: Callable[..., Any], x: Moments, *args: Any) -> Moments:
    """Entries picked one by one, which share nothing."""
    mean, variance, _ = parts(x)
    return Moments(function(mean, *args), function(variance, *args))


def _viewed(_: Any, x: Moments, *shape: Any, **kwargs: Any) -> Moments:
    shape = shape or tuple(kwargs.values())
    if isinstance(shape[0], torch.dtype):
        raise TypeError("a tensor with variance cannot be viewed as another dtype; cast it with .to(dtype).")
    return reshaped(x, *shape)


def _cast(function: Callable[..., Any], x: Moments, *args: Any, **kwargs: Any) -> Any:
    """The mean as asked; the rest follows its device, and its dtype as far as float32."""
    mean, variance, shared = parts(x)
    assert variance is not None, "a rule is for uncertain tensors"
    cast = function(mean, *args, **kwargs)
    if cast is mean:
        return x
    if not isinstance(cast, Tensor):
        return cast
    if not cast.is_floating_point() and not cast.is_complex():  # taken at the mean, as comparisons are
        return cast
    dtype = torch.promote_types(cast.dtype, torch.float32)
    return Moments(cast, variance.to(cast.device, dtype), None if shared is None else shared.to(cast.device, dtype))


_register_through(
    moved,
    *_named("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "unsqueeze", "squeeze", "t"),
    *_named("adjoint", "select", "narrow", "unbind", "chunk", "split", "tensor_split", "split_with_sizes"),
    *_named("hsplit", "vsplit", "dsplit", "diagonal", "unfold", "detach"),
    *(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data")),
)
_register_through(moved, *_named("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "diag_embed"))
_register_through(copied, *_named("flip", "fliplr", "flipud", "index_select", "channel_shuffle"))
_register_through(spread, *_named("expand", "expand_as", "broadcast_to", "repeat", "tile"))
_register(_viewed, Tensor.view, *_named("reshape"))
_register(lambda _, x, other: reshaped(x, other.shape), Tensor.view_as, Tensor.reshape_as)
_register(_reshaped_like, *_named("flatten", "unflatten", "ravel", "atleast_1d", "atleast_2d", "atleast_3d"))
_register(_by_number, *_named("take", "masked_select"))
_register(lambda f, x, dim, index: picked(x, lambda part: f(part, dim, index), dim), *_named("gather"))
_register(lambda f, x, index, dim: picked(x, lambda part: f(part, index, dim), dim), *_named("take_along_dim"))
_register(
    _cast, *_named("to", "float", "double", "half", "bfloat16", "type_as", "type", "contiguous", "clone", "cpu", "cuda")
)
