"""`Moments`: a tensor of means and variances that goes through a model's own, unmodified forward.

Every torch function that the forward calls is looked up in a table of rules (`__torch_function__`, so that mean and
variance stay differentiable). There is no data behind the wrapper, so no operation can pass the variance over.

Elementwise functions are lazy: their result remembers the tensor it came from, so that x * sigmoid(x), or a GELU that
is written out, is one function of x and not a product of independent numbers.

What is written in place is seen by all that looks at the same memory, as with plain tensors (see `memory`).
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from bayesprune.moments.memory import KnownMoments, LazyMoments, Memory, MomentTensors, View
from bayesprune.moments.registry import find_rule, following


class Moments(Tensor):
    """A tensor known by mean and variance, diagonal but for what `shared` says.

    Examples:
        >>> import torch
        >>> from bayesprune.moments import Moments
        >>> x = Moments(torch.tensor([1.0, -3.0]), torch.tensor([0.25, 0.25]))
        >>> (2 * x).variance
        tensor([1., 1.])
    """

    _memory: Memory
    _view: View | None
    _source: LazyMoments
    _seen: int

    def __new__(cls, mean: Tensor, variance: Tensor | None = None, shared: Tensor | None = None) -> "Moments":
        """The tensor with these moments.

        Args:
            mean: A floating-point tensor.
            variance: Of a shape that broadcasts to the mean's; None while the tensor is certain.
            shared: Covariance along the dimensions where it has size 1 (see `MomentTensors`).

        Raises:
            TypeError: the mean is not a floating-point tensor.
        """
        mean = plain(mean)
        if not mean.is_floating_point() and not mean.is_complex():
            raise TypeError(f"Moments got a mean of dtype {mean.dtype}; expected a floating-point tensor.")
        if variance is not None:
            variance = variance.to(torch.promote_types(mean.dtype, torch.float32)).expand(mean.shape)
        return cls.of(LazyMoments(KnownMoments(MomentTensors(mean, variance, shared))))

    @classmethod
    def along(cls, mean: Tensor, directions: Tensor, residual: Tensor | None = None) -> "Moments":
        """A tensor whose covariance is `directions` (K, *shape), summed as outer products, plus a diagonal residual."""
        return cls.of(LazyMoments(KnownMoments.along(mean, directions, residual)))

    @classmethod
    def of(cls, source: LazyMoments) -> "Moments":
        """The tensor whose moments come from there."""
        like = source.like
        made = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        return made._place(Memory(source), None, source)

    def _place(self, memory: Memory, view: View | None, source: LazyMoments) -> "Moments":
        self._memory, self._view, self._source, self._seen = memory, view, source, memory.version
        memory.aliases[id(self)] = self
        return self

    @property
    def source(self) -> LazyMoments:
        """The tensor's lazy moments; read anew from the memory where another tensor has written into it."""
        if self._seen != self._memory.version:
            self._source, self._seen = _seen_through(self._view, self._memory), self._memory.version
        return self._source

    @property
    def mean(self) -> Any:  # type: ignore[override]
        """The means: a tensor; called, it reduces, since models call `x.mean(dim)`."""
        mean = self.source.parts().mean
        if type(mean) not in (Tensor, nn.Parameter):  # a graph is being recorded: a tensor of it has one class
            return partial(torch.mean, self)
        made = mean.as_subclass(_Mean)
        made.whole = self
        return made

    @property
    def variance(self) -> Tensor | None:
        """The variances, in the mean's shape; None while the tensor is certain."""
        return self.source.parts().variance

    @property
    def shared(self) -> Tensor | None:
        """The shared part of the variances (see `MomentTensors`)."""
        return self.source.parts().shared

    @property
    def directions(self) -> Tensor | None:
        """The K common deviations (K, *shape) that `settings(covariance="low_rank")` follows; None elsewhere."""
        return self.source.known().directions

    def copy_from(self, other: Tensor) -> "Moments":
        """Takes over the moments of another tensor of its shape, as in-place functions do; returns itself."""
        source = (other if isinstance(other, Moments) else Moments(other)).source
        if self._view is not None and not self._memory.is_seen_beside(self):
            return self._place(Memory(source), None, source)
        self._memory.write(self._view, source)
        self._source, self._seen = source, self._memory.version
        return self

    def replace(self, other: "Moments") -> "Moments":
        """Is, from now on, what the other is, as functions do that change a tensor's shape in place; returns itself."""
        return self._place(other._memory, other._view, other.source)

    def is_view_of(self, other: "Moments", view: View) -> None:
        """Looks, from now on, at the other's memory, of which it is this view."""
        source, outer = self.source, other._view
        self._place(other._memory, view if outer is None else lambda whole: view(outer(whole)), source)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        mean, variance, _ = parts(self)
        return f"Moments(mean={mean!r}, variance={variance!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Moments, tuple(parts(self))

    def __deepcopy__(self, memo: Any) -> "Moments":
        mean, *rest = parts(self)
        return Moments(mean.clone(), *(None if part is None else part.clone() for part in rest))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            return func(args[0].source.like, *args[1:], **kwargs)
        leaves = tree_leaves((args, kwargs))
        uncertain = [leaf for leaf in leaves if is_uncertain(leaf)]
        if uncertain:
            rule = find_rule(func, is_complex=any(map(_is_complex, leaves)))
            if any(map(follows, uncertain)):
                rule = following(func, rule)
            result = rule(*args, **kwargs)
        else:
            result = _of_means(func, args, kwargs)
        if func in _VIEWS and isinstance(args[0], Moments):
            _look(result, func, args, kwargs)
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        find_rule(func)  # raises: rules stand for torch's public functions, none for the operators below them
        raise AssertionError(f"{func} reached the dispatcher with moments")


