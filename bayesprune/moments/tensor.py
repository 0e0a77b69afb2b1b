"""`Moments`: a tensor of means and variances that goes through a model's own, unmodified forward.

Every torch function that the forward calls is looked up in a table of rules (`__torch_function__`, so that mean and
variance stay differentiable). There is no data behind the wrapper, so no operation can pass the variance over.

Elementwise functions are lazy: their result remembers the tensor it came from, so that x * sigmoid(x), or a GELU that
is written out, is one function of x and not a product of independent numbers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bayesprune.moments.registry import find_rule, following

Function = Callable[[Tensor], Tensor]


class Parts(NamedTuple):
    """What a tensor with moments consists of, as plain tensors.

    Attributes:
        mean: Any shape.
        variance: The mean's shape, float32 or better; None where the tensor is certain.
        shared: The part of the variance that entries have in common along each dimension where it has size 1 and the
            mean has not: the mean covariance between two of them. None where nothing is known of covariance.
    """

    mean: Tensor
    variance: Tensor | None
    shared: Tensor | None


class Known(NamedTuple):
    """The moments of a tensor, with the directions of its covariance where these are followed.

    Attributes:
        parts: Mean, whole variance, shared part.
        directions: K deviations (K, *shape) that the entries have in common, or None: covariance is their sum of outer
            products, plus `residual` on the diagonal.
        residual: The variance that is not in the directions; None is zero.
    """

    parts: Parts
    directions: Tensor | None = None
    residual: Tensor | None = None


class Source:
    """Where the moments of a tensor come from: known, or computed when they are asked for.

    Attributes:
        like: A tensor of the same shape, dtype and device.
        base: The source that this one is a function of; itself where it is known.
        function: That function, elementwise; None where it is known.
        is_gaussian: Whether it is taken as Gaussian: known, or an affine function of what is.
    """

    def __init__(self, known: Known) -> None:
        self.like, self.base, self.function, self.is_gaussian = known.parts.mean, self, None, True
        self._known: Known | None = known
        self._compute: Callable[[], Known] | None = None

    @classmethod
    def lazy(cls, base: "Source", function: Function, compute: Callable[[], Known], is_gaussian: bool) -> "Source":
        """A function of a base, with the way to compute its moments."""
        made = cls.__new__(cls)
        made.like, made.base, made.function, made.is_gaussian = base.like, base, function, is_gaussian
        made._known, made._compute = None, compute
        return made

    def known(self) -> Known:
        """The moments, computed once."""
        if self._known is None:
            assert self._compute is not None, "a lazy source knows how to compute its moments"
            self._known, self._compute = self._compute(), None
        return self._known

    def parts(self) -> Parts:
        """Mean, variance and shared part."""
        return self.known().parts

    def value(self, x: Tensor) -> Tensor:
        """The function of the base, at a plain tensor."""
        return x if self.function is None else self.function(x)

    @property
    def is_uncertain(self) -> bool:
        """Whether there is a variance."""
        return self.base.parts().variance is not None


class Moments(Tensor):
    """A tensor known by mean and variance, diagonal but for what `shared` says.

    Example:
        >>> import torch
        >>> from bayesprune.moments import Moments
        >>> x = Moments(torch.tensor([1.0, -3.0]), torch.tensor([0.25, 0.25]))
        >>> (2 * x).variance
        tensor([1., 1.])
    """

    source: Source

    def __new__(cls, mean: Tensor, variance: Tensor | None = None, shared: Tensor | None = None) -> "Moments":
        """The tensor with these moments.

        Args:
            mean: A floating-point tensor.
            variance: Of a shape that broadcasts to the mean's; None while the tensor is certain.
            shared: Covariance along the dimensions where it has size 1 (see `Parts`).

        Raises:
            TypeError: the mean is not a floating-point tensor.
        """
        mean = plain(mean)
        if not mean.is_floating_point():
            raise TypeError(f"Moments got a mean of dtype {mean.dtype}; expected a floating-point tensor.")
        if variance is not None:
            variance = variance.to(torch.promote_types(mean.dtype, torch.float32)).expand(mean.shape)
        return cls.of(Source(Known(Parts(mean, variance, shared))))

    @classmethod
    def along(cls, mean: Tensor, directions: Tensor, residual: Tensor | None = None) -> "Moments":
        """A tensor whose covariance is `directions` (K, *shape), summed as outer products, plus a diagonal residual."""
        variance = directions.square().sum(0)
        whole = variance if residual is None else variance + residual
        return cls.of(Source(Known(Parts(mean, whole, None), directions, residual)))

    @classmethod
    def of(cls, source: Source) -> "Moments":
        """The tensor whose moments come from there."""
        like = source.like
        made = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        made.source = source
        return made

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
        """The shared part of the variances (see `Parts`)."""
        return self.source.parts().shared

    @property
    def directions(self) -> Tensor | None:
        """The K common deviations (K, *shape) that `settings(covariance="low_rank")` follows; None elsewhere."""
        return self.source.known().directions

    def become(self, other: Tensor) -> "Moments":
        """Takes over the moments of another tensor of its shape, as in-place functions do; returns itself."""
        self.source = (other if isinstance(other, Moments) else Moments(other)).source
        return self

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
        uncertain = [leaf.source for leaf in tree_leaves((args, kwargs)) if is_uncertain(leaf)]
        if uncertain:
            rule = find_rule(func)
            if any(source.base.known().directions is not None for source in uncertain):
                rule = following(func, rule)
            return rule(*args, **kwargs)
        args, kwargs = tree_map(lambda leaf: plain(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        return tree_map(_certain, func(*args, **kwargs))

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


def known(x: Any) -> Known:
    """The moments of a tensor and the directions of its covariance; of a number or plain tensor, itself as the mean."""
    return x.source.known() if isinstance(x, Moments) else Known(Parts(x, None, None))


def parts(x: Any) -> Parts:
    """Mean, variance and shared part of a tensor with moments; of a plain tensor or a number, itself as the mean."""
    return x.source.parts() if isinstance(x, Moments) else Parts(x, None, None)


def plain(x: Tensor) -> Tensor:
    """The means of a tensor with moments as a plain tensor; any other tensor unchanged."""
    if isinstance(x, Moments):
        return x.source.parts().mean
    return x.as_subclass(Tensor) if isinstance(x, _Mean) else x


def is_uncertain(x: Any) -> bool:
    """Whether something is a tensor with a variance."""
    return isinstance(x, Moments) and x.source.is_uncertain


def _certain(result: Any) -> Any:
    is_float = isinstance(result, Tensor) and not isinstance(result, Moments) and result.is_floating_point()
    return Moments(result) if is_float else result


_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta")
_PROPERTIES += ("is_sparse", "is_quantized", "is_nested", "is_mkldnn")
_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "stride", "__len__", "is_floating_point", "is_complex")
_METHODS += ("is_contiguous", "element_size", "get_device")
_METADATA = {getattr(Tensor, name).__get__ for name in _PROPERTIES}
_METADATA |= {getattr(Tensor, name) for name in _METHODS} | {torch.is_floating_point, torch.is_complex, torch.numel}
