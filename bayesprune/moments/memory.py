"""The moments that a tensor has, and the memory that several look at together: what one writes in place, all see.

A view (a slice, a transpose, `x.view(...)`) of a tensor with moments has tensors of its own. So that a write reaches
the tensor it is a view of, and the other views of that, they have a `Memory` in common; it counts the writes, and
whoever has not seen the last one reads again. Writes wait until somebody does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
View = Callable[[Any], Any]  # a view of a plain tensor or of one with moments


class MomentTensors(NamedTuple):
    """The plain tensors that a tensor with moments consists of.

    Attributes:
        mean: Any shape.
        variance: The mean's shape, float32 or better; None where the tensor is certain. Of complex numbers, that of
            their real parts in the real part, that of their imaginary parts in the imaginary one.
        shared: The part of the variance that entries have in common along each dimension where it has size 1 and the
            mean has not: the mean covariance between two of them. None where nothing is known of covariance.
    """

    mean: Tensor
    variance: Tensor | None
    shared: Tensor | None


class KnownMoments(NamedTuple):
    """The moments of a tensor, with the directions of its covariance where these are followed.

    Attributes:
        parts: Mean, whole variance, shared part.
        directions: K deviations (K, *shape) that the entries have in common, or None: covariance is their sum of outer
            products, plus `residual` on the diagonal.
        residual: The variance that is not in the directions; None is zero.
    """

    parts: MomentTensors
    directions: Tensor | None = None
    residual: Tensor | None = None

    @classmethod
    def along(cls, mean: Tensor, directions: Tensor, residual: Tensor | None = None) -> "KnownMoments":
        """The moments whose covariance is `directions`, summed as outer products, plus a diagonal residual."""
        variance = squares(directions).sum(0)
        whole = variance if residual is None else variance + residual
        return cls(MomentTensors(mean, whole, None), directions, residual)


class LazyMoments:
    """Moments of a tensor that are known, or computed when they are asked for.

    Attributes:
        like: A tensor of the same shape, dtype and device.
        base: The source that this one is a function of; itself where it is known.
        function: That function, elementwise; None where it is known.
        is_gaussian: Whether it is taken as Gaussian: known, or an affine function of what is.
    """

    def __init__(self, known: KnownMoments) -> None:
        self.like, self.base, self.function, self.is_gaussian = known.parts.mean, self, None, True
        self._known: KnownMoments | None = known
        self._compute: Callable[[], KnownMoments] | None = None

    @classmethod
    def lazy(
        cls, base: "LazyMoments", function: Function, compute: Callable[[], KnownMoments], is_gaussian: bool
    ) -> "LazyMoments":
        """A function of a base, with the way to compute its moments."""
        made = cls.__new__(cls)
        made.like, made.base, made.function, made.is_gaussian = base.like, base, function, is_gaussian
        made._known, made._compute = None, compute
        return made

    def known(self) -> KnownMoments:
        """The moments, computed once."""
        if self._known is None:
            assert self._compute is not None, "a lazy source knows how to compute its moments"
            self._known, self._compute = self._compute(), None
        return self._known

    def parts(self) -> MomentTensors:
        """Mean, variance and shared part."""
        return self.known().parts

    def value(self, x: Tensor) -> Tensor:
        """The function of the base, at a plain tensor."""
        return x if self.function is None else self.function(x)

    @property
    def is_uncertain(self) -> bool:
        """Whether there is a variance."""
        return self.base.parts().variance is not None


class Memory:
    """Moments that a tensor and its views share.

    Attributes:
        version: The number of writes.
        aliases: The tensors that look at it, by their id.
    """

    def __init__(self, source: LazyMoments) -> None:
        self.version = 0
        self.aliases: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._source = source
        self._waiting: list[tuple[View, LazyMoments]] = []

    def is_seen_beside(self, x: Tensor) -> bool:
        """Whether any other tensor looks at it."""
        return any(alias is not x for alias in self.aliases.values())

    def write(self, view: View | None, source: LazyMoments) -> None:
        """These moments are now there; None is all of it."""
        self.version += 1
        if view is None:
            self._source, self._waiting = source, []
        else:
            self._waiting.append((view, source))

    def read(self) -> LazyMoments:
        """The moments that are there now, of all of it."""
        for where, source in self._waiting:
            known = overwritten(self._source.known(), source.known(), lambda into, what, at=where: at(into).copy_(what))
            self._source = LazyMoments(known)
        self._waiting = []
        return self._source


def overwritten(old: KnownMoments, new: KnownMoments, write: Callable[[Tensor, Any], Any]) -> KnownMoments:
    """The moments of a tensor after a write into it; what positions had in common is given up.

    Args:
        old: Of the tensor.
        new: Of what is written.
        write: Writes, in place, into a plain tensor (the first) entries of another.
    """
    dtype = torch.promote_types(old.parts.mean.dtype, torch.float32)

    def written(into: Tensor | None, what: Any, *, is_mean: bool = False) -> Tensor:
        mean = old.parts.mean
        made = torch.empty_like(mean, dtype=mean.dtype if is_mean else dtype)  # in the strides of the mean
        made.copy_(torch.zeros((), device=mean.device) if into is None else into)
        none = torch.zeros((), dtype=made.dtype, device=made.device)
        write(made, none.expand(new.parts.mean.shape) if what is None else what)
        return made

    mean = written(old.parts.mean, new.parts.mean, is_mean=True)
    count = next((len(known.directions) for known in (old, new) if known.directions is not None), 0)
    if count:
        pairs = [[None] * count if known.directions is None else known.directions for known in (old, new)]
        rests = [known.parts.variance if known.directions is None else known.residual for known in (old, new)]
        directions = torch.stack([written(*pair) for pair in zip(*pairs, strict=True)])
        return KnownMoments.along(mean, directions, written(*rests))
    variances = [known.parts.variance for known in (old, new)]
    return KnownMoments(MomentTensors(mean, None if variances == [None, None] else written(*variances), None))


def squares(x: Tensor) -> Tensor:
    """Squares; of complex numbers, of their real and imaginary parts, each in its place."""
    return torch.view_as_complex(torch.view_as_real(x).square()) if x.is_complex() else x.square()
