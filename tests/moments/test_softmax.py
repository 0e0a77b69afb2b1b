"""Softmax and its kin against draws, within the errors that the rules state."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from bayesprune.moments import Moments, parts, settings
from tests.moments.sampled import near


def logits(*shape: int, variance: float, seed: int = 0, dtype: torch.dtype = torch.float64) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator, dtype=dtype)
    return Moments(mean, variance * (0.5 + torch.rand(shape, generator=generator, dtype=dtype)))


@pytest.mark.parametrize("size", [5, 30])
def test_softmax(size):
    near(lambda x: F.softmax(x, -1), logits(2, size, variance=0.01), mean=0.01, variance=0.03, num_samples=20_000)
    near(lambda x: F.softmax(x, -1), logits(2, size, variance=0.1), mean=0.02, variance=0.25, num_samples=20_000)
    near(lambda x: F.softmax(x, -1), logits(2, size, variance=1.0), mean=0.25, variance=3.0, num_samples=20_000)


@pytest.mark.parametrize("function", [torch.log_softmax, torch.logsumexp])
def test_logarithms(function):
    near(lambda x: function(x, -1), logits(2, 5, variance=0.05), mean=0.01, variance=0.04, num_samples=20_000)
    near(lambda x: function(x, 0), logits(5, 2, variance=0.5), mean=0.03, variance=0.25, num_samples=20_000)


def test_the_second_order_mean_is_what_helps():
    x = logits(2, 30, variance=0.3)
    with settings(taylor=True), pytest.raises(AssertionError, match="mean is off"):
        near(lambda t: F.softmax(t, -1), x, mean=0.03, variance=1.0, num_samples=20_000)
    near(lambda t: F.softmax(t, -1), x, mean=0.03, variance=1.0, num_samples=20_000)


def test_the_order_of_logits_is_kept_under_any_variance():
    x = Moments(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([200.0, 0.1, 50.0]))
    p = F.softmax(x, -1).mean + 0
    assert p[0] > p[1]
    assert p[0] > p[2]


@pytest.mark.parametrize("function", [F.softmax, F.log_softmax])
def test_what_a_row_shares_cancels(function):
    x = logits(2, 5, variance=0.1)
    shifted = Moments(x.mean + 0, x.variance + 0.7, torch.full((2, 1), 0.7))
    torch.testing.assert_close(parts(function(shifted, -1))[:2], parts(function(x, -1))[:2])


def test_logsumexp_has_all_that_a_row_shares():
    x = logits(2, 5, variance=0.1)
    shifted = Moments(x.mean + 0, x.variance + 0.7, torch.full((2, 1), 0.7))
    before, after = (torch.logsumexp(t, -1, keepdim=True) for t in (x, shifted))
    torch.testing.assert_close(after.variance, before.variance + 0.7)
    torch.testing.assert_close(after.mean + 0, before.mean + 0)


def test_probabilities_of_a_row_have_a_certain_sum():
    p = torch.softmax(logits(2, 5, variance=0.5), -1)
    assert p.shared.shape == (2, 1)
    total = p.sum(-1)
    torch.testing.assert_close(total.mean + 0, torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(total.variance, torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.float32).min])
def test_masked_logits(fill):
    """They have no probability, no variance, and a gradient of 0."""
    mean, variance = (part.clone().requires_grad_() for part in parts(logits(2, 4, variance=0.2))[:2])
    mask = torch.tensor([[True, True, False, True], [False, True, True, False]])
    p = F.softmax(torch.where(mask, Moments(mean, variance), fill), -1)
    assert (p.mean[~mask] == 0).all()
    assert (p.variance[~mask] == 0).all()
    (p.variance.sum() + p.mean.square().sum()).backward()
    for grad in (mean.grad, variance.grad):
        assert grad.isfinite().all()
        assert (grad[~mask] == 0).all()
        assert (grad[mask] != 0).all()
    kept = torch.softmax(Moments(mean.detach()[0, [0, 1, 3]], variance.detach()[0, [0, 1, 3]]), -1)
    torch.testing.assert_close(p.variance[0, [0, 1, 3]], kept.variance)


def test_dtype_and_dimension():
    x = logits(2, 3, variance=0.1, dtype=torch.float32)
    half = Moments((x.mean + 0).bfloat16(), x.variance)
    assert F.softmax(half, -1, dtype=torch.float32).dtype == torch.float32
    assert F.softmax(half, -1).dtype == torch.bfloat16
    assert F.softmax(half, -1).variance.dtype == torch.float32
    with pytest.warns(UserWarning, match="Implicit dimension"):
        expected = F.softmax(x.mean + 0)
    assert F.softmax(x).mean.shape == expected.shape
    torch.testing.assert_close(F.softmax(x).mean.sum(1), torch.ones(2))


def test_gradients():
    def moments(mean, variance):
        return tuple(part for f in (F.softmax, F.log_softmax) for part in parts(f(Moments(mean, variance), -1))[:2])

    assert gradcheck(moments, [part.clone().requires_grad_() for part in parts(logits(2, 3, variance=0.3))[:2]])
