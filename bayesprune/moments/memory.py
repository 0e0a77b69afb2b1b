"""Memory that tensors with moments look at together: what one writes in place, all that look at it see.

A view (a slice, a transpose, `x.view(...)`) of a tensor with moments has parts of its own. So that a write reaches the
tensor it is a view of, and the other views of that, they have a `Memory` in common; it counts the writes, and whoever
has not seen the last one reads again. Writes wait until somebody does.

A plain tensor into which something uncertain is written (a buffer of zeros that a model fills by slices, a cache) turns
into one with moments itself, so that every variable that holds it sees it. Plain views made of it before stay plain:
where the write went they hold nan from then on, since a variance that is passed over in silence would be wrong.
"""

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from bayesprune.moments.tensor import Known, Moments, Source

View = Callable[[Any], Any]  # a view of a plain tensor or of one with moments


class Memory:
    """What a tensor and its views look at.

    Attributes:
        version: The number of writes.
        aliases: The tensors that look at it, by their id.
    """

    def __init__(self, source: "Source") -> None:
        self.version = 0
        self.aliases: WeakValueDictionary[int, Moments] = WeakValueDictionary()
        self._source = source
        self._waiting: list[tuple[View, Source]] = []

    def is_seen_beside(self, x: "Moments") -> bool:
        """Whether any other tensor looks at it."""
        return any(alias is not x for alias in self.aliases.values())

    def write(self, view: View | None, source: "Source") -> None:
        """These moments are now there; None is all of it."""
        self.version += 1
        if view is None:
            self._source, self._waiting = source, []
        else:
            self._waiting.append((view, source))

    def read(self, view: View | None) -> "Source":
        """The moments that are there now."""
        from bayesprune.moments.tensor import Moments, Source

        for where, source in self._waiting:
            known = overwritten(self._source.known(), source.known(), lambda into, what, at=where: at(into).copy_(what))
            self._source = Source(known)
        self._waiting = []
        return self._source if view is None else view(Moments.of(self._source)).source


def overwritten(old: "Known", new: "Known", write: Callable[[Tensor, Any], Any]) -> "Known":
    """The moments of a tensor after a write into it; what positions had in common is given up.

    Args:
        old: Of the tensor.
        new: Of what is written.
        write: Writes, in place, into a plain tensor (the first) entries of another.
    """
    from bayesprune.moments.tensor import Moments, is_uncertain

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
        return Moments.along(mean, directions, written(*rests)).source.known()
    variances = [known.parts.variance for known in (old, new)]
    made = Moments(mean, None if variances == [None, None] else written(*variances))
    assert is_uncertain(made) or variances == [None, None]
    return made.source.known()


def writable(x: Any, erase: Callable[[Tensor], Any]) -> "Moments":
    """The tensor itself, which from now on has moments.

    Args:
        x: A tensor with moments, or a plain one.
        erase: Fills what is about to be written, in a plain tensor, with nan.

    Raises:
        TypeError: it belongs to the model (a parameter, a buffer, an attribute), holds integers, or is of another class
            of tensors.
    """
    from bayesprune.moments.tensor import Known, Moments, Parts, Source

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
        _erased(x, erase)
        source = Source(Known(Parts(mean, None, None)))
        _turned(base)._place(Memory(source), None, source)
    else:
        _erased(x, erase)
    if base is x:
        return base
    with torch._C.DisableTorchFunctionSubclass():
        start = offset - base.storage_offset()

    def view(whole: Any) -> Any:
        return whole.as_strided(shape, stride, start)

    memory = base._memory
    return _turned(x)._place(memory, view, memory.read(view))


def _turned(x: Any) -> "Moments":
    from bayesprune.moments.tensor import Moments

    x.__class__ = Moments
    return x


def _erased(x: Tensor, erase: Callable[[Tensor], Any]) -> None:
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
