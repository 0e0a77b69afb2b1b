"""Norms with a posterior over their scale: the stock forward in evaluation, and with gamma drawn otherwise."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.layers import named_posteriors
from tests.oracles import gaussian_kl


@dataclass(frozen=True)
class NormCase:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def norm(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        norm = self.build().to(dtype)
        for tensor in (norm.weight, norm.bias) if getattr(norm, "bias", None) is not None else (norm.weight,):
            nn.init.normal_(tensor)
        return norm

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(self.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


class Renamed(nn.LayerNorm):
    """Inherits the forward."""


class Activated(nn.BatchNorm2d):
    """A forward of its own."""

    def forward(self, x):
        return super().forward(x).relu()


CASES = {
    "batch1d": NormCase(lambda: nn.BatchNorm1d(4), (6, 4)),
    "batch2d": NormCase(lambda: nn.BatchNorm2d(4), (3, 4, 2, 2)),
    "batch3d": NormCase(lambda: nn.BatchNorm3d(4), (2, 4, 2, 2, 2)),
    "batch2d_of_the_batch": NormCase(lambda: nn.BatchNorm2d(4, track_running_stats=False), (3, 4, 2, 2)),
    "layer": NormCase(lambda: nn.LayerNorm(4), (3, 5, 4)),
    "layer_without_bias": NormCase(lambda: nn.LayerNorm(4, bias=False), (3, 4)),
    "group": NormCase(lambda: nn.GroupNorm(2, 4), (3, 4, 2)),
    "rms": NormCase(lambda: nn.RMSNorm(4), (3, 5, 4)),
    "subclass": NormCase(lambda: Renamed(4), (3, 4)),
    "own_forward": NormCase(lambda: Activated(4), (3, 4, 2, 2)),
}
norms = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def variational(norm: nn.Module, **options) -> nn.Module:
    return bp.to_variational(norm, norm_scales=True, **options)


def norm_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


@pytest.mark.parametrize("std", ["per_weight", "rank_one", "per_channel"])
@norms
def test_there_and_back(case, std):
    norm, x = case.norm().eval(), case.input()
    expected, stock, state = norm(x), type(norm), copy.deepcopy(norm.state_dict())
    attributes = vars(norm).keys()
    variational(norm, std=std)
    assert isinstance(norm, stock)
    assert norm.active_names() == ["weight"]
    assert norm.weight_log_std.shape == norm.weight.shape
    assert torch.equal(norm(x), expected)
    for again in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(again) is type(norm)
        assert torch.equal(again(x), expected)
    bp.to_deterministic(norm)
    assert type(norm) is stock
    assert vars(norm).keys() == attributes
    assert norm.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("estimator", ["auto", "flipout", "local_reparameterization"])
@norms
def test_a_training_forward_is_the_stock_one_with_gamma_drawn(case, estimator):
    """The same output, statistics and gradients of mean, bias and log std as autograd finds on the plain formula."""
    norm, stock, x = variational(case.norm(), estimator=estimator).train(), case.norm().train(), case.input()
    torch.manual_seed(2)
    output = norm(x)
    torch.manual_seed(2)
    mean, log_std = stock.weight.detach().requires_grad_(), norm.weight_log_std.detach().requires_grad_()
    drawn = mean + (log_std.exp() * torch.randn(mean.shape, dtype=log_std.dtype)).to(mean.dtype)
    expected = torch.func.functional_call(stock, {"weight": drawn}, (x,))
    torch.testing.assert_close(output, expected)
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, stock.get_buffer(name)), name
    towards = torch.randn(output.shape, dtype=output.dtype)
    output.backward(towards)
    expected.backward(towards)
    torch.testing.assert_close(norm.weight.grad, mean.grad)
    torch.testing.assert_close(norm.weight_log_std.grad, log_std.grad, rtol=1e-5, atol=1e-6)
    if stock._parameters.get("bias") is not None:
        torch.testing.assert_close(norm.bias.grad, stock.bias.grad)


@norms
def test_gamma_is_shared_by_the_examples(case):
    norm = variational(case.norm(), relative_std=0.5).eval()
    x = case.input()[:1].expand(3, *case.shape[1:])
    with torch.no_grad(), bp.sampling(norm, "weight_sampling"):
        first, second = norm(x), norm(x)
    torch.testing.assert_close(first[0], first[2])
    assert not torch.equal(first, second)


def test_statistics_are_updated_once():
    norm = variational(nn.BatchNorm2d(4)).train()
    for estimator in ("mean", "weight_sampling", "flipout", "local_reparameterization", "moments"):
        norm.reset_running_stats()
        with bp.sampling(norm, estimator):
            norm(torch.randn(3, 4, 2, 2))
        assert norm.num_batches_tracked == 1


def test_the_initial_std_is_relative_to_gamma():
    norm = nn.LayerNorm(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -3.0, 3.0, 1.0]))
    torch.testing.assert_close(variational(norm, relative_std=0.2).weight_log_std.exp(), torch.full((4,), 0.2 * 5**0.5))
    zero = nn.BatchNorm2d(2)
    nn.init.zeros_(zero.weight)
    torch.testing.assert_close(variational(zero).weight_log_std.exp(), torch.full((2,), 0.1))
    assert bp.kl_divergence(zero).isfinite()


def test_by_default_norms_stay_as_they_are():
    model = bp.to_variational(norm_net())
    assert type(model[1]) is nn.BatchNorm2d
    rows = {row.name: row for row in bp.conversion_table(model)}
    assert rows["1"].reason == "BatchNorm2d is not a registered type"
    with pytest.raises(ValueError, match="matched no layer: the model has LayerNorm") as error:
        bp.to_variational(nn.LayerNorm(4))
    assert "RMSNorm" not in str(error.value)


def test_the_table_says_what_becomes_of_norms():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4, affine=False), nn.LayerNorm((2, 2)), Activated(4)
    )
    expected = {
        "1": ("converted", ""),
        "2": ("left", "it has no scale of its own"),
        "3": ("left", "its scale has the shape (2, 2); expected one dimension"),
        "4": ("fallback", "Activated has a forward of its own: weight sampling, whatever the estimator"),
    }
    assert [row.name for row in bp.conversion_table(model)] == ["0", "1", "3", "4"]
    before = bp.conversion_table(model, norm_scales=True)
    assert {row.name: (row.status, row.reason) for row in before if row.name != "0"} == expected
    variational(model)
    assert bp.conversion_table(model, norm_scales=True) == before
    assert type(model[2]) is nn.BatchNorm1d
    assert type(model[3]) is nn.LayerNorm


def test_the_filter_sees_norms_and_a_second_call_adds_them():
    model = variational(norm_net(), filter_fn=lambda module, name: not isinstance(module, nn.BatchNorm2d))
    assert type(model[1]) is nn.BatchNorm2d
    variational(model)
    assert isinstance(model[1], bp.layers.VariationalLayer)


def test_norms_of_timm():
    timm_layers = pytest.importorskip("timm.layers")
    for norm in (timm_layers.BatchNormAct2d(4), timm_layers.LayerNorm2d(4), timm_layers.GroupNormAct(4, num_groups=2)):
        x = torch.randn(2, 4, 3, 3)
        expected = norm.eval()(x)
        variational(norm, relative_std=0.5)
        assert torch.equal(norm(x), expected)
        assert type(norm).fallback_reason is not None
        norm.train()(x).square().sum().backward()
        assert norm.weight_log_std.grad.abs().sum() > 0


def test_a_norm_of_ones_own():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x / x.square().mean(-1, keepdim=True).sqrt() * self.weight

    from bayesprune.layers import VariationalNorm, registry

    before = dict(registry._REGISTERED)
    try:

        @bp.register_layer(Scale)
        class VariationalScale(VariationalNorm, Scale):
            pass

        scale = variational(Scale()).train()
        scale(torch.randn(2, 3)).sum().backward()
        assert scale.weight_log_std.grad is not None
    finally:
        registry._REGISTERED.clear()
        registry._REGISTERED.update(before)
        registry._any_variational_type.cache_clear()


def test_the_kl_counts_gamma_around_zero():
    model = variational(norm_net()).double()
    expected = sum(
        gaussian_kl(p.mean.detach(), p.log_std.detach().exp(), p.mean.detach().double().square().mean().sqrt()).sum()
        for p in named_posteriors(model)
        if p.mean.dim() > 1 or p.name == "1.weight"
    )
    without = bp.to_variational(norm_net().double())
    biases = bp.kl_divergence(without) - sum(
        gaussian_kl(p.mean.detach(), p.log_std.detach().exp(), p.mean.detach().square().mean().sqrt()).sum()
        for p in named_posteriors(without)
        if p.is_weight
    )
    torch.testing.assert_close(bp.kl_divergence(model), expected + biases)


@pytest.mark.parametrize("prior", [bp.priors.Gaussian(), bp.priors.ARD("weight"), bp.priors.ARD("channel")])
def test_training(prior):
    model = variational(norm_net()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    bp.attach(optimizer, model, num_data=100, prior=prior)
    before = model[1].weight_log_std.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 1, 4, 4)), torch.randint(2, (8,))).backward()
        optimizer.step()
    assert not torch.equal(model[1].weight_log_std, before)
    assert {"1.weight"} < bp.signal_to_noise(model).keys()
    assert "1.bias" not in bp.signal_to_noise(model)
    assert not isinstance(prior, bp.priors.Gaussian) or bp.prune.evidence(model)["1.weight"].isfinite().all()


def test_single_weights_are_removed_from_matrices_alone():
    model = variational(norm_net())
    bp.prune_weights(model, "weights=0.5")
    assert model[0].masked_names()
    assert not model[1].masked_names()


@pytest.mark.parametrize("norm", ["batch2d", "group"])
@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("covariance", ["diagonal", "shared", "low_rank"])
def test_moments_of_a_norm(norm, covariance, is_training):
    """Of a certain input they are exact: the scale's variance times the square of what it multiplies."""
    layer, x = variational(CASES[norm].norm(), relative_std=0.3).train(is_training), CASES[norm].input()
    with bp.sampling(layer, "moments"), bp.moments.settings(covariance=covariance):
        output = layer(x)
    stock = bp.to_deterministic(copy.deepcopy(layer))
    nn.init.ones_(stock.weight)
    nn.init.zeros_(stock.bias)
    std = layer.weight_log_std.detach().exp().reshape(1, -1, *[1] * (x.dim() - 2)).double()
    torch.testing.assert_close(output.variance.double(), (stock(x) * std).square().detach(), rtol=1e-4, atol=1e-8)


