"""Which rule stands for which torch function: the table that a `Moments` tensor looks a call up in."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from bayesprune.errors import UnsupportedFunctionError

Rule = TypeVar("Rule", bound=Callable[..., Any])
_RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
_COMPLEX_RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
_LINEARISERS: list[Callable[..., Callable[..., Any]]] = []
_FOLLOWING: set[Callable[..., Any]] = set()


def register_rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Decorator: what these torch functions (or tensor methods) do to a tensor with mean and variance.

    The rule is called with the arguments of the function, some of them `Moments`, and returns its result; `parts`
    takes an argument apart. A later registration replaces an earlier one.

    Examples:
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


def register_complex_rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Decorator: the same where any of the arguments is a tensor of complex numbers."""

    def decorate(rule: Rule) -> Rule:
        for function in functions:
            _COMPLEX_RULES[function] = rule
        return rule

    return decorate


def follows_directions(rule: Rule) -> Rule:
    """Decorator: the rule takes the directions of a low-rank covariance along itself, or needs none."""
    _FOLLOWING.add(rule)
    return rule


def lineariser(make: Rule) -> Rule:
    """Decorator: make(function, rule) gives the rule that linearises a function."""
    _LINEARISERS.append(make)
    return make


def following(function: Callable[..., Any], rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for tensors with directions: itself if it follows them, else one that linearises the function."""
    return rule if rule in _FOLLOWING else _LINEARISERS[-1](function, rule)


def find_rule(function: Callable[..., Any], *, is_complex: bool = False) -> Callable[..., Any]:
    """The rule of a torch function, of complex numbers or of real ones.

    Raises:
        UnsupportedFunctionError: there is none; the message names the function, the module that called it and what to
            do.
    """
    rule = (_COMPLEX_RULES if is_complex else _RULES).get(function)
    if rule is None:
        where, kind = _calling_module()
        name = getattr(function, "__qualname__", None) or getattr(function, "__name__", repr(function))
        raise UnsupportedFunctionError(
            f"moments: no rule for {getattr(function, '__module__', None) or 'torch'}.{name}"
            f"{' of complex numbers' if is_complex else ''}, called in "
            f"{where}; a variance that is passed over in silence would be wrong. Register one with "
            "@bayesprune.moments.register_rule(function), or register_elementwise(function) if it acts on each entry "
            "alone; or pass the module by samples, inside bayesprune.moments.sampled(model, "
            f"{kind}); or use weight sampling."
        )
    return rule


def _calling_module() -> tuple[str, str]:
    """Path and type of the innermost module on the stack, seen from the outermost; its type, in quotes."""
    modules = [local for info in inspect.stack() if isinstance(local := info.frame.f_locals.get("self"), nn.Module)]
    if not modules:
        return "a function outside any module", "type"
    paths = (name for name, module in modules[-1].named_modules() if module is modules[0])
    kind = type(modules[0]).__name__
    return f"module {next(paths, '') or '(root)'} ({kind})", repr(kind)
