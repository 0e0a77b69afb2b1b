"""A layer's operation as the estimators see it: bound to what else its forward was called with."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bayesprune.estimators import Bilinear, Factors

if TYPE_CHECKING:
    from bayesprune.layers.base import VariationalLayer


@dataclass(frozen=True, eq=False)
class LayerOperation(Bilinear):
    """The operation of a layer.

    Attributes:
        layer: The layer.
        args: Arguments of its forward behind the input.
        kwargs: Keyword arguments of its forward.
    """

    layer: "VariationalLayer"
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output with these tensors."""
        return self.layer.operation(x, weight, bias, *self.args, **self.kwargs)

    def pullback(
        self, gradient: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the output without bias, by the layer where it knows them."""
        mro = type(self.layer).__mro__
        owners = {name: next(cls for cls in mro if name in vars(cls)) for name in ("pullback", "operation")}
        is_its_own = mro.index(owners["pullback"]) <= mro.index(owners["operation"])  # else of another operation
        found = self.layer.pullback(gradient, x, weight, needed) if is_its_own else None
        return super().pullback(gradient, x, weight, needed) if found is None else found

    def factors(self, log_stds: tuple[Tensor, ...]) -> Factors | None:
        """Rows and columns of the std, where the layer can make use of them."""
        return self.layer.std_factors(log_stds)

    def spread(self, energy: Tensor) -> Tensor:
        """Sum of the energies within the reach of each output."""
        return self(energy, self.layer.reach_kernel(energy), None)