class _Mean(Tensor):
    """A plain tensor of means that a model may also call as the method `Tensor.mean`."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    whole: Moments

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.mean(self.whole, *args, **kwargs)


def known(x: Any) -> KnownMoments:
    """The moments of a tensor and the directions of its covariance; of a number or plain tensor, itself as the mean."""
    return x.source.known() if isinstance(x, Moments) else KnownMoments(MomentTensors(x, None, None))


def parts(x: Any) -> MomentTensors:
    """Mean, variance and shared part of a tensor with moments; of a plain tensor or a number, itself as the mean."""
    return x.source.parts() if isinstance(x, Moments) else MomentTensors(x, None, None)


def plain(x: Tensor) -> Tensor:
    """The means of a tensor with moments as a plain tensor; any other tensor unchanged."""
    if isinstance(x, Moments):
        return x.source.parts().mean
    return x.as_subclass(Tensor) if isinstance(x, _Mean) else x


def follows(x: Any) -> bool:
    """Whether the directions of its covariance are known."""
    return isinstance(x, Moments) and x.source.base.known().directions is not None


def is_uncertain(x: Any) -> bool:
    """Whether something is a tensor with a variance."""
    return isinstance(x, Moments) and x.source.is_uncertain


def _is_complex(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype.is_complex


def _of_means(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The function of certain tensors: itself at their means; what it writes in place is returned as it was given."""
    leaves, spec = tree_flatten((args, kwargs))
    means = [plain(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    plain_args, plain_kwargs = tree_unflatten(means, spec)
    given = {id(mean): leaf for mean, leaf in zip(means, leaves, strict=True) if isinstance(mean, Tensor)}
    found = func(*plain_args, **plain_kwargs)
    return tree_map(lambda result: given[id(result)] if id(result) in given else _certain(result), found)


def _look(result: Any, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Tensors in the result that are views of the first argument look at its memory."""
    base, *rest = args
    memory = plain(base).untyped_storage()._cdata
    for number, found in enumerate(tree_leaves(result)):
        if isinstance(found, Moments) and found is not base and plain(found).untyped_storage()._cdata == memory:
            found.is_view_of(base, lambda whole, i=number: tree_leaves(func(whole, *rest, **kwargs))[i])


def _certain(result: Any) -> Any:
    is_float = isinstance(result, Tensor) and not isinstance(result, Moments) and result.is_floating_point()
    return Moments(result) if is_float else result


def writable(x: Any, erase: Callable[[Tensor], Any]) -> "Moments":
    """The tensor itself, which from now on has moments.

    A plain tensor into which something uncertain is written (a buffer of zeros that a model fills by slices, a cache)
    turns into one with moments itself, so that every variable that holds it sees it. Plain views made of it before stay
    plain: where the write went they hold nan from then on, since a variance that is passed over in silence would be
    wrong.

    Args:
        x: A tensor with moments, or a plain one.
        erase: Fills what is about to be written, in a plain tensor, with nan.

    Raises:
        TypeError: it belongs to the model (a parameter, a buffer, an attribute), holds integers, or is of another class
            of tensors.
    """
    if isinstance(x, Moments):
        return x
    base: Any = x if x._base is None else x._base
    if type(x) is not Tensor or type(base) not in (Tensor, Moments) or not x.is_floating_point() or _is_state(x, base):
        kind = "tensor of the model" if type(x) is Tensor and x.is_floating_point() else type(x).__name__
        raise TypeError(
            f"a {kind} ({x.dtype}) got an uncertain tensor added, multiplied or assigned in place; only tensors with "
            "moments, and plain floating-point tensors that the forward made itself, can take one. Write it out of "
            "place."
        )
    if base is x and x.untyped_storage().nbytes() > x.numel() * x.element_size():
        raise TypeError(
            "a view of a plain tensor that does not know of it (as under torch.inference_mode) got an uncertain tensor "
            "in place; run under torch.no_grad, or write out of place."
        )
    shape, stride, offset = x.shape, x.stride(), x.storage_offset()
    if not isinstance(base, Moments):
        mean = torch.ops.aten.alias(base).clone()
        if mean.stride() != base.stride():
            raise TypeError("a plain tensor with overlapping entries got an uncertain one in place; clone it before.")
        _erase(x, erase)
        source = LazyMoments(KnownMoments(MomentTensors(mean, None, None)))
        _turned(base)._place(Memory(source), None, source)
    else:
        _erase(x, erase)
    if base is x:
        return base
    with torch._C.DisableTorchFunctionSubclass():
        start = offset - base.storage_offset()

    def view(whole: Any) -> Any:
        return whole.as_strided(shape, stride, start)

    memory = base._memory
    return _turned(x)._place(memory, view, _seen_through(view, memory))


def _seen_through(view: View | None, memory: Memory) -> LazyMoments:
    """The moments that a view of the memory shows now."""
    source = memory.read()
    return source if view is None else view(Moments.of(source)).source


def _turned(x: Any) -> "Moments":
    x.__class__ = Moments
    return x


def _erase(x: Tensor, erase: Callable[[Tensor], Any]) -> None:
    with torch.no_grad():
        erase(x.detach())


def to_nan(x: Tensor) -> None:
    """Fills it."""
    x.fill_(math.nan)


def _is_state(*tensors: Tensor) -> bool:
    """Whether one of these is a buffer, or another attribute, of the outermost module that is being called."""
    calling = [local for info in inspect.stack(0) if isinstance(local := info.frame.f_locals.get("self"), nn.Module)]
    modules = calling[-1].modules() if calling else ()
    held = (value for module in modules for value in (*module._buffers.values(), *vars(module).values()))
    return any(value is x for value in held for x in tensors)


_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta")
_PROPERTIES += ("is_sparse", "is_quantized", "is_nested", "is_mkldnn")
_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "stride", "__len__", "is_floating_point", "is_complex")
_METHODS += ("is_contiguous", "element_size", "get_device", "storage_offset")
_METADATA = {getattr(Tensor, name).__get__ for name in _PROPERTIES}
_METADATA |= {getattr(Tensor, name) for name in _METHODS} | {torch.is_floating_point, torch.is_complex, torch.numel}

_VIEW_NAMES = ("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "t")
_VIEW_NAMES += ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "select", "narrow", "unbind")
_VIEW_NAMES += ("chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit", "diagonal")
_VIEW_NAMES += (
    "unfold",
    "expand",
    "expand_as",
    "broadcast_to",
    "as_strided",
    "detach",
    "adjoint",
    "__getitem__",
    "view_as_real",
)
_VIEW_NAMES += ("view_as_complex", "real", "imag")
_VIEWS = {getattr(owner, name) for owner in (torch, Tensor) for name in _VIEW_NAMES if hasattr(owner, name)}
_VIEWS |= {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data", "real", "imag")}
