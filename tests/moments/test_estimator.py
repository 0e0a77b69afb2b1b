"""Moments as an estimator: in layers, in training, in prediction."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bayesprune as bp
from bayesprune.estimators import sample
from bayesprune.layers import named_posteriors, variational_layers
from bayesprune.moments import Moments, parts
from bayesprune.prediction.predict import classify


class Small(nn.Module):
    """A convolution, norms, attention and a classifier: (N, 2, 4, 4) to (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.norm, self.qkv, self.proj = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.gelu(self.bn(self.conv(x))).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).reshape(len(x), -1, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head((x + self.proj(attended)).mean(1))


def small(**options) -> nn.Module:
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
    return bp.to_variational(model, relative_std=0.1, **options)


INPUT = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("std", ["per_weight", "rank_one", "per_channel"])
@pytest.mark.parametrize("covariance", ["shared", "diagonal", "low_rank"])
def test_sampling_gives_moments(std, covariance):
    model = small(std=std).eval()
    with bp.sampling(model, "moments"), bp.moments.settings(covariance=covariance):
        output = model(INPUT)
    assert isinstance(output, Moments)
    assert output.shape == (5, 3)
    assert (output.variance > 0).all()
    assert output.variance.isfinite().all()
    assert type(model(INPUT)) is torch.Tensor


def test_near_weight_samples():
    model = small().eval()
    sampled = bp.predict(model, INPUT, num_samples=1500)
    propagated = bp.predict(model, INPUT, method="moments")
    ratio = (propagated.variance / sampled.variance).median().item()
    print(ratio)
    assert 0.8 < ratio < 1.25
    assert propagated.samples is None
    assert ((propagated.mean - sampled.mean).abs() < 0.3 * sampled.variance.sqrt()).all()


@pytest.mark.parametrize("training", [True, False])
def test_gradients_against_finite_differences(training):
    """Means and log stds of every layer, through conv, both norms and attention, in float64."""
    model = small().double().train(training)
    model.bn.momentum = 0.0
    x, target = INPUT.double(), torch.tensor([0, 1, 2, 0, 1])
    for _, layer in variational_layers(model):
        for name in layer.active_names():
            for part in layer.log_std_parts(name):
                part.data = part.data.double()

    def loss() -> torch.Tensor:
        with bp.sampling(model, "moments"):
            return F.cross_entropy(model(x), target) + parts(model(x)).variance.mean()

    loss().backward()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        analytic = (parameter.grad * direction).sum()
        losses = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                parameter += step * direction
                losses.append(loss())
            parameter += 1e-5 * direction
        numeric = (losses[0] - losses[1]) / 2e-5
        error = (analytic - numeric).abs() / (numeric.abs() + 1e-6)
        assert error < 1e-5, f"{name}: {analytic} by autograd, {numeric} by differences"


def test_training_with_the_attachment():
    model = small(estimator="moments").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    bp.attach(optimizer, model, num_data=50)
    target, losses = torch.tensor([0, 1, 2, 0, 1]), []
    before = {p.name: p.log_std.detach().clone() for p in named_posteriors(model)}
    for _ in range(30):
        loss = F.cross_entropy(model(INPUT), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(p.log_std, before[p.name]) for p in named_posteriors(model))


def test_layers_with_a_forward_of_their_own_propagate_too():
    """A weight-standardised convolution is not linear in its weight; its functions have rules all the same."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    layer = bp.to_variational(timm.layers.StdConv2d(3, 4, 3), relative_std=0.05)
    x = torch.randn(2, 3, 6, 6)
    propagated, sampled = bp.predict(layer, x, method="moments"), bp.predict(layer, x, num_samples=1000)
    ratio = (propagated.variance / sampled.variance).median().item()
    assert 0.9 < ratio < 1.1, ratio


def test_tied_parts_of_torch_attention():
    torch.manual_seed(0)
    layer = bp.to_variational(nn.MultiheadAttention(8, 2, batch_first=True), relative_std=0.05).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad(), bp.sampling(layer, "moments"):
        output, _ = layer(x, x, x, need_weights=False)
    with torch.no_grad(), bp.sampling(layer, "weight_sampling"):
        samples = torch.stack([layer(x, x, x, need_weights=False)[0] for _ in range(600)])
    ratio = (output.variance / samples.var(0)).median().item()
    assert 0.8 < ratio < 1.25, ratio


def test_removed_weights_have_no_variance():
    torch.manual_seed(0)
    model = bp.to_variational(nn.Linear(4, 3, bias=False))
    keep = torch.tensor([[True, True, False, True]] * 2 + [[False] * 4])
    model.set_mask("weight", keep)
    model.apply_masks()
    prediction = bp.predict(model, torch.randn(2, 4), method="moments")
    assert (prediction.variance[:, 2] == 0).all()
    assert (prediction.variance[:, :2] > 0).all()


def test_a_model_that_returns_certain_logits_has_variance_zero():
    model = nn.Sequential(bp.to_variational(nn.Linear(4, 3)))
    x = torch.randn(2, 4)
    model.forward = lambda x: x * 2
    prediction = bp.predict(model, x, method="moments")
    assert torch.equal(prediction.mean, 2 * x)
    assert torch.equal(prediction.variance, torch.zeros_like(x))


def test_classification_by_moments_and_by_samples_agree():
    torch.manual_seed(0)
    model = bp.to_variational(nn.Linear(6, 4), relative_std=0.7).eval()
    x = torch.randn(8, 6)
    sampled = bp.predict(model, x, num_samples=4000).classify()
    propagated = bp.predict(model, x, method="moments").classify(num_draws=4000)
    for got, expected in zip(propagated, sampled, strict=True):
        torch.testing.assert_close(got, expected, atol=0.03, rtol=0)
    assert torch.equal(bp.predict(model, x, method="moments").classify(num_draws=4000)[0], propagated[0])
    torch.testing.assert_close(sampled.probabilities.sum(-1), torch.ones(8))
    assert (sampled.mutual_information <= sampled.predictive_entropy).all()
    assert sampled.mutual_information.min() > 0.01


def test_classification_of_equal_draws_has_no_mutual_information():
    logits = torch.randn(3, 5)
    found = classify([logits, logits])
    torch.testing.assert_close(found.probabilities, logits.softmax(-1))
    assert found.mutual_information.max() < 1e-6
    with pytest.raises(ValueError, match="no draws"):
        classify([])
    with pytest.raises(ValueError, match=r"\(3, 1\), a single logit each; expected \(N, ..., C\)"):
        classify([torch.zeros(3, 1)])


def test_moments_of_a_single_layer_are_exact():
    torch.manual_seed(0)
    layer = bp.to_variational(nn.Linear(6, 4), relative_std=0.5)
    x = torch.randn(5, 6)
    draws = torch.stack([F.linear(x, *(sample(p) for p in layer.posteriors().values())) for _ in range(3)])
    prediction = bp.predict(layer, x, method="moments")
    std = layer.log_std("weight").exp(), layer.log_std("bias").exp()
    assert draws.shape[1:] == prediction.mean.shape
    assert torch.equal(prediction.mean, layer.eval()(x))
    torch.testing.assert_close(prediction.variance, x.square() @ std[0].square().T + std[1].square())
