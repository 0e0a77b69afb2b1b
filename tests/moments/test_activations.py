"""Elementwise rules against draws, by every name that a model may call them by."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from bayesprune.moments import Moments, parts, settings
from tests.moments.sampled import draws, exact, near, sampled, sampled_shared

MEANS = torch.tensor([-3.2, -2.0, -1.0, -0.3, 0.0, 0.4, 1.1, 2.0, 3.1, 6.2], dtype=torch.float64)


def uncertain(std, mean=MEANS):
    return Moments(mean, torch.full_like(mean, std**2))


EXACT = [
    *(F.relu, torch.relu, Tensor.relu, F.relu6, F.leaky_relu, F.hardtanh, F.hardsigmoid, F.hardswish),
    *(torch.abs, Tensor.abs, abs, torch.exp, Tensor.exp, torch.exp2, torch.expm1, torch.square, Tensor.square),
    *(torch.sin, Tensor.sin, torch.cos, Tensor.cos, F.hardshrink, torch.hardshrink, F.softshrink),
    *(lambda x: F.leaky_relu(x, 0.3), lambda x: x.clamp(-1, 1.5), lambda x: torch.clamp(x, max=0.5)),
    *(lambda x: x.clip(min=-1), lambda x: x.clamp_min(0.2), lambda x: torch.clamp_max(x, 0.2)),
    *(lambda x: torch.clamp(x, torch.linspace(-3, 0, 10).double(), torch.linspace(1, 4, 10).double()),),
    *(lambda x: F.threshold(x, 0.5, -1.0), lambda x: F.hardtanh(x, -2, 1)),
    lambda x: F.prelu(x, torch.tensor([0.25]).double()),
]


@pytest.mark.parametrize("function", EXACT)
def test_closed_forms_agree_with_draws(function):
    exact(function, uncertain(0.5))


@pytest.mark.parametrize("function", [F.relu, F.relu6, torch.abs, F.hardswish, F.hardshrink, torch.square, torch.cos])
def test_closed_forms_agree_with_wide_draws(function):
    exact(function, uncertain(2.0))


# Errors allowed at a std of 0.5: of the mean in stds, of the variance as a fraction; see the table of the rules' file.
QUADRATURE = {
    **dict.fromkeys([F.silu, F.sigmoid, torch.sigmoid, Tensor.sigmoid, torch.special.expit, F.softplus], (1e-3, 2e-3)),
    **dict.fromkeys([F.logsigmoid, torch.sinh, torch.asinh, F.mish, torch.atan], (2e-3, 8e-3)),
    **dict.fromkeys([torch.tanh, Tensor.tanh, F.tanh, F.tanhshrink], (3e-3, 0.04)),
    **dict.fromkeys(
        [torch.erf, torch.erfc], (1e-2, 0.4)
    ),  # flat where they are far out, to 1 % of the largest elsewhere
    **dict.fromkeys([F.elu, F.celu], (7e-3, 0.03)),
    **dict.fromkeys([F.selu, F.softsign], (0.045, 0.1)),
}


@pytest.mark.parametrize("function", QUADRATURE)
def test_quadrature_keeps_the_error_that_it_states(function):
    mean, variance = QUADRATURE[function]
    near(function, uncertain(0.5), mean=mean, variance=variance)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate):
    near(lambda x: F.gelu(x, approximate=approximate), uncertain(0.5), mean=0.012, variance=0.02)
    near(lambda x: F.gelu(x, approximate=approximate), uncertain(1.0), mean=0.012, variance=0.3)


@pytest.mark.parametrize(
    "function", [torch.sqrt, torch.rsqrt, torch.reciprocal, torch.log, torch.log2, torch.log10, torch.log1p]
)
def test_roots_and_logarithms_of_what_is_positive(function):
    mean = torch.tensor([0.1, 0.5, 1.0, 4.0], dtype=torch.float64)
    x = Moments(mean, (0.05 * mean).square())
    near(function, x, mean=2e-3, variance=0.02)
    assert parts(function(Moments(mean, mean.square()))).variance.isfinite().all()


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def gelu_by_tanh(x):
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_by_erf(x):
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def hard_sigmoid(x):
    return F.relu6(x + 3.0) / 6.0


WRITTEN_OUT = [
    (lambda x: x * x.sigmoid(), 1e-3, 2e-3),
    (lambda x: x.mul(F.softplus(x).tanh()), 1e-3, 4e-3),
    (quick_gelu, 1e-3, 0.02),
    (gelu_by_tanh, 1e-3, 0.02),
    (gelu_by_erf, 1e-3, 0.02),
    (lambda x: torch.square(F.relu(x)), 0.012, 0.025),
    (lambda x: F.relu(x) ** 2, 0.012, 0.025),
    (lambda x: x.clamp(min=-8).exp().log(), 1e-3, 1e-3),
    (lambda x: x + torch.expm1(torch.min(x, torch.tensor(-1e-6).double())), 0.04, 0.05),
]


@pytest.mark.parametrize(("function", "mean", "variance"), WRITTEN_OUT)
def test_an_activation_that_is_written_out_is_one_function(function, mean, variance):
    near(function, uncertain(0.5, MEANS[2:]), mean=mean, variance=variance)


def test_a_written_out_function_with_kinks_is_rough_and_better_with_more_nodes():
    def hard_swish(x):
        return x * F.relu6(x + 3.0) / 6.0

    near(hard_swish, uncertain(0.5), mean=0.16, variance=0.2)
    near(lambda x: F.relu6(x + 3.0) / 6.0, uncertain(0.5), mean=0.13, variance=0.26)
    with settings(num_nodes=21):
        near(hard_swish, uncertain(0.5), mean=0.06, variance=0.08)


IN_PLACE = {
    F.relu_: F.relu,
    torch.relu_: F.relu,
    Tensor.relu_: F.relu,
    F.leaky_relu_: F.leaky_relu,
    F.hardtanh_: F.hardtanh,
    F.elu_: F.elu,
    F.selu_: F.selu,
    F.celu_: F.celu,
    torch.sigmoid_: torch.sigmoid,
    Tensor.sigmoid_: torch.sigmoid,
    Tensor.tanh_: torch.tanh,
    Tensor.exp_: torch.exp,
    Tensor.abs_: torch.abs,
    Tensor.square_: torch.square,
    (lambda x: x.clamp_(-1, 1)): lambda x: x.clamp(-1, 1),
    (lambda x: x.add_(3.0).clamp_(0.0, 6.0).div_(6.0)): hard_sigmoid,
    (lambda x: x.mul_(x.sigmoid())): lambda x: x * x.sigmoid(),
    **{
        (lambda x, f=f: f(x, inplace=True)): f
        for f in (F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.elu, F.selu, F.celu, F.mish, F.leaky_relu)
    },
    (lambda x: F.threshold(x, 0.0, 0.0, inplace=True)): F.relu,
}


@pytest.mark.parametrize("write", IN_PLACE)
def test_what_writes_in_place_is_the_same_and_returns_its_argument(write):
    x = uncertain(0.5)
    result, expected = write(x), IN_PLACE[write](uncertain(0.5))
    assert result is x
    for found, right in zip(parts(x)[:2], parts(expected)[:2], strict=True):
        torch.testing.assert_close(found, right)


MODULES = [nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid]
MODULES += [nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink]
MODULES += [nn.Hardshrink, nn.Softshrink]


@pytest.mark.parametrize("module", MODULES)
def test_modules_of_torch_in_single_precision_without_variance_are_the_function(module):
    layer, mean = module(), torch.linspace(-5, 5, 23)
    result = layer(Moments(mean, torch.zeros_like(mean)))
    torch.testing.assert_close(torch.Tensor(result.mean), layer(mean), rtol=1e-6, atol=1e-6)
    assert (result.variance == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_variances_in_single(dtype):
    mean = torch.linspace(-2, 2, 5, dtype=dtype)
    for layer in (nn.GELU(), nn.Hardswish(), nn.SiLU(), nn.PReLU(dtype=dtype), nn.ReLU()):
        result = layer(Moments(mean, torch.full((5,), 1e-8)))
        assert result.dtype == dtype
        assert result.variance.dtype == torch.float32
        assert (result.variance[-1] > 0).all()


def test_prelu_has_a_slope_a_channel():
    mean = torch.randn(2, 3, 2, dtype=torch.float64)
    slope = torch.tensor([0.1, 0.5, -1.0], dtype=torch.float64)
    result = F.prelu(Moments(mean, torch.ones_like(mean)), slope)
    for channel in range(3):
        one = F.leaky_relu(Moments(mean[:, channel], torch.ones(2, 2).double()), slope[channel].item())
        torch.testing.assert_close(torch.Tensor(result.mean)[:, channel], torch.Tensor(one.mean))
        torch.testing.assert_close(result.variance[:, channel], one.variance)


@pytest.mark.parametrize("function", [F.relu, F.gelu, F.silu, F.hardswish, torch.tanh, F.softplus, F.relu6])
def test_what_positions_share_passes_on(function):
    torch.manual_seed(1)
    mean = torch.randn(1, 2, 6, dtype=torch.float64) * 0.3 + torch.tensor([[[-0.2], [0.6]]])
    shared = torch.tensor([[[0.02], [0.04]]], dtype=torch.float64)
    x = Moments(mean, shared + 0.02 + torch.zeros_like(mean), shared)
    result = function(x)
    found = sampled(function, x)
    error = (parts(result).shared / sampled_shared(found, (1, 2, 1)) - 1).abs().max().item()
    assert error < 0.08, f"shared is off by {error:.3f}"


def test_first_order_rules_on_request():
    slope = torch.func.vmap(torch.func.grad(F.silu))(MEANS)
    with settings(taylor=True):
        result = F.silu(uncertain(0.5))
        torch.testing.assert_close(torch.Tensor(result.mean), F.silu(MEANS))
        torch.testing.assert_close(result.variance, slope.square() * 0.25)
        for function in (F.relu, F.gelu, F.hardswish, torch.exp):
            torch.testing.assert_close(torch.Tensor(function(uncertain(0.5)).mean), function(MEANS))


@pytest.mark.parametrize(
    "function", [F.relu, F.gelu, F.hardswish, F.silu, quick_gelu, torch.exp, lambda x: x.clamp(-1, 1)]
)
def test_gradients_with_what_is_shared(function):
    torch.manual_seed(0)
    mean = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    variance = (torch.rand(2, 3, dtype=torch.float64) + 0.5).requires_grad_()
    shared = torch.full((2, 1), 0.3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda *given: tuple(parts(function(Moments(*given)))), (mean, variance, shared))


def test_an_uncertain_argument_beside_the_input_is_refused():
    x = uncertain(0.5)
    with pytest.raises(NotImplementedError, match="fmod"):
        torch.fmod(MEANS, x)


def test_draws_have_the_moments_that_they_are_of():
    mean = torch.randn(2, 3, dtype=torch.float64)
    x = Moments(mean, torch.full((2, 3), 0.5), torch.full((2, 1), 0.3))
    values = draws(x)
    assert (values.var(0) - 0.5).abs().max() < 0.015
    assert (torch.cov(values[:, 0].T) - (0.2 * torch.eye(3) + 0.3)).abs().max() < 0.015
