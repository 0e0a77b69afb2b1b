import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils.data import DataLoader, IterableDataset

import bayesprune as bp
from bayesprune.errors import UnsupportedModelError
from bayesprune.laplace import collapse, cross_entropy, fit_laplace
from bayesprune.laplace.diagonal import sums_of_squares
from bayesprune.layers import part_shapes
from tests.cases import LAYERS, Tied, structures

BATCHED = [case for case in LAYERS if case.name not in ("linear_one_example", "conv2d_one_image")]
cases = pytest.mark.parametrize("case", BATCHED, ids=lambda case: case.name)


def loss(model, batch):
    """Not the cross-entropy, so that every layer's output will do."""
    return model(batch[0]).flatten(1).square().sum(1).mean()


def slow_sums_of_squares(model, batches, loss):
    """One backward for each example, through the whole model."""
    sums = {}
    for inputs, labels in batches:
        for index in range(len(inputs)):
            model.zero_grad()
            loss(model, (inputs[index : index + 1], labels[index : index + 1])).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None and not name.endswith("log_std"):
                    sums[name] = sums.get(name, 0) + parameter.grad.square()
    model.zero_grad()
    return sums


class WithKeywords(nn.Module):
    def __init__(self, layer, kwargs):
        super().__init__()
        self.layer, self.kwargs = layer, kwargs

    def forward(self, x):
        return self.layer(x, **self.kwargs)


@cases
def test_squares_are_those_of_one_backward_for_each_example(case):
    model = bp.to_variational(WithKeywords(case.layer(), case.kwargs)).eval()
    x = case.input()
    batches = [(x, x), (x.flip(0)[:1], x)]
    found, seen = sums_of_squares(model, batches, loss=loss)
    expected = slow_sums_of_squares(model, batches, loss)
    assert seen == len(x) + 1
    assert found.keys() == expected.keys()
    for name, sums in expected.items():
        torch.testing.assert_close(found[name], sums, rtol=1e-10, atol=0)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


def windows() -> nn.Module:
    """Two rows of each example stand along the first dimension, as windows of an image do."""
    return nn.Sequential(nn.Flatten(0, 1), nn.Linear(4, 2), nn.Unflatten(0, (-1, 2)))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: nn.Sequential(shared := nn.Linear(4, 4), nn.Tanh(), shared), (3, 4)),
        (lambda: Tied(nn.Linear(4, 4), nn.Linear(4, 4)), (3, 2, 4)),
        (lambda: Standardised(2, 3, 2), (3, 2, 3, 3)),
        (windows, (3, 2, 4)),
    ],
    ids=["runs twice", "tied", "own forward", "windows"],
)
def test_squares_where_gradients_add_up_before_they_are_squared(model, shape):
    net = bp.to_variational(model().double()).eval()
    x = torch.randn(shape, dtype=torch.float64)
    found, _ = sums_of_squares(net, [(x, x)], loss=loss)
    expected = slow_sums_of_squares(net, [(x, x)], loss)
    assert found.keys() == expected.keys()
    for name, sums in expected.items():
        torch.testing.assert_close(found[name], sums, rtol=1e-10, atol=0)


def test_chunks_give_the_same(monkeypatch):
    model = bp.to_variational(nn.Conv2d(2, 3, 2).double())
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    whole, _ = sums_of_squares(model, [(x, x)], loss=loss)
    monkeypatch.setattr("bayesprune.laplace.diagonal._MAX_NUMBERS", 2 * model.weight.numel() + 1)
    chunked, _ = sums_of_squares(model, [(x, x)], loss=loss)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=0)


def classifier() -> tuple[nn.Module, list]:
    torch.manual_seed(1)
    model = bp.to_variational(nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)))
    return model, [(torch.randn(6, 1, 3, 3), torch.randint(4, (6,))) for _ in range(3)]


def test_snr_is_optimal_brain_damage():
    """SNR^2 / 2 is the saliency w^2 h / 2, h being the curvature of the summed loss and the prior."""
    model, batches = classifier()
    assert fit_laplace(model, batches, num_data=500, loss=cross_entropy, prior=bp.priors.Gaussian(0.5)) is model
    sums = slow_sums_of_squares(model.eval(), batches, cross_entropy)
    for name, snr in bp.signal_to_noise(model).items():
        mean = model.get_parameter(name).detach()
        saliency = 0.5 * mean.square() * (500 / 18 * sums[name] + 1 / 0.5**2)
        torch.testing.assert_close(0.5 * snr.square(), saliency, rtol=1e-4, atol=0)


