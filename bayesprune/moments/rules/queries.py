"""What code asks of a tensor and gets no tensor with moments for: comparisons, whole numbers, choices, new tensors.

So do the places that entries are sorted to, and casts to integers (the lengths that a model predicts, the numbers of
codes): what is computed with them is computed as if they were certain.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from bayesprune.moments.registry import follows_directions, register_rule
from bayesprune.moments.tensor import Moments, parts, plain


def _register_on_means(*names: str) -> None:
    for function in (getattr(owner, name) for owner in (torch, Tensor) for name in names if hasattr(owner, name)):

        def rule(*args: Any, _function: Callable[..., Any] = function, **kwargs: Any) -> Any:
            args, kwargs = tree_map(lambda leaf: plain(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            return _function(*args, **kwargs)

        register_rule(function)(follows_directions(rule))


def _register_refusal(*names: str) -> None:
    for name in names:

        def rule(*_: Any, _name: str = name, **__: Any) -> NoReturn:
            raise TypeError(f"Tensor.{_name} was called on a tensor with variance; call it on its .mean or .variance.")

        register_rule(getattr(Tensor, name))(follows_directions(rule))


@follows_directions
def requires_grad(x: Moments) -> bool:
    """Whether any part does."""
    return any(part.requires_grad for part in parts(x) if part is not None)


@follows_directions
def is_leaf(x: Moments) -> bool:
    """Whether all parts are."""
    return all(part.is_leaf for part in parts(x) if part is not None)


@follows_directions
def grad_fn(x: Moments) -> Any:
    """The function that made the mean."""
    return parts(x).mean.grad_fn


def _expected_loss(x: Moments) -> float:
    """What a loop prints of a loss that a model has written out."""
    if x.dim():
        raise TypeError("Tensor.item was called on a tensor with variance; call it on its .mean or .variance.")
    return parts(x).mean.item()


_register_on_means("gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal", "not_equal")
_register_on_means("__gt__", "__ge__", "__lt__", "__le__", "__eq__", "__ne__", "equal", "allclose", "isclose")
_register_on_means("isnan", "isinf", "isfinite", "isneginf", "isposinf", "any", "all", "argmax", "argmin", "argsort")
_register_on_means("logical_and", "logical_or", "logical_xor", "logical_not", "signbit", "isin", "isreal", "argwhere")
_register_on_means("searchsorted", "bucketize", "bincount", "histc", "histogram", "unique", "unique_consecutive")
_register_on_means("long", "int", "short", "byte", "char", "bool", "is_conj", "is_neg", "is_inference", "is_signed")
_register_on_means("__contains__", "data_ptr", "is_shared", "is_pinned", "is_distributed", "nonzero_static")
_register_on_means("result_type", "can_cast", "is_same_size", "is_nonzero", "count_nonzero", "nonzero")
_register_refusal("tolist", "numpy", "__bool__", "__int__", "__index__", "__array__")
_register_refusal("requires_grad_", "retain_grad", "register_hook")
register_rule(Tensor.item, Tensor.__float__)(_expected_loss)
register_rule(Tensor.requires_grad.__get__)(requires_grad)  # type: ignore[attr-defined]
register_rule(Tensor.is_leaf.__get__)(is_leaf)  # type: ignore[attr-defined]
register_rule(Tensor.grad_fn.__get__)(grad_fn)  # type: ignore[attr-defined]


def _register(*functions: Callable[..., Any]) -> None:
    for function in functions:

        def rule(input: Moments, *args: Any, _function: Callable[..., Any] = function, **kwargs: Any) -> Tensor:
            return _function(input.source.like, *args, **kwargs)

        register_rule(function)(follows_directions(rule))


_register(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like)
_register(torch.rand_like, torch.randn_like, torch.randint_like)
_register(Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor)
