"""The formulas for functions of a Gaussian, against dense integration in float64 and against their limits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from bayesprune.moments import closed_forms as forms
from bayesprune.moments import settings
from bayesprune.moments.gaussian import formula_of, gauss_hermite, transform
from bayesprune.moments.memory import KnownMoments, MomentTensors

GRID = torch.linspace(-16, 16, 16001, dtype=torch.float64)
DENSITY = torch.softmax(-0.5 * GRID.square(), 0)

HARDSWISH = forms.piecewise([-3.0, 3.0], [(0.0,), (0.0, 0.5, 1 / 6), (0.0, 1.0)])
HARDSHRINK = forms.piecewise([-0.5, 0.5], [(0.0, 1.0), (0.0,), (0.0, 1.0)])
EXACT = {
    "relu": (F.relu, forms.rectified),
    "leaky": (lambda x: F.leaky_relu(x, 0.2), forms.leaky(0.2)),
    "abs": (torch.abs, forms.leaky(-1.0)),
    "clamp": (lambda x: x.clamp(-1, 2), forms.clamped(-1.0, 2.0)),
    "clamp_min": (lambda x: x.clamp(min=0.3), forms.clamped(0.3, None)),
    "clamp_max": (lambda x: x.clamp(max=0.3), forms.clamped(None, 0.3)),
    "hardswish": (F.hardswish, HARDSWISH),
    "hardshrink": (F.hardshrink, HARDSHRINK),
    "exp": (torch.exp, forms.exponential()),
    "exp2": (torch.exp2, forms.exponential(math.log(2))),
    "expm1": (torch.expm1, forms.exponential(offset=-1.0)),
    "square": (torch.square, forms.squared),
    "sin": (torch.sin, forms.sine),
    "cos": (torch.cos, forms.cosine),
}
APPROXIMATE = {
    "gelu": (F.gelu, forms.gelu()),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), forms.gelu("tanh")),
    "quadrature": (torch.sigmoid, formula_of(torch.sigmoid)),
}
POSITIVE = {
    "sqrt": (torch.sqrt, forms.power(0.5)),
    "rsqrt": (torch.rsqrt, forms.power(-0.5)),
    "reciprocal": (torch.reciprocal, forms.power(-1.0)),
    "log": (torch.log, forms.logarithm()),
    "log1p": (torch.log1p, forms.logarithm(offset=1.0)),
}
EVERY = EXACT | APPROXIMATE | POSITIVE


def integrated(function, m, s):
    """Mean, variance, gain E[f e] / s and curvature E[f (e^2 - 1)] / s^2 of the function under N(m, s^2)."""
    s = torch.as_tensor(s, dtype=m.dtype)
    values = function(m[:, None] + s[..., None] * GRID)
    mean = (values * DENSITY).sum(1)
    variance = ((values - mean[:, None]).square() * DENSITY).sum(1)
    curvature = (values * (GRID.square() - 1) * DENSITY).sum(1) / s**2
    return mean, variance, (values * GRID * DENSITY).sum(1) / s, curvature


@pytest.mark.parametrize("std", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("name", EXACT)
def test_a_closed_form_is_exact(name, std):
    function, formula = EXACT[name]
    m = torch.linspace(-4, 4, 17, dtype=torch.float64)
    for found, expected in zip(formula(m, torch.full_like(m, std**2)), integrated(function, m, std), strict=True):
        scale = expected.abs().max()
        # A jump costs the integration half a step of the grid, times up to its std of 3.
        limit = 0.06 if name == "hardshrink" else 1e-5
        error = ((found - expected).abs().max() / scale).item()
        assert error < limit, f"error {error:.1e} of the largest"


@pytest.mark.parametrize(
    ("std", "average", "worst"), [(0.25, 1e-5, 2e-4), (0.5, 4e-4, 6e-3), (1, 2.1e-3, 0.16), (2, 0.0125, 0.49)]
)
def test_the_gelu_keeps_the_error_that_it_states(std, average, worst):
    m = torch.linspace(-3, 3, 61, dtype=torch.float64)
    mean, variance, gain, curvature = forms.gelu()(m, torch.full_like(m, std**2))
    expected = integrated(F.gelu, m, std)
    torch.testing.assert_close(curvature, expected[3], rtol=0, atol=1e-7)
    torch.testing.assert_close(mean, expected[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(gain, expected[2], rtol=0, atol=1e-8)
    error = expected[1] - variance
    assert (error > -1e-9).all(), "terms left out are positive"
    assert error.sum() / expected[1].sum() < average
    assert (error / expected[1]).max() < worst


def test_the_gelu_by_tanh_is_its_own_where_nothing_varies_and_near_the_other_elsewhere():
    m = torch.linspace(-4, 4, 81, dtype=torch.float64)
    mean, variance, *_ = forms.gelu("tanh")(m, torch.full_like(m, 0.25))
    expected = integrated(lambda x: F.gelu(x, approximate="tanh"), m, 0.5)
    assert (mean - expected[0]).abs().max() < 5e-4
    assert ((variance - expected[1]).abs() / expected[1].max()).max() < 2e-3


@pytest.mark.parametrize("name", POSITIVE)
def test_a_root_or_logarithm_is_exact_for_a_log_normal_number_and_near_for_a_gaussian_one(name):
    function, formula = POSITIVE[name]
    m = torch.linspace(0.52, 4, 9, dtype=torch.float64)
    offset = 1.0 if name == "log1p" else 0.0
    spread = torch.log1p(0.25 / (m + offset).square())[:, None]
    log_normal = torch.exp(torch.log(m + offset)[:, None] - spread / 2 + spread.sqrt() * GRID) - offset
    values = function(log_normal)
    mean, variance, *_ = formula(m, torch.full_like(m, 0.25))
    expected = (values * DENSITY).sum(1)
    torch.testing.assert_close(mean, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(variance, ((values - expected[:, None]).square() * DENSITY).sum(1), rtol=1e-6, atol=1e-9)
    std = 0.05 * m
    for found, gaussian in zip(formula(m, std.square()), integrated(function, m, std), strict=True):
        assert ((found - gaussian).abs() / gaussian.abs()).max() < 0.02


@pytest.mark.parametrize("name", EVERY)
def test_gradients_of_a_formula(name):
    m = torch.tensor([0.2, 0.7, 1.3, 2.9], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([0.3, 0.01, 0.2, 1.5], dtype=torch.float64, requires_grad=True)
    assert gradcheck(EVERY[name][1], (m, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EVERY)
def test_without_variance_a_formula_is_the_function_and_its_gradient_is_finite(name, dtype):
    function, formula = EVERY[name]
    m = torch.tensor([1e-3, 0.25, 0.75, 1.5, 3.5, 7.0, 30.0], dtype=dtype)
    if name not in POSITIVE:
        m = torch.cat([m, -m, torch.zeros(1, dtype=dtype)])
    m.requires_grad_()
    v = torch.zeros_like(m, requires_grad=True)
    mean, variance, gain, _ = formula(m, v)
    torch.testing.assert_close(mean, function(m), rtol=1e-6, atol=1e-6)
    # The threshold of hardshrink is none of these means.
    (slope,) = torch.autograd.grad(function(m).sum(), m, retain_graph=True)
    if name not in ("relu", "leaky", "abs", "quadrature"):  # kinks at 0, and a gain of rounding
        torch.testing.assert_close(gain, slope, rtol=1e-5, atol=1e-5 if name != "gelu_tanh" else 2e-3)
    assert (variance == 0).all(), variance
    for gradient in torch.autograd.grad((mean + variance).sum(), (m, v)):
        assert gradient.isfinite().all(), gradient


@pytest.mark.parametrize("name", EVERY)
def test_nothing_overflows_far_out_or_at_tiny_variances(name):
    means = [1e-6, 1.0, 1e3, 1e6]
    if name in POSITIVE or name.startswith("exp"):  # which overflow by themselves
        means = [1e-2, 1.0, 10.0]
    m = torch.tensor([sign * x for x in means for sign in ((1,) if name in POSITIVE else (1, -1))], requires_grad=True)
    for variance in (1e-30, 1e-20, 1e-10, 1e-4, 4.0):
        v = torch.full_like(m, variance, requires_grad=True)
        found = EVERY[name][1](m, v)
        assert all(part.isfinite().all() for part in found), (variance, found)
        assert (found.variance >= 0).all()
        for gradient in torch.autograd.grad(found.mean.sum() + found.variance.sum(), (m, v)):
            assert gradient.isfinite().all(), (variance, gradient)


@pytest.mark.parametrize("name", [name for name in EXACT if name != "hardshrink"] + ["gelu"])
def test_a_small_variance_keeps_its_digits_in_float32(name):
    formula = (EXACT | APPROXIMATE)[name][1]
    m = torch.tensor([0.7, 1.3, 2.2, 2.9, 8.0])
    v = torch.full_like(m, 1e-6)
    expected = formula(m.double(), v.double()).variance
    error = ((formula(m, v).variance - expected).abs() / (1e-3 * v + expected)).max()
    assert error < 1e-3, f"{error:.1e}"


def test_quadrature_is_exact_for_polynomials_up_to_its_degree():
    m = torch.linspace(-2, 2, 5, dtype=torch.float64)
    v = torch.full_like(m, 0.7)
    mean, variance, gain, curvature = formula_of(lambda x: x.pow(3))(m, v)
    torch.testing.assert_close(curvature, 6 * m)
    torch.testing.assert_close(mean, m.pow(3) + 3 * m * v)
    torch.testing.assert_close(variance, 9 * m.pow(4) * v + 36 * m.square() * v.square() + 15 * v.pow(3))
    torch.testing.assert_close(gain, 3 * (m.square() + v))


def test_an_even_number_of_nodes_works_as_well():
    m, v = torch.linspace(-2, 2, 5, dtype=torch.float64), torch.full((5,), 0.7, dtype=torch.float64)
    with settings(num_nodes=4):
        mean, variance, gain, _ = formula_of(torch.square)(m, v)
    torch.testing.assert_close(mean, m.square() + v)
    torch.testing.assert_close(variance, forms.squared(m, v).variance)
    torch.testing.assert_close(gain, 2 * m)
    assert abs(sum(gauss_hermite(4)[1]) - 1) < 1e-12


def test_first_order_is_the_value_and_the_squared_slope():
    m, v = torch.linspace(-2, 2, 5, dtype=torch.float64), torch.full((5,), 0.7, dtype=torch.float64)
    with settings(taylor=True):
        mean, variance, gain, _ = formula_of(torch.tanh)(m, v)
    slope = 1 - torch.tanh(m).square()
    torch.testing.assert_close(mean, torch.tanh(m))
    torch.testing.assert_close(variance, slope.square() * v)
    torch.testing.assert_close(gain, slope)


def test_all_that_positions_share_stays_shared_but_for_what_it_states():
    """Rectified numbers of mean 0 that are the same at all positions: 3 % of their variance is taken as apart."""
    one = torch.ones(1, 4, dtype=torch.float64)
    result = transform(forms.rectified, KnownMoments(MomentTensors(0 * one, one, one[:, :1]))).parts
    assert 0.96 < (result.shared / result.variance).max() < 0.97


@pytest.mark.parametrize("covariance", [-0.2, 0.0, 0.3])
def test_the_larger_of_two_gaussians_is_exact(covariance):
    m1, m2, v1, v2 = (
        torch.tensor(x, dtype=torch.float64) for x in ([0.0, 1, -2], [0.0, 0.5, 1], [0.5, 1, 2], [0.5, 0.4, 1])
    )
    mean, variance, _ = forms.larger((m1, v1), (m2, v2), covariance)
    torch.manual_seed(0)
    common = torch.randn(400_000, 1, dtype=torch.float64) * abs(covariance) ** 0.5
    noise = torch.randn(2, 400_000, 3, dtype=torch.float64)
    sign = 1 if covariance >= 0 else -1
    a = m1 + common + (v1 - abs(covariance)).sqrt() * noise[0]
    b = m2 + sign * common + (v2 - abs(covariance)).sqrt() * noise[1]
    draws = torch.maximum(a, b)
    z = (draws.mean(0) - mean) / (draws.std(0) / len(draws) ** 0.5)
    assert z.abs().max() < 5, f"mean: z = {z.tolist()}"
    z = (draws.var(0) / variance - 1) / (2 / len(draws)) ** 0.5
    assert z.abs().max() < 7, f"variance: z = {z.tolist()} (of a Gaussian's spread)"


def test_the_larger_of_two_certain_numbers_is_the_maximum():
    m1 = torch.tensor([1.0, -1e9, 3.0], requires_grad=True)
    m2 = torch.tensor([2.0, 5.0, 3.0], requires_grad=True)
    v = torch.zeros(3, requires_grad=True)
    mean, variance, _ = forms.larger((m1, v), (m2, v), 0.0)
    torch.testing.assert_close(mean, torch.maximum(m1, m2))
    assert (variance == 0).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad((mean + variance).sum(), (m1, m2, v)))
