import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bayesprune as bp
from bayesprune.errors import UnsupportedFunctionError
from bayesprune.moments import Moments, parts, register_elementwise, register_rule
from bayesprune.moments.elementwise import apply
from bayesprune.moments.settings import current
from bayesprune.moments.tensor import is_uncertain
from tests.moments.sampled import exact, near


def example(*shape: int, seed: int = 0) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    return Moments(mean, torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1)


def test_looks_like_a_tensor():
    x = Moments(torch.ones(2, 3), torch.full((3,), 0.5))
    assert isinstance(x, torch.Tensor)
    assert x.shape == x.size() == (2, 3)
    assert (x.dtype, x.device.type, x.dim(), x.ndim, x.numel(), len(x)) == (torch.float32, "cpu", 2, 2, 6, 2)
    assert x.is_floating_point()
    assert torch.equal(x.mean, torch.ones(2, 3))
    assert torch.equal(x.variance, torch.full((2, 3), 0.5))
    assert type(x.mean + 0) is torch.Tensor
    assert type(x.variance) is torch.Tensor
    assert repr(x).startswith("Moments(mean=tensor([[1., 1., 1.]")
    assert x[0, 1:].shape == (2,)
    assert x.to(torch.float64).dtype == torch.float64
    assert [part.shape for part in x] == [(3,), (3,)]


def test_variances_are_never_narrow():
    x = Moments(torch.ones(3, dtype=torch.bfloat16), torch.full((3,), 1e-9))
    assert x.dtype == torch.bfloat16
    assert x.variance.dtype == torch.float32
    assert (2 * x).dtype == torch.bfloat16
    assert ((2 * x).variance > 0).all()
    half = x.to(torch.float16)
    assert (half.dtype, half.variance.dtype) == (torch.float16, torch.float32)


def test_mean_is_a_tensor_and_a_method():
    """Models call `x.mean(dim)`; users read `x.mean`."""
    x = example(4, 3)
    reduced = x.mean(1)
    assert isinstance(reduced, Moments)
    torch.testing.assert_close(reduced.mean, parts(x).mean.mean(1))
    torch.testing.assert_close(reduced.variance, x.variance.sum(1) / 9)
    assert x.mean(dim=(0, 1), keepdim=True).shape == (1, 1)


def test_mean_and_variance_are_differentiable():
    mean, log_std = torch.randn(3, 2, requires_grad=True), torch.zeros(3, 2, requires_grad=True)
    y = (Moments(mean, (2 * log_std).exp()) * 3).sum()
    (y.mean + y.variance).backward()
    torch.testing.assert_close(mean.grad, torch.full((3, 2), 3.0))
    torch.testing.assert_close(log_std.grad, torch.full((3, 2), 18.0))


def test_detach_cuts_the_graph():
    x = Moments(torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)).detach()
    assert not x.mean.requires_grad
    assert not x.variance.requires_grad


def test_a_certain_tensor_runs_on_its_mean_bit_for_bit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 4), nn.Softmax(-1)).eval()
    x = torch.randn(2, 3, 8, 8)
    output = model(Moments(x))
    assert isinstance(output, Moments)
    assert output.variance is None
    assert not is_uncertain(output)
    assert torch.equal(output.mean, model(x))


def test_copies():
    x = example(3)
    for made in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert torch.equal(made.mean, x.mean)
        assert torch.equal(made.variance, x.variance)


def test_refuses_integers():
    with pytest.raises(TypeError, match=r"mean of dtype torch.int64; expected a floating-point tensor"):
        Moments(torch.ones(2, dtype=torch.long))


class Unruly(nn.Module):
    def forward(self, x):
        return torch.linalg.svdvals(x)


def test_a_missing_rule_names_function_and_module():
    model = nn.Sequential(nn.Identity(), nn.ModuleDict({"inner": Unruly()})["inner"])
    with pytest.raises(UnsupportedFunctionError) as caught:
        model(example(3, 3))
    message = str(caught.value)
    assert "linalg_svdvals" in message
    assert "module 1 (Unruly)" in message
    assert "register_rule" in message
    with pytest.raises(UnsupportedFunctionError, match="outside any module"):
        torch.linalg.svdvals(example(3, 3))


def test_registered_rules_are_used(monkeypatch):
    monkeypatch.setattr("bayesprune.moments.registry._RULES", {})

    @register_rule(torch.flipud)
    def flipud(x):
        mean, variance, _ = parts(x)
        return Moments(mean.flipud(), variance.flipud())

    register_elementwise(torch.sinc)
    x = example(4)
    assert torch.equal(torch.flipud(x).variance, x.variance.flipud())
    near(torch.sinc, Moments(x.mean, x.variance * 0.1), mean=0.02, variance=0.05)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x,
        lambda x: x * (2 * x + 1),
        lambda x: x.pow(2) - 3 * x,
        lambda x: x + 0.1 * x * x * x,
        lambda x: (x - 1) * (x + 1) + x,
    ],
)
def test_what_is_made_of_one_tensor_stays_a_function_of_it(function):
    """Polynomials up to degree 4 are exact by five nodes; as independent factors they would be far off."""
    x = example(7)
    exact(function, x)


def test_lazy_functions_are_computed_once_and_when_needed():
    calls = []

    def counted(t):
        calls.append(1)
        return t.sin()

    x = example(3)
    y = apply(x, counted)
    assert not calls
    first = y.variance
    num_calls = len(calls)
    assert num_calls > 0
    assert y.variance is first
    assert len(calls) == num_calls


def test_in_place_functions_leave_other_tensors_alone():
    x = example(5)
    before = x.variance.clone()
    y = x.sigmoid()
    z = x.mul_(y)
    assert z is x
    expected = example(5)
    product = expected * expected.sigmoid()
    torch.testing.assert_close(x.variance, product.variance)
    torch.testing.assert_close(y.variance, example(5).sigmoid().variance)
    assert not torch.equal(before, x.variance)
    F.relu(x, inplace=True)
    assert (x.mean >= 0).all()


def test_in_place_refusals():
    with pytest.raises(ValueError, match=r"in-place result has shape \(2, 3\); expected \(3,\)"):
        example(3).add_(example(2, 3))


def test_settings_refuse():
    with pytest.raises(ValueError, match="covariance is 'full'; expected one of shared, diagonal, low_rank"):
        bp.moments.settings(covariance="full").__enter__()
    with pytest.raises(ValueError, match="num_nodes is 1; expected at least 2"):
        bp.moments.settings(num_nodes=1).__enter__()
    with pytest.raises(TypeError, match="tailor"):
        bp.moments.settings(tailor=True).__enter__()


def test_settings_are_restored():
    seen = []

    def fail():
        seen.append(current())
        raise RuntimeError

    with pytest.raises(RuntimeError), bp.moments.settings(taylor=True):
        fail()
    assert seen[0].taylor
    assert not current().taylor


def test_taylor_is_the_first_order_rule():
    x = example(6)
    with bp.moments.settings(taylor=True):
        y = F.silu(x)
    m = x.mean.clone().requires_grad_()
    F.silu(m).sum().backward()
    torch.testing.assert_close(y.mean, F.silu(x.mean))
    torch.testing.assert_close(y.variance, m.grad.square() * x.variance)
