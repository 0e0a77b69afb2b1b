"""Expected losses against the average of the loss over draws."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from bayesprune.moments import Moments, parts
from tests.moments.sampled import NUM_SAMPLES, STANDARD_ERRORS, draws


def uncertain(*shape, std=0.3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator, dtype=dtype)
    return Moments(mean, (std * (0.5 + torch.rand(shape, generator=generator, dtype=dtype))).square())


def assert_expected(loss, *inputs, tolerance=0.0):
    """The loss of uncertain inputs is that of draws, to five standard errors and a fraction of what variance adds."""
    found = loss(*inputs)
    assert type(found) is torch.Tensor
    torch.manual_seed(0)
    dims = tuple(0 if isinstance(x, Moments) else None for x in inputs)
    values = torch.vmap(loss, in_dims=dims)(*(draws(x) if isinstance(x, Moments) else x for x in inputs))
    expected = values.mean(0)
    added = (expected - loss(*(parts(x).mean for x in inputs))).abs()
    off = (found - expected).abs() - STANDARD_ERRORS * values.std(0) / NUM_SAMPLES**0.5
    print(f"off by {off.max():.2e}, variance adds {added.max():.2e}")
    assert (off <= tolerance * added + 1e-12).all(), f"off by {off.max():.2e}, variance adds {added.max():.2e}"


CLASSES = torch.tensor([2, 0, -100, 1])
PROBABILITIES = torch.softmax(torch.randn(4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64), 1)
WEIGHT = torch.tensor([0.5, 1.0, 2.5], dtype=torch.float64)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(
    "options", [{}, {"weight": WEIGHT}, {"label_smoothing": 0.2}, {"weight": WEIGHT, "label_smoothing": 0.2}]
)
@pytest.mark.parametrize("target", [CLASSES, PROBABILITIES], ids=["classes", "probabilities"])
def test_cross_entropy_at_every_option(target, options, reduction):
    assert_expected(
        lambda z: F.cross_entropy(z, target, reduction=reduction, **options), uncertain(4, 3), tolerance=0.05
    )


def test_cross_entropy_of_other_shapes():
    assert_expected(lambda z: F.cross_entropy(z, torch.tensor(1)), uncertain(5), tolerance=0.05)
    target = torch.tensor([[0, 2, 1], [1, 1, -1]])
    assert_expected(lambda z: F.cross_entropy(z, target, ignore_index=-1), uncertain(2, 3, 3), tolerance=0.05)
    assert_expected(
        lambda z: F.cross_entropy(z, PROBABILITIES.T.reshape(1, 3, 2, 2)), uncertain(1, 3, 2, 2), tolerance=0.05
    )
    with pytest.warns(UserWarning, match="size_average"):
        F.cross_entropy(torch.zeros(1, 2), torch.tensor([0]), size_average=False)
    with pytest.warns(UserWarning, match="size_average"):
        total = F.cross_entropy(uncertain(4, 3), CLASSES, size_average=False)
    torch.testing.assert_close(total, F.cross_entropy(uncertain(4, 3), CLASSES, reduction="sum"))


def added_by_variance(std, num_classes, spread):
    """What rule and draws say that variance adds to the cross-entropy, averaged over 64 means."""
    generator = torch.Generator().manual_seed(0)
    mean = spread * torch.randn(64, num_classes, generator=generator, dtype=torch.float64)
    target = torch.zeros(64, dtype=torch.long)
    found = F.cross_entropy(Moments(mean, torch.full_like(mean, std**2)), target)
    noise = std * torch.randn(2000, 64, num_classes, generator=generator, dtype=torch.float64)
    expected = (torch.logsumexp(mean + noise, -1) - (mean + noise)[..., 0]).mean()
    certain = F.cross_entropy(mean, target)
    return (found - certain).item(), (expected - certain).item()


@pytest.mark.parametrize(
    ("std", "num_classes", "spread", "error"),
    [
        (0.5, 10, 0.5, 0.02),
        (1.0, 2, 0.5, 0.17),
        (1.0, 10, 0.5, 0.06),
        (2.0, 10, 3.0, 0.12),
        (3.0, 2, 0.5, 0.83),
        (3.0, 10, 0.5, 0.46),
    ],
)
def test_second_order_is_as_far_off_as_it_states(std, num_classes, spread, error):
    found, expected = added_by_variance(std, num_classes, spread)
    off = found / expected - 1
    print(f"off by {off:.3f}")
    assert -0.01 - 0.02 / std < off < error + 0.02 / std


def test_noise_that_all_logits_share_cancels():
    mean, own = torch.randn(4, 3, dtype=torch.float64), torch.full((4, 3), 0.2, dtype=torch.float64)
    shared = torch.full((4, 1), 5.0, dtype=torch.float64)
    torch.testing.assert_close(
        F.cross_entropy(Moments(mean, own + shared, shared), CLASSES), F.cross_entropy(Moments(mean, own), CLASSES)
    )


def test_directions_count_with_their_covariance():
    torch.manual_seed(0)
    mean, directions = torch.randn(4, 3, dtype=torch.float64), 0.3 * torch.randn(2, 4, 3, dtype=torch.float64)
    x = Moments.along(mean, directions, torch.full((4, 3), 0.02, dtype=torch.float64))
    noise = (torch.randn(NUM_SAMPLES, 2, 1, 1, dtype=torch.float64) * directions).sum(1)
    logits = mean + noise + 0.02**0.5 * torch.randn(NUM_SAMPLES, 4, 3, dtype=torch.float64)
    values = torch.vmap(lambda z: F.cross_entropy(z, CLASSES))(logits)
    certain = F.cross_entropy(mean, CLASSES)
    expected = values.mean()
    found = F.cross_entropy(x, CLASSES)
    assert type(found) is torch.Tensor
    assert abs(found - expected) < 0.08 * (expected - certain) + 5 * values.std() / NUM_SAMPLES**0.5


X, TARGET = (4, 3), torch.rand(4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
ELEMENTWISE = {
    "mse": lambda z: F.mse_loss(z, TARGET),
    "mse, weighted": lambda z: F.mse_loss(z, TARGET, weight=TARGET),
    "l1": lambda z: F.l1_loss(z, TARGET, reduction="none"),
    "smooth l1": lambda z: F.smooth_l1_loss(z, TARGET, beta=0.5, reduction="none"),
    "smooth l1 of no width": lambda z: F.smooth_l1_loss(z, TARGET, beta=0.0),
    "huber": lambda z: F.huber_loss(z, TARGET, delta=0.5, reduction="sum"),
    "binary, logits": lambda z: F.binary_cross_entropy_with_logits(z, TARGET, reduction="none"),
    "binary, weighted": lambda z: F.binary_cross_entropy_with_logits(z, TARGET, TARGET, pos_weight=WEIGHT),
    "binary, of a sigmoid": lambda z: F.binary_cross_entropy(torch.sigmoid(z), TARGET, reduction="none"),
    "mse of a tanh": lambda z: F.mse_loss(torch.tanh(z), TARGET, reduction="none"),
    "l1 of a sigmoid": lambda z: F.l1_loss(torch.sigmoid(z), TARGET),
    "gaussian": lambda z: F.gaussian_nll_loss(z, TARGET, TARGET + 0.1, full=True),
    "nll": lambda z: F.nll_loss(z, CLASSES, ignore_index=-100),
}


@pytest.mark.parametrize("std", [0.3, 2.0])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_losses_of_single_outputs(name, std):
    tolerance = {"l1 of a sigmoid": 0.4, "mse of a tanh": 0.03}.get(name, 2e-3)  # a kink; wide for 21 nodes
    assert_expected(ELEMENTWISE[name], uncertain(*X, std=std), tolerance=tolerance)


def test_divergence_from_certain_probabilities_is_linear():
    x = uncertain(4, 3)
    for reduction in ("batchmean", "none"):
        found = F.kl_div(x, PROBABILITIES, reduction=reduction)
        assert torch.equal(found, F.kl_div(parts(x).mean, PROBABILITIES, reduction=reduction))


def test_an_uncertain_target():
    assert_expected(F.mse_loss, uncertain(*X), uncertain(*X, seed=1))
    assert_expected(lambda y: F.l1_loss(TARGET, y), uncertain(*X))
    x = uncertain(*X)
    assert F.mse_loss(x, x).item() == pytest.approx(0)
    with pytest.raises(NotImplementedError, match="target"):
        F.kl_div(TARGET.log(), uncertain(*X))
    with pytest.raises(NotImplementedError, match="var"):
        F.gaussian_nll_loss(TARGET, TARGET, uncertain(*X))


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss()],
)
def test_without_variance_a_loss_is_torchs(loss):
    mean = torch.randn(4, 3)
    target = CLASSES if isinstance(loss, nn.CrossEntropyLoss) else TARGET.float()
    found = loss(Moments(mean, torch.zeros(4, 3)), target)
    torch.testing.assert_close(found, loss(mean, target), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: F.cross_entropy(z, CLASSES, weight=WEIGHT, label_smoothing=0.1),
        lambda z: F.cross_entropy(z, PROBABILITIES),
        ELEMENTWISE["binary, logits"],
        ELEMENTWISE["mse"],
        ELEMENTWISE["l1"],
        ELEMENTWISE["huber"],
    ],
)
def test_gradients(loss):
    mean, variance, _ = parts(uncertain(4, 3))
    shared = torch.full((4, 1), 0.005, dtype=torch.float64)
    given = [part.detach().requires_grad_() for part in (mean, variance + 0.01, shared)]
    assert gradcheck(lambda *given: loss(Moments(*given)), given)


def test_the_gradient_of_a_loss_that_is_written_out_is_that_of_its_mean():
    mean, variance = (part.detach().requires_grad_() for part in parts(uncertain(4, 3))[:2])
    loss = (Moments(mean, variance) - TARGET).square().mean()
    assert isinstance(loss, Moments)
    loss.backward()
    torch.testing.assert_close(mean.grad, 2 * (mean - TARGET).detach() / 12)
    torch.testing.assert_close(variance.grad, torch.full((4, 3), 1 / 12, dtype=torch.float64))


def test_half_precision_logits_give_a_loss_in_single():
    x = Moments(torch.randn(4, 3, dtype=torch.bfloat16), torch.full((4, 3), 1e-3))
    loss = F.cross_entropy(x, CLASSES)
    assert loss.dtype == torch.float32
    assert loss > F.cross_entropy(torch.Tensor(x.mean).float(), CLASSES)
