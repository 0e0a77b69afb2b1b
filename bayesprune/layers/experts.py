"""The variational form of experts that hold their matrices in stacked parameters, whatever library they are of.

Every architecture has a class of its own for them, with the same parameters (see `stacks`), so a class is registered
when a module of it is met.
"""

from typing import Any, ClassVar

from torch import nn

from bayesprune.foundation.kinds import LayerKind
from bayesprune.layers.base import is_registered, register_layer, variational_type
from bayesprune.layers.drawn import DrawnLayer
from bayesprune.layers.stacks import STACKED_NAMES, stack_of


class VariationalExperts(DrawnLayer):
    """Experts with posteriors over weights (E, O, I), or (E, I, O), and biases (E, O).

    One draw of all experts serves all tokens of a batch.
    """

    posterior_names = STACKED_NAMES
    num_stacked: ClassVar[int] = 1
    fallback_reason = "experts read their stacked weights: weight sampling, whatever the estimator"

    @property
    def layer_kind(self) -> LayerKind:
        """The layout of their weights."""
        stack = stack_of(self)
        assert stack is not None, "it was when it was converted, and every expert loses as much"
        return stack.kind

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuild, (self.stock_type,), self.__dict__.copy()


def register_experts(module: nn.Module) -> None:
    """Registers the class of a module that holds experts, unless it is registered."""
    stock = type(module)
    if is_registered(stock) or isinstance(module, VariationalExperts) or stack_of(module) is None:
        return
    _register(stock)


def _register(stock: type[nn.Module]) -> type[VariationalExperts]:
    name, doc = f"Variational{stock.__name__}", f"Variational {stock.__name__}."
    return register_layer(stock)(type(name, (VariationalExperts, stock), {"__doc__": doc}))


def _rebuild(stock: type[nn.Module]) -> VariationalExperts:
    found = variational_type(stock) if is_registered(stock) else _register(stock)
    assert found is not None, "it is registered"
    assert issubclass(found, VariationalExperts), "it is registered as experts"
    return found.__new__(found)
