"""Products of two tensors against draws; exact for independent entries, and for what one operand shares."""

import pytest
import torch
from torch.autograd import gradcheck

from bayesprune.moments import Moments, parts, settings
from tests.moments.sampled import exact, near_shared, sampled


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uncertain(*shape: int, seed: int = 0, shared: tuple[int, ...] | None = None) -> Moments:
    own = 0.1 + 0.3 * rand(*shape, seed=seed + 50).abs()
    if shared is None:
        return Moments(rand(*shape, seed=seed), own)
    common = 0.1 + 0.3 * rand(*shared, seed=seed + 70).abs()
    return Moments(rand(*shape, seed=seed), own + common, common)


def certain(*shape: int, seed: int = 0) -> torch.Tensor:
    return rand(*shape, seed=seed)


CASES = {
    "matrices": (torch.matmul, (2, 3), (3, 2)),
    "operator": (lambda a, b: a @ b, (2, 2, 3), (2, 3, 2)),
    "broadcast": (torch.matmul, (2, 1, 2, 3), (2, 3, 2)),
    "matrix and vector": (torch.mv, (2, 3), (3,)),
    "vector and matrix": (torch.matmul, (3,), (2, 3, 2)),
    "vectors": (torch.dot, (3,), (3,)),
    "mm": (torch.mm, (2, 3), (3, 2)),
    "bmm": (torch.bmm, (2, 2, 3), (2, 3, 2)),
    "outer": (torch.outer, (2,), (3,)),
    "einsum": (lambda a, b: torch.einsum("bqhd, bkhd -> bhqk", a, b), (1, 2, 2, 3), (1, 3, 2, 3)),
    "einsum, ellipsis": (lambda a, b: torch.einsum("...d,...de->...e", a, b), (2, 2, 3), (2, 3, 2)),
    "einsum, no arrow": (lambda a, b: torch.einsum("ij,jk", [a, b]), (2, 3), (3, 2)),
    "einsum, sum": (lambda a, b: torch.einsum("ij,ij->", a, b), (2, 3), (2, 3)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_independent_entries(name, which):
    function, *shapes = CASES[name]
    a, b = (
        (certain if which == other else uncertain)(*shape, seed=seed)
        for seed, (shape, other) in enumerate(zip(shapes, ("second", "first"), strict=True))
    )
    exact(function, a, b, num_samples=50_000)


def test_einsum_of_one_operand():
    x = uncertain(2, 3, 4)
    result = exact(lambda t: torch.einsum("abc->ca", t), x, num_samples=20_000)
    assert result.shape == (4, 2)


def test_with_an_addend():
    a, b, c = uncertain(2, 3), uncertain(3, 2, seed=1), uncertain(2, 2, seed=2)
    exact(lambda x, y, z: torch.addmm(z, x, y, beta=0.5, alpha=2.0), a, b, c, num_samples=50_000)
    exact(lambda x, y, z: torch.baddbmm(z, x[None], y[None]), a, b, c, num_samples=50_000)
    exact(lambda y, x, z: torch.baddbmm(z, x[None], y[None]), b, parts(a).mean, parts(c).mean, num_samples=50_000)


@pytest.mark.parametrize("weights", [certain, uncertain])
def test_sums_over_tokens_that_share(weights):
    """Attention times values: what the tokens share does not average away."""
    p, values = weights(1, 2, 5), uncertain(1, 5, 2, seed=1, shared=(1, 1, 2))
    exact(torch.matmul, p, values, num_samples=50_000)
    exact(torch.matmul, uncertain(1, 2, 5, seed=2, shared=(1, 2, 1)), weights(1, 5, 2), num_samples=50_000)


def test_what_queries_and_keys_leave_shared():
    """Exact along the keys, which softmax takes out."""
    q, k = uncertain(1, 3, 2, shared=(1, 1, 2)), uncertain(1, 4, 2, seed=1, shared=(1, 1, 2))
    result = q @ k.transpose(1, 2)
    assert result.shared.shape == (1, 3, 1)
    near_shared(result, sampled(lambda a, b: a @ b.transpose(1, 2), q, k), tolerance=0.03)


def test_means_over_tokens_are_tokens_again():
    p, values = certain(1, 3, 5), uncertain(1, 5, 2, seed=1, shared=(1, 1, 2))
    result = p @ values
    assert result.shared.shape == (1, 1, 2)
    near_shared(result, sampled(torch.matmul, p, values), tolerance=0.03)


@pytest.mark.parametrize("weight", [certain(3, 2, seed=1), uncertain(3, 2, seed=1)], ids=["certain", "uncertain"])
def test_tokens_through_a_matrix_stay_tokens(weight):
    x = uncertain(2, 4, 3, shared=(2, 1, 3))
    result = x @ weight
    assert result.shared.shape == (2, 1, 2)
    near_shared(result, sampled(torch.matmul, x, weight), tolerance=0.03)


def test_einsum_is_matmul():
    q, k = uncertain(2, 2, 3, 4, shared=(2, 2, 1, 4)), uncertain(2, 2, 5, 4, seed=1, shared=(2, 2, 1, 4))
    for got, expected in zip(parts(torch.einsum("bhqd,bhkd->bhqk", q, k)), parts(q @ k.transpose(-2, -1)), strict=True):
        torch.testing.assert_close(got, expected)


def test_nothing_is_shared_in_a_diagonal_covariance():
    with settings(covariance="diagonal"):
        result = uncertain(1, 3, 2) @ uncertain(1, 2, 4, seed=1)
    assert result.shared is None


def test_variances_keep_their_precision():
    a, b = (Moments(rand(2, 2).bfloat16(), torch.full((2, 2), 1e-30)) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        result = a @ b
    assert result.dtype == torch.bfloat16
    assert result.variance.dtype == torch.float32
    assert (result.variance > 0).all()


def test_gradients():
    def moments(ma, va, mb, vb):
        return parts(Moments(ma, va) @ Moments(mb, vb))[:2]

    given = [uncertain(2, 3), uncertain(3, 2, seed=1)]
    leaves = [part.clone().requires_grad_() for x in given for part in parts(x)[:2]]
    assert gradcheck(moments, leaves)


@pytest.mark.parametrize("equation", ["ii,ij->j", "ij,jk,kl->il"])
def test_an_einsum_without_a_rule_is_told(equation):
    x = uncertain(2, 2)
    operands = [x] * (equation.count(",") + 1)
    with pytest.raises(NotImplementedError, match="has no rule; expected two operands"):
        torch.einsum(equation, *operands)


def test_certain_matrix_on_the_left():
    matrix = certain(2, 3)
    exact(lambda b: matrix @ b, uncertain(3, 2), num_samples=20_000)
    exact(lambda b: matrix.matmul(b), uncertain(3, 2), num_samples=20_000)


def test_groups_of_rows_have_matrices_of_their_own():
    """As experts run: rows sorted by group, and the numbers where groups end."""
    x, w, ends = uncertain(6, 4), uncertain(3, 4, 2, seed=1), torch.tensor([1, 1, 5], dtype=torch.int32)
    result = torch._grouped_mm(x, w, offs=ends)
    expected = torch.cat([x[:1] @ w[0], x[1:5] @ w[2], torch.zeros(1, 2).double()])
    torch.testing.assert_close(parts(result).mean, parts(expected).mean)
    torch.testing.assert_close(result.variance, expected.variance)
    only = torch._grouped_mm(x, parts(w).mean, offs=ends)
    torch.testing.assert_close(only.variance[0], x.variance[0] @ parts(w).mean[0].square())
    with pytest.raises(NotImplementedError, match="_grouped_mm has a rule for groups of rows"):
        torch._grouped_mm(x[None], w)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: torch.tensordot(a, b, dims=1),
        lambda a, b: torch.tensordot(a, b.T, dims=([1], [1])),
        lambda a, b: torch.inner(a, b.T),
        lambda a, b: torch.linalg.vecdot(a, b.T),
        lambda a, b: torch.linalg.cross(a, b.T),
    ],
    ids=["tensordot", "tensordot of two lists", "inner", "vecdot", "cross"],
)
def test_sums_of_products(function):
    exact(function, uncertain(3, 3), uncertain(3, 3, seed=1))
