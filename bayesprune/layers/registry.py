"""Which variational class stands for which stock class, matched by exact type.

A stock subclass that inherits the forward of a registered class is as good as that class. One with a forward of its own
(weight-standardised convolutions, say) gets weight sampling through its own forward, with a stated reason.
"""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

from torch import nn

from bayesprune.layers.base import VariationalLayer

_REGISTERED: dict[type[nn.Module], type[VariationalLayer]] = {}
_Layer = TypeVar("_Layer", bound=type[VariationalLayer])


def register_layer(stock_type: type[nn.Module]) -> Callable[[_Layer], _Layer]:
    """Class decorator: registers a variational type for a stock layer type.

    The class derives from `VariationalLayer` and the stock type, in this order. It overrides what differs:
    `posterior_names`, `feature_dim`, `unit_dims`, `operation`, `meets_one_position`, `is_linear_in_weight`. A layer
    that does more than multiply inputs by weights and add (a factor on its output, a normalisation) says
    `is_linear_in_weight = False`.

    Example:
        >>> class Scaled(nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> @register_layer(Scaled)
        ... class VariationalScaled(VariationalLayer, Scaled):
        ...     is_linear_in_weight = False

    Raises:
        TypeError: the class does not derive from both.
    """

    def decorate(cls: _Layer) -> _Layer:
        if not issubclass(cls, VariationalLayer) or not issubclass(cls, stock_type):
            raise TypeError(
                f"{cls.__name__} is registered for {stock_type.__name__}; expected a class that derives from "
                f"VariationalLayer and {stock_type.__name__}, in this order."
            )
        cls.stock_type = stock_type
        _REGISTERED[stock_type] = cls
        variational_type.cache_clear()
        return cls

    return decorate


def is_registered(stock_type: type[nn.Module]) -> bool:
    """Whether this very type has a variational one."""
    return stock_type in _REGISTERED


def registered_types() -> list[type[nn.Module]]:
    """The registered stock types."""
    return list(_REGISTERED)


@cache
def variational_type(stock_type: type[nn.Module]) -> type[VariationalLayer] | None:
    """The variational class for this exact stock type; None where there is no way."""
    if issubclass(stock_type, VariationalLayer):
        return stock_type  # converted already
    if stock_type in _REGISTERED:
        return _REGISTERED[stock_type]
    for base in stock_type.__mro__[1:]:
        if base in _REGISTERED:
            return _derived(stock_type, base)
    return None


def _derived(stock_type: type[nn.Module], base: type[nn.Module]) -> type[VariationalLayer] | None:
    name, doc = f"Variational{stock_type.__name__}", f"Variational {stock_type.__name__}."
    forwards = ("forward", "_conv_forward")
    registered, members = _REGISTERED[base], {"stock_type": stock_type, "__doc__": doc}
    if all(getattr(stock_type, f, None) is getattr(base, f, None) for f in forwards):
        return type(name, (registered, stock_type), members)
    reason = f"{stock_type.__name__} has a forward of its own: weight sampling, whatever the estimator"
    members |= {"is_linear_in_weight": False, "fallback_reason": reason}
    if not registered.is_linear_in_weight:
        return None  # attention with a forward of its own: nothing is known of how it uses its weights
    members["unit_dims"] = registered.unit_dims
    return type(name, (VariationalLayer, stock_type), members)
