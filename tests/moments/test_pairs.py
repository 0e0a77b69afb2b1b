"""Functions of two tensors, gates and distances, against samples; argument names, against torch's."""

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import get_testing_overrides, resolve_name

from bayesprune.moments import Moments, parts
from bayesprune.moments.registry import _RULES
from tests.moments.sampled import exact, near


def example(*shape: int, seed: int = 0, variance: float = 0.01, mean: float = 0.0) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(shape, generator=generator, dtype=torch.float64) + mean
    return Moments(centre, variance * (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5))


@pytest.mark.parametrize("function", [torch.atan2, torch.hypot, torch.logaddexp, torch.logaddexp2])
def test_two_independent_tensors(function):
    near(function, example(6, mean=2.0), example(6, seed=1, mean=2.0), mean=0.06, variance=0.03)
    near(function, example(6, mean=2.0), example(6, seed=1, mean=2.0).mean + 0, mean=0.01, variance=0.01)
    near(lambda x: function(torch.full((6,), 2.0, dtype=torch.float64), x), example(6), mean=0.02, variance=0.03)


def test_shapes_broadcast():
    x, y = example(3, 1, mean=2.0), example(4, seed=1, mean=2.0)
    assert torch.hypot(x, y).shape == torch.hypot(x, y).variance.shape == (3, 4)
    near(torch.hypot, x, y, mean=0.06, variance=0.03)
    assert x.copysign_(torch.full((3, 1), -1.0)) is x
    assert (x.mean <= 0).all()


def test_two_of_one_origin_are_one_function():
    near(lambda x: torch.hypot(x, 2 * x), example(6, mean=3.0), mean=0.01, variance=0.01)


def test_glu():
    x = example(3, 8, variance=0.3)
    near(F.glu, x, mean=0.02, variance=0.02)
    near(lambda x: F.glu(x, dim=0), example(4, 3, variance=0.3), mean=0.02, variance=0.02)


def test_distances():
    x, y = example(3, 12, mean=1.0), example(2, 12, seed=1)
    near(torch.cdist, x, y, mean=0.05, variance=0.03)
    near(lambda x, y: torch.linalg.norm(x - y[0], dim=-1), x, y, mean=0.05, variance=0.03)
    near(torch.linalg.norm, x, mean=0.05, variance=0.03)
    near(lambda x: torch.linalg.matrix_norm(x), x, mean=0.05, variance=0.03)
    near(lambda x, y: F.cosine_similarity(x[0], y[0], dim=0), x, y, mean=0.05, variance=0.15)


def test_mixtures_of_two_and_quotients():
    x, y, z = example(5), example(5, seed=1), example(5, seed=2, mean=3.0)
    exact(lambda x, y: torch.lerp(x, y, 0.3), x, y)
    exact(lambda x, y, z: torch.addcmul(x, tensor1=y, tensor2=z, value=2.0), x, y, z)
    near(lambda x, y, z: torch.addcdiv(x, y, z, value=2.0), x, y, z, mean=0.01, variance=0.02)
    assert x.lerp_(y, 0.5) is x


@pytest.mark.parametrize("name", ["floor", "round", "ceil", "sign"])
@pytest.mark.parametrize("std", [0.1, 0.7, 3.0])
def test_steps(name, std):
    mean = torch.linspace(-1.9, 2.1, 9, dtype=torch.float64)
    near(getattr(torch, name), Moments(mean, torch.full((9,), std**2).double()), mean=0.02, variance=0.05)


@pytest.mark.parametrize("name", ["asin", "acos", "tan", "atanh", "sinc", "erfinv", "lgamma", "digamma", "frac"])
def test_more_of_one_tensor(name):
    mean = torch.linspace(0.2, 0.7, 5, dtype=torch.float64)
    near(getattr(torch, name), Moments(mean, torch.full((5,), 0.0016).double()), mean=0.01, variance=0.02)