def test_num_data_defaults_to_the_examples_seen_and_half_precision_will_do():
    model, batches = classifier()
    fit_laplace(model, batches, loss=cross_entropy, num_batches=2)
    expected, _ = classifier()
    fit_laplace(expected, batches[:2], loss=cross_entropy, num_data=12)
    torch.testing.assert_close(dict(model.named_parameters()), dict(expected.named_parameters()))
    half, _ = classifier()
    fit_laplace(half.bfloat16(), [(x.bfloat16(), y) for x, y in batches[:2]], loss=cross_entropy)
    torch.testing.assert_close(half[3].weight_log_std, expected[3].weight_log_std, rtol=0, atol=0.1)


@structures
def test_stds_are_the_best_fit_of_their_structure(std):
    """No small change of any log std brings q nearer to the Gaussians of single weights."""
    precision = torch.rand(4, 3, 2, dtype=torch.float64).add(0.1).square() * 100
    keep = torch.rand(4, 3, 2) > 0.2
    p = Normal(0.0, precision.rsqrt())
    parts = [part.requires_grad_() for part in collapse(precision, part_shapes(std, (4, 3, 2), (0,)).values(), keep)]

    def distance(*log_stds):
        return (kl_divergence(Normal(0.0, sum(log_stds).exp().expand(4, 3, 2)), p) * keep).nansum()

    if std == "per_weight":
        torch.testing.assert_close(parts[0][keep].exp(), precision[keep].rsqrt())
        assert parts[0][~keep].isnan().all()
        return
    distance(*parts).backward()
    assert all(part.grad.abs().max() < 1e-5 for part in parts)
    for _ in range(20):
        assert distance(*(part + 0.1 * torch.randn_like(part) for part in parts)) > distance(*parts)


@structures
def test_every_structure_fits_and_removed_weights_do_not_count(std):
    torch.manual_seed(2)
    model = bp.to_variational(nn.Linear(6, 4), std=std)
    model.set_mask("weight", torch.tensor([True, True, False, True, True, False]).repeat(4, 1))
    batches = [(torch.randn(20, 6) * torch.tensor([1, 1, 100, 1, 1, 100]), torch.randint(4, (20,)))]
    cut = bp.to_variational(nn.Linear(4, 4), std=std)
    cut.weight.data, cut.bias.data = model.weight.data[:, [0, 1, 3, 4]], model.bias.data.clone()
    for each, columns in ((model, slice(None)), (cut, [0, 1, 3, 4])):
        fit_laplace(each, [(x[:, columns], y) for x, y in batches], loss=cross_entropy)
    log_std = model.log_std("weight").expand(4, 6)[:, [0, 1, 3, 4]]
    torch.testing.assert_close(log_std, cut.log_std("weight").expand(4, 4), rtol=1e-4, atol=1e-5)


def test_what_is_not_known_is_said_and_stays():
    model = bp.to_variational(nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)}))
    before = model["unused"].weight_log_std.clone()
    batches = [(torch.randn(6, 4), torch.randint(3, (6,)))]
    with pytest.warns(UserWarning, match="2 parameters keep the stds that they had.*unused.weight, unused.bias"):
        fit_laplace(model, batches, loss=lambda model, batch: F.cross_entropy(model["used"](batch[0]), batch[1]))
    assert torch.equal(model["unused"].weight_log_std, before)
    with pytest.raises(UnsupportedModelError, match="BoundLearned, which has no precision"):
        fit_laplace(model, batches, prior=bp.priors.ARD())


def test_a_label_that_no_output_stands_for_is_told():
    model, x = bp.to_variational(nn.Linear(3, 2)), torch.randn(2, 3)
    with pytest.raises(ValueError, match="has the label 5, and the model has 2 outputs; expected class numbers"):
        fit_laplace(model, [(x, torch.tensor([0, 5]))], loss=cross_entropy)


class Endless(IterableDataset):
    """Examples without a length, which a loader of them has none of either."""

    def __iter__(self):
        return iter([(torch.ones(4), 0), (torch.zeros(4), 1)])


def test_a_loader_of_data_without_a_length_will_do():
    model = bp.to_variational(nn.Linear(4, 3))
    other = copy.deepcopy(model)
    fit_laplace(model, DataLoader(Endless(), batch_size=1))
    fit_laplace(other, list(DataLoader(Endless(), batch_size=1)))
    assert torch.equal(model.weight_log_std, other.weight_log_std)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_are_told_in_a_sentence(value):
    x = torch.randn(6, 3)
    x[1, 2] = value
    with pytest.raises(
        ValueError, match=r"the model's logits are NaN or infinite on these data; expected finite numbers"
    ):
        fit_laplace(bp.to_variational(nn.Linear(3, 2)), [x])


def test_gradients_that_are_not_finite_are_refused():
    model, x = bp.to_variational(nn.Linear(3, 2)), torch.randn(6, 3)
    x[1, 2] = float("inf")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="gradients of weight are not finite"):
        fit_laplace(model, [(x, x)], loss=lambda model, batch: model(batch[0]).square().mean())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
