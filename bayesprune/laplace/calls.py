"""One run of a layer in a forward: what it was given and gave, what its output met, and how to run it again."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.foundation.kinds import kind_of
from bayesprune.layers import VariationalLayer


@dataclass(eq=False)
class Again:
    """Runs a layer once more on the same arguments; or another layer, on an input of its own and the other arguments.

    Attributes:
        layer: The layer.
        args: Positional arguments.
        kwargs: Arguments by name; the input is the first of them where there are no others.
        autocast: The context it ran in.
    """

    layer: VariationalLayer
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: Callable[[], torch.autocast]

    def __call__(self, other: VariationalLayer | None = None, x: Tensor | None = None) -> Tensor:
        """The output."""
        assert self.args or self.kwargs, "the call kept its arguments"
        args, kwargs = self.args, self.kwargs
        if x is not None and args:
            args = (x, *args[1:])
        elif x is not None:
            kwargs = {**kwargs, next(iter(kwargs)): x}
        with self.autocast():
            return (self.layer if other is None else other).forward(*args, **kwargs)

    def copy(self) -> "Again":
        """The same with arguments of its own."""
        args = tuple(_copied(value) for value in self.args)
        return replace(self, args=args, kwargs={name: _copied(value) for name, value in self.kwargs.items()})

    def without_arguments(self) -> "Again":
        """What cannot run."""
        return replace(self, args=(), kwargs={})


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@dataclass(eq=False)
class LayerCall:
    """One run of a layer.

    Attributes:
        name: The layer's name.
        layer: The layer.
        inputs: What went in.
        output: What came out.
        again: Runs the layer once more, while a walk halts behind it; experts at any time.
        addend: What its output was added to, of the output's shape; None where it was added to nothing, or went
            elsewhere as well before that.
        gain: By what its output was multiplied on the way there, of a shape that broadcasts; None for 1.
        norm: The batch norm in evaluation mode that its output went into, and into nothing else; None where the norm
            ran on other layers' outputs as well.
        source: A number that calls with the same input share.
        num_uses: How many functions took its output.
    """

    name: str
    layer: VariationalLayer
    inputs: Tensor
    output: Tensor
    again: Again
    addend: Tensor | None = None
    gain: Tensor | None = None
    norm: nn.Module | None = None
    source: int = 0
    num_uses: int = 0

    def copy_values(self) -> None:
        """Keeps its tensors as they are now, whatever the forward writes into them."""
        with torch._C.DisableTorchFunction():  # this is no use of them
            self.inputs, self.output = self.inputs.clone(), self.output.clone()
            self.again = self.again.copy() if kind_of(self.layer).num_stacked else self.again.without_arguments()

    def lose_values(self) -> None:
        """Keeps shapes and dtypes of its tensors alone."""
        self.inputs, self.output = self.inputs.to("meta"), self.output.to("meta")
        self.addend = None if self.addend is None else self.addend.to("meta")
        self.gain, self.again = None, self.again.without_arguments()