# These stubs have other names than torch.
STUBS = ("torch.where", "torch.dot", "torch.linalg.vector_norm", "torch.linalg.inv", "torch.linalg.solve_triangular")
STUBS += ("torch.functional.meshgrid", "torch.msort", "torch.topk", "torch.linalg.vecdot", "torch.polar")


def test_rules_take_torchs_names_of_arguments():
    """Models call `torch.add(input=x, other=y)` and `alibi.baddbmm(batch1=q, batch2=k)`."""
    wrong, optional = {}, {"out", "inplace", "names", "out_dtype", "cudnn_enabled", "self", "idx", "k", "v", "mat1"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        overrides = {f: like for f, like in get_testing_overrides().items() if f in _RULES}
    for function, like in overrides.items():
        if (name := resolve_name(function) or "").startswith("torch.Tensor"):
            continue  # whose stubs have other names than the methods
        taken = inspect.signature(_RULES[function]).parameters
        if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            continue
        missing = set(inspect.signature(like).parameters) - set(taken) - optional
        if missing and name not in STUBS:
            wrong[name] = missing
    assert len(overrides) > 300
    assert not wrong, wrong


def test_keywords():
    x, y = example(2, 3), example(2, 3, seed=1)
    torch.testing.assert_close(parts(torch.add(input=x, other=y, alpha=2)), parts(x + 2 * y))
    torch.testing.assert_close(parts(torch.where(condition=x > 0, input=x, other=y)), parts(torch.where(x > 0, x, y)))
    a, b, c = example(2, 4, 5), example(2, 4, 3, seed=1), example(2, 3, 5, seed=2)
    expected = parts(0.5 * a + 2 * (b @ c))
    torch.testing.assert_close(parts(a.baddbmm(batch1=b, batch2=c, beta=0.5, alpha=2)), expected)
    torch.testing.assert_close(parts(a[0].addbmm(b, c)), parts(a[0] + (b @ c).sum(0)))
    torch.testing.assert_close(parts(torch.addmm(a[0], mat1=b[0], mat2=c[0])), parts(a[0] + b[0] @ c[0]))
    nothing = torch.full_like(parts(a).mean, float("nan"))
    torch.testing.assert_close(parts(torch.baddbmm(nothing, b, c, beta=0)), parts(b @ c))
    assert a.baddbmm_(b, c) is a


def test_bounds_may_be_uncertain():
    x, low, high = example(5, variance=0.3), example(5, seed=1, variance=0.3), example(5, seed=2, mean=3.0)
    near(lambda x, low: torch.clamp(x, low), x, low, mean=0.01, variance=0.02)
    near(lambda x, high: torch.clamp(x, max=high), x, high, mean=0.01, variance=0.02)
    near(lambda low: torch.clamp(torch.zeros(5, dtype=torch.float64), min=low), low, mean=0.01, variance=0.02)
    far = torch.full((5,), torch.finfo(torch.float64).min, dtype=torch.float64)  # as masks and running maxima begin
    for same in (torch.maximum(x, far), x.clamp(min=far), x.clamp(-float("inf"), 1e30), torch.minimum(x, -far)):
        torch.testing.assert_close(parts(same), parts(x))
    assert x.clamp_(min=low, max=high.mean + 0) is x
    assert (x.mean < high.mean + 0).all()


def test_functions_at_the_edge_of_where_they_are_defined_stay_finite():
    x = Moments(torch.tensor([0.999, -1.0]), torch.tensor([0.01, 0.01]))
    for function in (torch.asin, torch.acos, torch.atanh, torch.erfinv):
        assert function(x).mean.isfinite().all()
        assert function(x).variance.isfinite().all()


@pytest.mark.parametrize("order", [1, 3, float("inf")])
def test_norms_of_other_orders(order):
    x = example(2, 3, mean=4.0)
    near(lambda t: torch.norm(t, p=order, dim=-1, keepdim=True), x, mean=0.1, variance=0.05)
    with pytest.raises(NotImplementedError, match="a norm of order 'nuc' of matrices has no rule"):
        torch.linalg.norm(x, "nuc")
