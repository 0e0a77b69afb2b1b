"""Which rule stands for which torch function: the table that a `Moments` tensor looks a call up in."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from bayesprune.errors import UnsupportedFunctionError

Rule = TypeVar("Rule", bound=Callable[..., Any])
_RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
_FOLLOWING: set[Callable[..., Any]] = set()


def register_rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Decorator: what these torch functions (or tensor methods) do to a tensor with mean and variance.

    The rule is called with the arguments of the function, some of them `Moments`, and returns its result; `parts`
    takes an argument apart. A later registration replaces an earlier one.

    Example:
        >>> import torch
        >>> from bayesprune.moments import Moments, parts, register_rule
        >>> @register_rule(torch.flipud)
        ... def flipud(x):
        ...     mean, variance, _ = parts(x)
        ...     return Moments(torch.flipud(mean), torch.flipud(variance))
    """

    def decorate(rule: Rule) -> Rule:
        for function in functions:
            _RULES[function] = rule
        return rule

    return decorate


def follows_directions(rule: Rule) -> Rule:
    """Decorator: the rule takes the directions of a low-rank covariance along itself, or needs none."""
    _FOLLOWING.add(rule)
    return rule


def is_following(rule: Callable[..., Any]) -> bool:
    """Whether the rule is so marked."""
    return rule in _FOLLOWING


def following(function: Callable[..., Any], rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for tensors with directions: itself if it follows them, else one that linearises the function."""
    from bayesprune.moments.directions import linearised  # it needs the tensors, which need this table

    return rule if rule in _FOLLOWING else linearised(function, rule)


def find_rule(function: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of a torch function.

    Raises:
        UnsupportedFunctionError: there is none; the message names the function, the module that called it and what to
            do.
    """
    rule = _RULES.get(function)
    if rule is None:
        name = getattr(function, "__qualname__", None) or getattr(function, "__name__", repr(function))
        raise UnsupportedFunctionError(
            f"moments: no rule for {getattr(function, '__module__', None) or 'torch'}.{name}, called in "
            f"{_calling_module()}; a variance that is passed over in silence would be wrong. Register one with "
            "@bayesprune.moments.register_rule(function), or register_elementwise(function) if it acts on each entry "
            "alone; or use weight sampling."
        )
    return rule


def _calling_module() -> str:
    """Path and type of the innermost module on the stack, seen from the outermost."""
    modules = [local for info in inspect.stack() if isinstance(local := info.frame.f_locals.get("self"), nn.Module)]
    if not modules:
        return "a function outside any module"
    paths = (name for name, module in modules[-1].named_modules() if module is modules[0])
    return f"module {next(paths, '') or '(root)'} ({type(modules[0]).__name__})"
