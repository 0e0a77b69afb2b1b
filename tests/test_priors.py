"""Every prior's KL and gradient against torch.distributions, formulas written out, and autograd, in float64."""

import math

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.priors import ARD, Binding, BoundPrior, Gaussian, GroupLasso, Horseshoe, LogUniform, Prior
from bayesprune.train.kl import bind_prior
from tests.cases import STRUCTURES, structures
from tests.oracles import (
    assert_mean,
    best_scale,
    gaussian_kl,
    log_uniform_approximation,
    log_uniform_exact,
)

PRIORS = {
    "fixed": Gaussian(0.3),
    "layer_rms": Gaussian(),
    "centered": Gaussian(0.3, centered=True),
    "ard_weight": ARD("weight"),
    "ard_channel": ARD("channel"),
    "ard_input_channel": ARD("input_channel"),
    "ard_layer": ARD("layer"),
    "horseshoe": Horseshoe("channel", 0.5),
    "horseshoe_auto": Horseshoe("channel", "auto"),
    "horseshoe_slab": Horseshoe("channel", 0.5, slab=0.8),
    "group_lasso": GroupLasso("channel", 0.1),
    "group_lasso_auto": GroupLasso("channel"),
    "log_uniform": LogUniform(),
}
every_prior = pytest.mark.parametrize("name", PRIORS)
SHAPES = {"per_weight": (4, 3, 2, 2), "per_channel": (4, 1, 1, 1), "rank_one": (4, 3, 1, 1)}


def tensors(std: str = "per_weight", masked: bool = False):
    """Means, log stds of a structure's shape and a mask of one convolution, with the prior's binding."""
    mean = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    log_std = torch.randn(SHAPES[std], dtype=torch.float64) - 1
    keep = torch.rand(mean.shape) > 0.4 if masked else None
    if keep is not None:
        keep[1] = False  # a channel that is gone altogether
        mean = mean * keep
    return mean, log_std, keep, Binding(mean + 0.1, 0.7, (0,), (1,))


class OnlyKL(BoundPrior):
    """What a user writes: the KL, and autograd for the rest."""

    def __init__(self, bound: BoundPrior) -> None:
        self.bound = bound

    def kl(self, mean, log_std, keep=None):
        return self.bound.kl(mean, log_std, keep)


