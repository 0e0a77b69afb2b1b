"""Rules for elementwise functions of one tensor: exact where there is a closed form, quadrature elsewhere. No product.

Exact for a Gaussian: ReLU, leaky and parametric ReLU, absolute value, clamp, hardtanh, ReLU6, hardsigmoid, hardswish,
threshold, hard- and softshrink, exp, expm1, exp2, square, sin, cos. GELU: `closed_forms.gelu` states its error. Roots,
reciprocals and logarithms take the tensor as log-normal: it must be positive, or nearly, for them to mean anything.

By quadrature with `settings(num_nodes=5)`: largest error of the mean in stds of the output / of the variance as a
fraction of it, over means in (-4, 4), where the variance is above a hundredth of its largest value:

| function             | std 0.5       | std 1         | std 2         |
|----------------------|---------------|---------------|---------------|
| softplus, logsigmoid | 0.000 / 0.000 | 0.000 / 0.002 | 0.004 / 0.038 |
| sigmoid              | 0.000 / 0.000 | 0.000 / 0.006 | 0.015 / 0.115 |
| silu                 | 0.000 / 0.001 | 0.001 / 0.034 | 0.022 / 0.263 |
| mish                 | 0.000 / 0.003 | 0.003 / 0.073 | 0.036 / 0.368 |
| tanh                 | 0.000 / 0.007 | 0.014 / 0.170 | 0.103 / 0.443 |
| erf                  | 0.000 / 0.021 | 0.014 / 0.297 | 0.130 / 0.521 |
| atan                 | 0.001 / 0.007 | 0.015 / 0.063 | 0.070 / 0.261 |
| tanhshrink           | 0.001 / 0.035 | 0.019 / 0.030 | 0.058 / 0.074 |
| elu, celu            | 0.006 / 0.016 | 0.014 / 0.056 | 0.032 / 0.150 |
| selu                 | 0.040 / 0.065 | 0.042 / 0.100 | 0.057 / 0.190 |
| softsign             | 0.027 / 0.075 | 0.060 / 0.162 | 0.111 / 0.329 |

Written out in a model, with its tensors made of one (they are functions of that):

| function                | std 0.5       | std 1         | std 2         |
|-------------------------|---------------|---------------|---------------|
| 0.5 x (1 + tanh(...))   | 0.000 / 0.013 | 0.007 / 0.188 | 0.084 / 0.412 |
| x sigmoid(1.702 x)      | 0.000 / 0.018 | 0.012 / 0.188 | 0.074 / 0.376 |
| square(relu(x))         | 0.011 / 0.020 | 0.023 / 0.042 | 0.027 / 0.054 |
| x relu6(x + 3) / 6      | 0.157 / 0.199 | 0.231 / 0.301 | 0.217 / 0.314 |

Nine nodes take these errors to a half for functions with kinks and to a tenth for smooth ones.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bayesprune.moments import closed_forms
from bayesprune.moments.closed_forms import clamped, leaky, piecewise
from bayesprune.moments.elementwise import apply, in_place
from bayesprune.moments.gaussian import Formula, recomputed
from bayesprune.moments.registry import follows_directions, register_rule
from bayesprune.moments.tensor import Moments, is_uncertain, plain


def hardtanh(min_val: float = -1.0, max_val: float = 1.0) -> Formula:
    """The arguments of `F.hardtanh`."""
    return clamped(min_val, max_val)


@follows_directions
def clamp(input: Any, min: Any = None, max: Any = None) -> Any:
    """No less than one bound and no more than the other, each of which may be uncertain."""
    if not is_uncertain(input) or is_uncertain(min) or is_uncertain(max):
        low = input if min is None else torch.maximum(input, _bound(min, input))
        return low if max is None else torch.minimum(low, _bound(max, input))
    low, high = (plain(bound) if isinstance(bound, Tensor) else bound for bound in (min, max))
    return apply(input, lambda t: torch.clamp(t, low, high), clamped(low, high))


@follows_directions
def clamp_max(input: Any, max: Any) -> Any:
    """No more than a bound."""
    return clamp(input, None, max)


def threshold(threshold: float, value: float) -> Formula:
    """The arguments of `F.threshold`."""
    return piecewise([threshold], [(value,), (0.0, 1.0)])


def hardshrink(lambd: float = 0.5) -> Formula:
    """The arguments of `F.hardshrink`."""
    return piecewise([-lambd, lambd], [(0.0, 1.0), (0.0,), (0.0, 1.0)])


def softshrink(lambd: float = 0.5) -> Formula:
    """The arguments of `F.softshrink`."""
    return piecewise([-lambd, lambd], [(lambd, 1.0), (0.0,), (-lambd, 1.0)])


def leaky_relu(negative_slope: float = 0.01) -> Formula:
    """The arguments of `F.leaky_relu`."""
    return leaky(negative_slope)


@follows_directions
def prelu(input: Any, weight: Any) -> Moments:
    """Leaky ReLU with a slope a channel (dimension 1)."""
    if not is_uncertain(input) or is_uncertain(weight):
        raise NotImplementedError("moments: prelu has a rule for an uncertain input and a certain weight only.")
    slope = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    if input.dim() > 1:
        slope = slope.reshape(-1, *(1,) * (input.dim() - 2))
    return apply(input, lambda t: torch.where(t > 0, t, slope * t), leaky(slope))


def _bound(bound: Any, x: Tensor) -> Tensor:
    return bound if isinstance(bound, Tensor) else torch.full((), bound, dtype=x.dtype, device=x.device)


def _fixed(formula: Formula) -> Callable[..., Formula]:
    lean = recomputed(formula)
    return lambda *_, **__: lean


def _rule(function: Callable[..., Any], formula_of: Callable[..., Formula | None] | None) -> Callable[..., Any]:
    @follows_directions
    def rule(input: Any, *args: Any, inplace: bool = False, **kwargs: Any) -> Moments:
        if not is_uncertain(input):
            raise NotImplementedError(
                f"moments: {function.__name__} has no rule for uncertain arguments beside its input."
            )
        formula = None if formula_of is None else formula_of(*args, **kwargs)
        result = apply(input, lambda t: function(t, *args, **kwargs), formula)
        return input.copy_from(result) if inplace else result

    return rule


def _named(name: str) -> list[Callable[..., Any]]:
    return [getattr(owner, name) for owner in (F, torch, Tensor, torch.special) if hasattr(owner, name)]


def _register(*names: str, formula_of: Callable[..., Formula | None] | None = None) -> None:
    """Functions and methods of these names, with the forms that write in place; `formula_of` takes their arguments."""
    for name in names:
        functions = _named(name)
        for function in functions:
            register_rule(function)(_rule(function, formula_of))
        for written in _named(f"{name}_"):
            register_rule(written)(in_place(_rule(functions[0], formula_of), functions[0]))


def _register_inside(low: float, high: float, *names: str) -> None:
    """Functions that are defined between two numbers; nodes of the quadrature beyond them are taken as the last one."""
    for name in names:
        functions = _named(name)

        def inside(t: Tensor, _function: Callable[..., Tensor] = functions[0]) -> Tensor:
            edge = torch.finfo(t.dtype).eps
            return _function(t.clamp(low + edge, high - edge))

        for function in functions:
            register_rule(function)(_rule(inside, None))
        for written in _named(f"{name}_"):
            register_rule(written)(in_place(_rule(inside, None), functions[0]))


_register("relu", formula_of=_fixed(closed_forms.rectified))
_register("relu6", formula_of=_fixed(clamped(0.0, 6.0)))
_register("leaky_relu", formula_of=leaky_relu)
_register("abs", "absolute", formula_of=_fixed(leaky(-1.0)))
for _rule_, _bounded in ((clamp, ("clamp", "clip", "clamp_min")), (clamp_max, ("clamp_max",))):
    for _name in _bounded:
        register_rule(*_named(_name))(_rule_)
        register_rule(*_named(f"{_name}_"))(in_place(_rule_, getattr(Tensor, _name)))
_register("hardtanh", formula_of=hardtanh)
_register("hardsigmoid", formula_of=_fixed(piecewise([-3.0, 3.0], [(0.0,), (0.5, 1 / 6), (1.0,)])))
_register("hardswish", formula_of=_fixed(piecewise([-3.0, 3.0], [(0.0,), (0.0, 0.5, 1 / 6), (0.0, 1.0)])))
_register("threshold", formula_of=threshold)
_register("hardshrink", formula_of=hardshrink)
_register("softshrink", formula_of=softshrink)
_register("gelu", formula_of=lambda approximate="none": recomputed(closed_forms.gelu(approximate)))
_register("exp", formula_of=_fixed(closed_forms.exponential()))
_register("exp2", formula_of=_fixed(closed_forms.exponential(math.log(2))))
_register("expm1", formula_of=_fixed(closed_forms.exponential(offset=-1.0)))
_register("square", formula_of=_fixed(closed_forms.squared))
_register("sin", formula_of=_fixed(closed_forms.sine))
_register("cos", formula_of=_fixed(closed_forms.cosine))
_register("sqrt", formula_of=_fixed(closed_forms.power(0.5)))
_register("rsqrt", formula_of=_fixed(closed_forms.power(-0.5)))
_register("reciprocal", formula_of=_fixed(closed_forms.power(-1.0)))
_register("log", formula_of=_fixed(closed_forms.logarithm()))
_register("log2", formula_of=_fixed(closed_forms.logarithm(1 / math.log(2))))
_register("log10", formula_of=_fixed(closed_forms.logarithm(1 / math.log(10))))
_register("log1p", formula_of=_fixed(closed_forms.logarithm(offset=1.0)))
_register("silu", "sigmoid", "tanh", "softplus", "logsigmoid", "mish", "elu", "selu", "celu", "softsign", "tanhshrink")
_register(
    "erf", "erfc", "expit", "atan", "arctan", "sinh", "cosh", "asinh", "arcsinh", "logit", "nan_to_num", "positive"
)
_register("tan", "acosh", "arccosh", "ndtr")
_register_inside(-1.0, 1.0, "asin", "arcsin", "acos", "arccos", "atanh", "arctanh", "erfinv")
_register_inside(0.0, 1.0, "ndtri")
_register("log_ndtr", "lgamma", "gammaln", "digamma", "psi", "sinc", "i0", "i0e", "i1", "i1e", "entr", "erfcx")
_register("deg2rad", "rad2deg", "fmod", "remainder", "frac", "__mod__")
_register("sign", "sgn", formula_of=_fixed(piecewise([0.0], [(-1.0,), (1.0,)])))
_register("floor", formula_of=lambda: closed_forms.floored(0.0))
_register("round", formula_of=lambda decimals=0: None if decimals else closed_forms.floored(0.5))
_register("ceil", formula_of=lambda: closed_forms.floored(1.0))
_register("trunc", "fix")
register_rule(*_named("prelu"))(prelu)
register_rule(Tensor.__abs__)(_rule(torch.abs, _fixed(leaky(-1.0))))
register_rule(Tensor.__pos__)(lambda x: x)