def test_moments_of_a_network_against_draws():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 3)),
    )
    variational(model, filter_fn=lambda module, name: isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm))
    x = torch.randn(4, 2, 8, 8)
    model.train()(x)
    model.eval()
    with torch.no_grad():
        with bp.sampling(model, "moments"):
            found = model(x)
        with bp.sampling(model, "weight_sampling"):
            draws = torch.stack([model(x) for _ in range(2000)])
    ratio = found.variance.mean() / draws.var(0).mean()
    print("ratio of variances", ratio)
    assert 0.7 < ratio < 1.4
    torch.testing.assert_close(found.mean + 0, draws.mean(0), atol=float(0.5 * draws.std(0).max()), rtol=0)


def test_compiled():
    model = variational(norm_net(), estimator="weight_sampling").train()
    x = torch.randn(4, 1, 4, 4)
    compiled = torch.compile(model, backend="eager")
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(x), expected)


def test_half_precision():
    norm = variational(nn.LayerNorm(4).to(torch.bfloat16)).train()
    assert norm.weight_log_std.dtype == torch.float32
    output = norm(torch.randn(2, 4, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert norm.to(torch.float16).weight_log_std.dtype == torch.float32


def test_batch_norm_is_measured_anew_at_the_means():
    model, data = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)), torch.randn(3, 8, 3, 4, 4)
    expected = bp.prune.recalibrate_batch_norm(copy.deepcopy(model), data)
    variational(model, relative_std=1.0)
    bp.prune.recalibrate_batch_norm(model, data)
    assert torch.equal(model[2].running_var, expected[2].running_var)
    assert model[0].estimator_override is None