@pytest.mark.parametrize("masked", [False, True])
@structures
@every_prior
def test_closed_form_gradients_are_autograds(name, std, masked):
    mean, log_std, keep, binding = tensors(std, masked)
    bound = PRIORS[name].bind(binding)
    mean.requires_grad_()
    log_std.requires_grad_()
    expected = torch.autograd.grad(bound.kl(mean, log_std, keep), (mean, log_std))
    mean_gradient, std_gradient = bound.kl_gradient(mean.detach(), log_std.detach(), keep)
    assert mean_gradient.shape == std_gradient.shape == mean.shape
    torch.testing.assert_close(mean_gradient, expected[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(std_gradient.sum_to_size(log_std.shape), expected[1], rtol=1e-9, atol=1e-12)
    for got, wanted in zip(OnlyKL(bound).kl_gradient(mean, log_std, keep), (mean_gradient, std_gradient), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    if keep is not None:
        assert mean_gradient[~keep].abs().max() == std_gradient[~keep].abs().max() == 0


@pytest.mark.parametrize("masked", [False, True])
@structures
@pytest.mark.parametrize(("name", "scale"), [("fixed", 0.3), ("layer_rms", 0.7), ("centered", 0.3)])
def test_gaussian_kl_is_that_of_torch_distributions(name, scale, std, masked):
    mean, log_std, keep, binding = tensors(std, masked)
    kl = PRIORS[name].bind(binding).kl(mean, log_std, keep)
    expected = gaussian_kl(mean, log_std.exp(), scale, binding.mean if name == "centered" else 0.0)
    expected = expected.sum() if keep is None else expected[keep].sum()
    assert kl.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@structures
@pytest.mark.parametrize("group", ["channel", "layer"])
def test_ard_is_the_gaussian_at_the_best_scale_of_each_group(group, std, masked):
    mean, log_std, keep, binding = tensors(std, masked)
    stds = log_std.exp().expand(mean.shape)
    keep_all = torch.ones_like(mean, dtype=torch.bool) if keep is None else keep
    groups = range(4) if group == "channel" else [slice(None)]
    expected = 0.0
    for members in groups:
        mean_g, std_g = mean[members][keep_all[members]], stds[members][keep_all[members]]
        if mean_g.numel():
            expected += float(gaussian_kl(mean_g, std_g, best_scale(mean_g, std_g)).sum())
    assert ARD(group).bind(binding).kl(mean, log_std, keep).item() == pytest.approx(expected, rel=1e-10)


def test_ard_of_single_weights_is_a_function_of_their_snr():
    mean, log_std, _, binding = tensors()
    kl = ARD("weight").bind(binding).kl(mean, log_std)
    assert kl.item() == pytest.approx(float(0.5 * torch.log1p((mean / log_std.exp()).square()).sum()), rel=1e-12)
    one, log_one = mean[0, 0, 0, :1], log_std[0, 0, 0, :1]
    best = gaussian_kl(one, log_one.exp(), best_scale(one, log_one.exp()))
    alone = ARD("weight").bind(binding).kl(one, log_one)
    assert alone.item() == pytest.approx(best.item(), rel=1e-9)


def test_ard_groups_follow_the_units_of_the_tensor():
    mean, log_std = torch.randn(3, 4).double(), torch.zeros(3, 4).double()
    transposed = ARD("channel").bind(Binding(mean.T, 1.0, (1,))).kl(mean.T, log_std.T)
    torch.testing.assert_close(ARD("channel").bind(Binding(mean, 1.0, (0,))).kl(mean, log_std), transposed)
    bias = torch.randn(5).double()
    channel, layer = (ARD(group).bind(Binding(bias, 1.0, ())) for group in ("channel", "layer"))
    assert channel == layer, "a bias is one group"


@pytest.mark.parametrize("ratio", [1e-3, 0.03, 0.5, 1.0, 3.0, 100.0])
def test_log_uniform_kl_is_the_published_formula(ratio):
    mean = torch.tensor([0.7, -0.2], dtype=torch.float64)
    kl = LogUniform().bind(Binding(mean, 1.0, ())).kl(mean, (ratio * mean.abs()).log())
    assert kl.item() == pytest.approx(2 * log_uniform_approximation(1.0, ratio), rel=1e-10)


def test_log_uniform_kl_is_within_a_hundredth_nat_of_the_exact_one():
    log_alpha = torch.linspace(-16, 12, 113, dtype=torch.float64)
    exact = torch.tensor([log_uniform_exact(math.exp(value)) for value in log_alpha], dtype=torch.float64)
    bound, one = LogUniform().bind(Binding(torch.ones(1), 1.0, ())), torch.ones(1, dtype=torch.float64)
    approximate = torch.stack([bound.kl(one, 0.5 * value[None]) for value in log_alpha])
    error = approximate - exact
    print(f"largest error {error.abs().max():.4f} nats at ln alpha = {log_alpha[error.abs().argmax()]:.2f}")
    assert error.abs().max() < 0.01


def test_the_exact_log_uniform_kl_is_a_monte_carlo_average():
    """Checks the oracle itself: differences of E[ln q - ln p], p ~ 1/|w|, between two posteriors."""
    eps = torch.randn(400_000, dtype=torch.float64)
    draws = {alpha: -0.5 * math.log(alpha) - 0.5 * eps**2 + (1 + alpha**0.5 * eps).abs().log() for alpha in (0.1, 2.0)}
    assert_mean(draws[0.1] - draws[2.0], log_uniform_exact(0.1) - log_uniform_exact(2.0))


@pytest.mark.parametrize("name", [name for name in PRIORS if name != "horseshoe_auto"])  # ln tau has any sign
def test_kl_is_not_negative(name):
    for shift in (-6.0, -2.0, 0.0, 2.0):
        mean, log_std, _, binding = tensors()
        assert PRIORS[name].bind(binding).kl(mean, log_std + shift) > 0


def test_kl_is_zero_where_the_posterior_is_the_prior():
    zero, log_std = torch.zeros(4, 3).double(), torch.full((4, 3), math.log(0.3)).double()
    assert Gaussian(0.3).bind(Binding(zero, 1.0, (0,))).kl(zero, log_std).item() == pytest.approx(0, abs=1e-12)
    mean = torch.randn(4, 3).double()
    centered = Gaussian(0.3, centered=True).bind(Binding(mean, 1.0, (0,)))
    assert centered.kl(mean, log_std).item() == pytest.approx(0, abs=1e-12)
    for group in ("weight", "channel", "layer"):
        bound = ARD(group).bind(Binding(zero, 1.0, (0,)))
        assert bound.kl(zero, log_std).item() == pytest.approx(0, abs=1e-12)
        for gradient in bound.kl_gradient(zero, log_std):
            assert gradient.abs().max() < 1e-12
    assert LogUniform().bind(Binding(zero, 1.0, (0,))).kl(zero, log_std).item() == pytest.approx(0, abs=1e-6)


@every_prior
def test_a_weight_of_zero_and_tiny_stds_stay_finite(name):
    """float32: squares of 1e-20 underflow."""
    mean = torch.tensor([0.0, 1e-20, -1e-12, 1e-3, 1e3]).repeat(2, 1)
    log_std = torch.tensor([-20.0, -20.0, -3.0, -20.0, 2.0]).repeat(2, 1)
    some, no = torch.tensor([True, False, True, True, False]).repeat(2, 1), torch.zeros(2, 5, dtype=torch.bool)
    for keep in (None, some, no):
        bound = PRIORS[name].bind(Binding(mean, 0.5, (0,)))
        assert bound.kl(mean, log_std, keep).isfinite()
        assert all(gradient.isfinite().all() for gradient in bound.kl_gradient(mean, log_std, keep))
        if keep is not None and not keep.any():
            assert bound.kl(mean, log_std, keep) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_prior
def test_means_of_any_dtype(name, dtype):
    """The KL is computed in the stds' float32."""
    mean, log_std, _, _ = tensors()
    mean = mean.to(dtype)
    bound, exact = (PRIORS[name].bind(Binding(m, 0.7, (0,))) for m in (mean, mean.double()))
    kl = bound.kl(mean, log_std.float())
    assert kl.dtype == torch.float32
    assert kl.item() == pytest.approx(exact.kl(mean.double(), log_std).item(), rel=1e-5)
    expected = exact.kl_gradient(mean.double(), log_std)
    for got, wanted in zip(bound.kl_gradient(mean, log_std.float()), expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("std", STRUCTURES)
@every_prior
def test_kl_of_a_model_is_the_sum_over_its_layers(name, std):
    prior = PRIORS[name]
    model = bp.to_variational(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Linear(4, 5)), std=std).double()
    parts = bp.kl_divergence(model[0], prior) + bp.kl_divergence(model[2], prior)
    torch.testing.assert_close(bp.kl_divergence(model, prior), parts, rtol=1e-12, atol=0)
    by_tensor = [bound.kl(p.mean, p.log_std) for p, bound in bind_prior(model, prior).items()]
    torch.testing.assert_close(sum(by_tensor), parts, rtol=1e-12, atol=0)


def test_largest_log_std_is_that_of_the_prior():
    binding = Binding(torch.zeros(2), 0.7, ())
    assert Gaussian(0.3).bind(binding).max_log_std == pytest.approx(math.log(0.3))
    assert Gaussian().bind(binding).max_log_std == pytest.approx(math.log(0.7))
    assert ARD().bind(binding).max_log_std == LogUniform().bind(binding).max_log_std == math.inf


def test_the_centre_is_fixed_when_the_prior_is_bound():
    mean = torch.ones(3)
    bound = Gaussian(1.0, centered=True).bind(Binding(mean, 1.0, ()))
    mean += 1
    assert torch.equal(bound.state()["center"], torch.ones(3))
    assert bound.state()["scale"] == 1.0
    assert ARD("layer").bind(Binding(mean, 1.0, ())).state() == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(0.0), r'Gaussian scale is 0.0; expected a positive number or "layer_rms"'),
        (lambda: Gaussian(-1), "Gaussian scale is -1"),
        (lambda: Gaussian(float("nan")), "Gaussian scale is nan"),
        (lambda: Gaussian("rms"), "Gaussian scale is 'rms'"),
        (lambda: ARD("filter"), r"ARD group is 'filter'; expected \"weight\", \"channel\", \"input_channel\""),
        (lambda: ARD([]), r"ARD group is \(\); expected .* or what bayesprune.prune.dependency_groups returns"),
        (lambda: Horseshoe("layer", 0.0), 'Horseshoe global_scale is 0.0; expected a positive number or "auto"'),
        (lambda: Horseshoe("layer", "median"), "Horseshoe global_scale is 'median'"),
        (lambda: Horseshoe("layer", slab=0.0), "Horseshoe slab is 0.0; expected a positive number or None"),
        (lambda: GroupLasso("layer", -1.0), 'GroupLasso global_scale is -1.0; expected a positive number or "auto"'),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_priors_compare_by_value():
    assert Gaussian(0.3) == Gaussian(0.3) != Gaussian(0.4)
    assert isinstance(ARD(), Prior)
    assert ARD() == ARD("channel")
