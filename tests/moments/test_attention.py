"""Softmax and attention against draws, within the errors that the rules state."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

import bayesprune as bp
from bayesprune.moments import Moments, parts, settings
from tests.moments.sampled import Sampled, near, near_shared, sampled

attend = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _written_in_plain_operations():
    """Draws go through `vmap`, which has no fused attention."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def heads(*shape: int, seed: int, variance: float = 0.02, share: bool = False) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    own = variance * (0.5 + torch.rand(shape, generator=generator, dtype=torch.float64))
    if not share:
        return Moments(mean, own)
    common = own.mean(-2, keepdim=True) * 2
    return Moments(mean, own + common, common)


def qkv(share: bool = False, num_queries: int = 4, num_keys: int = 5, num_key_heads: int = 2) -> list[Moments]:
    shapes = (2, num_queries, 16), (num_key_heads, num_keys, 16), (num_key_heads, num_keys, 3)
    return [heads(1, *shape, seed=seed, share=share) for seed, shape in enumerate(shapes)]


def total_ratio(result: Moments, found: Sampled) -> float:
    """The sum of all variances over that of the draws."""
    ratio = (result.variance.sum() / found.variance.sum()).item()
    print(f"sum of variances over that of draws: {ratio:.3f}")
    return ratio


SEEN = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
CASES = {
    "plain": (attend, {}),
    "scaled": (lambda q, k, v: attend(q, k, v, scale=0.3), {}),
    "bool mask": (lambda q, k, v: attend(q, k, v, SEEN), {}),
    "float mask": (lambda q, k, v: attend(q, k, v, SEEN.double() * 2), {}),
    "causal": (lambda q, k, v: attend(q, k, v, is_causal=True), {"num_keys": 4}),
    "grouped queries": (lambda q, k, v: attend(q, k, v, enable_gqa=True), {"num_key_heads": 1}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
def test_against_samples(name, share):
    """Single entries are off by what the noise of a query does to similar keys, which averages out."""
    function, options = CASES[name]
    inputs = qkv(share, **options)
    result, found = function(*inputs), sampled(function, *inputs, num_samples=10_000)
    assert 0.9 < total_ratio(result, found) < 1.1
    ratio = result.variance / found.variance
    assert ratio.min() > 0.75
    assert ratio.max() < 1.35
    assert ((result.mean - found.mean).abs() / found.variance.sqrt()).max() < 0.12
    if share:
        assert result.shared.shape[-2] == 1
        near_shared(result, found, tolerance=0.15)


@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
def test_written_out(share):
    """Probabilities and values are then two tensors: entries are off by more, their sum is not."""
    inputs = qkv(share)

    def function(q, k, v):
        return torch.softmax(q @ k.transpose(-2, -1) / 4, -1) @ v

    assert 0.9 < total_ratio(function(*inputs), sampled(function, *inputs, num_samples=10_000)) < 1.12


@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_of_the_three_uncertain(which):
    inputs = [x if i == which else parts(x).mean for i, x in enumerate(qkv(True))]
    assert 0.85 < total_ratio(attend(*inputs), sampled(attend, *inputs, num_samples=10_000)) < 1.15


def test_certain_values_under_a_certain_attention_are_exact():
    q, k, v = qkv(True)
    result = attend(q.mean + 0, k.mean + 0, v)
    p = torch.softmax(q.mean @ k.mean.transpose(-2, -1) / 4, -1)
    alone = v.variance - v.shared
    torch.testing.assert_close(result.variance, p.square() @ alone + v.shared.expand(1, 2, 4, 3))


def test_a_query_that_sees_no_key():
    """Zero, and certain; its gradients are finite."""
    leaves = [part.clone().requires_grad_() for x in qkv() for part in parts(x)[:2]]
    q, k, v = (Moments(*leaves[i : i + 2]) for i in (0, 2, 4))
    seen = SEEN.clone()
    seen[1] = False
    result = attend(q, k, v, seen)
    assert (result.mean[:, :, 1] == 0).all()
    assert (result.variance[:, :, 1] == 0).all()
    (result.mean.square().sum() + result.variance.sum()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_dropout_of_probabilities():
    q, k, v = qkv()
    torch.manual_seed(0)
    result = attend(q, k, v, dropout_p=0.5)
    assert result.variance.mean() > attend(q, k, v).variance.mean()


def test_nothing_is_shared_in_a_diagonal_covariance():
    with settings(covariance="diagonal"):
        assert attend(*qkv()).shared is None


def test_half_precision():
    q, k, v = (Moments((x.mean + 0).bfloat16(), x.variance.float()) for x in qkv())
    result = attend(q, k, v)
    assert result.dtype == torch.bfloat16
    assert result.variance.dtype == torch.float32


def layer(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(8, 2, **options).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.4)
    return made


PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
LAYERS = {
    "plain": ({}, {}),
    "batch first": ({"batch_first": True}, {"need_weights": False}),
    "no bias": ({"bias": False}, {"average_attn_weights": False}),
    "padding": ({"batch_first": True}, {"key_padding_mask": PADDING}),
    "causal": ({"batch_first": True}, {"attn_mask": CAUSAL, "is_causal": True}),
    "masks": ({"batch_first": True}, {"attn_mask": CAUSAL.isinf(), "key_padding_mask": PADDING}),
    "a mask for each head": ({"batch_first": True}, {"attn_mask": CAUSAL.isinf().expand(4, 5, 5)}),
    "more keys": (
        {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
        {"attn_mask": CAUSAL.isinf(), "key_padding_mask": PADDING},
    ),
    "other sizes": ({"batch_first": True, "kdim": 6, "vdim": 4}, {}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_multihead_attention_has_the_means_of_torch(name):
    options, call = LAYERS[name]
    model = layer(**options).eval()
    shape = (2, 5, 8) if options.get("batch_first") else (5, 2, 8)
    x = torch.randn(shape, dtype=torch.float64)
    inputs = x, x[..., : model.kdim], x[..., : model.vdim]
    expected, weights = model(*inputs, **call)
    result, result_weights = model(*(Moments(t, torch.full_like(t, 1e-16)) for t in inputs), **call)
    torch.testing.assert_close(result.mean + 0, expected)
    assert (result.variance >= 0).all()
    if weights is None:
        assert result_weights is None
    else:
        torch.testing.assert_close(result_weights.mean + 0, weights)


def test_multihead_attention_without_a_batch():
    model, x = layer().eval(), torch.randn(5, 8, dtype=torch.float64)
    expected, weights = model(x, x, x)
    result, result_weights = model(*(Moments(x, torch.full_like(x, 1e-16)) for _ in range(3)))
    torch.testing.assert_close(result.mean + 0, expected)
    torch.testing.assert_close(result_weights.mean + 0, weights)


@pytest.mark.parametrize("covariance", ["shared", "low_rank"])
def test_variational_multihead_attention_against_weight_samples(covariance):
    model = bp.to_variational(layer(batch_first=True).eval(), relative_std=0.05)
    x = torch.randn(2, 5, 8, dtype=torch.float64)

    def draw() -> Tensor:
        with torch.no_grad(), bp.sampling(model, "weight_sampling"):
            return model(x, x, x, need_weights=False)[0]

    expected = torch.stack([draw() for _ in range(600)]).var(0)
    with bp.sampling(model, "moments"), settings(covariance=covariance, num_directions=200):
        result = model(x, x, x, need_weights=False)[0]
    ratio = (result.variance / expected).median().item()
    print(ratio)
    assert 0.85 < ratio < 1.15


def test_static_keys_are_refused():
    x = Moments(torch.ones(2, 1, 4), torch.ones(2, 1, 4))
    weight = torch.ones(12, 4)
    with pytest.raises(NotImplementedError, match="no rule for static_k"):
        F.multi_head_attention_forward(
            x, x, x, 4, 2, weight, None, None, None, False, 0.0, torch.ones(4, 4), None, static_k=torch.ones(2, 2, 2)
        )


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
    for function in (torch.softmax, Tensor.softmax, torch.log_softmax, Tensor.log_softmax):
        assert function(half, -1, torch.float32).dtype == torch.float32
    with pytest.warns(UserWarning, match="Implicit dimension"):
        expected = F.softmax(x.mean + 0)
    assert F.softmax(x).mean.shape == expected.shape
    torch.testing.assert_close(F.softmax(x).mean.sum(1), torch.ones(2))


def test_gradients():
    def moments(mean, variance):
        return tuple(part for f in (F.softmax, F.log_softmax) for part in parts(f(Moments(mean, variance), -1))[:2])

    assert gradcheck(moments, [part.clone().requires_grad_() for part in parts(logits(2, 3, variance=0.3))[:2]])
