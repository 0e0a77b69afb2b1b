import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bayesprune as bp
from bayesprune.moments import Moments, parts


class Net(nn.Module):
    """Convolution, batch norm, a pool by the method, a linear layer; its output is nested."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 4)

    def forward(self, x, *, scale=1.0):
        hidden = F.relu(self.norm(self.conv(x)))
        return {"logits": scale * self.linear(hidden.mean((2, 3))), "hidden": (hidden, None), "scale": scale}


def net(**options):
    torch.manual_seed(0)
    return bp.to_variational(Net(), **options)


def eager(model, *args, **kwargs):
    with bp.sampling(model, "moments"):
        return model(*args, **kwargs)


def loss(output):
    mean, variance, _ = parts(output["logits"])
    return mean.square().sum() + (100 * variance).sum()


def assert_same(got, expected, **tolerance):
    for one, other in zip(parts(got), parts(expected), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **tolerance)


class Counter:
    """A backend that counts what it compiles."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("covariance", ["shared", "diagonal", "low_rank"])
def test_output_gradients_and_buffers_are_those_of_the_eager_pass(covariance, is_training):
    model, x = net().train(is_training), torch.randn(2, 3, 5, 5)
    other = copy.deepcopy(model)
    forward = bp.prediction.compile_moments(model, backend="eager")
    with bp.moments.settings(covariance=covariance):
        torch.manual_seed(1)
        got = forward(x, scale=2.0)
        torch.manual_seed(1)
        expected = eager(other, x, scale=2.0)
    assert list(got) == ["logits", "hidden", "scale"]
    assert got["hidden"][1] is None
    assert got["scale"] == 2.0
    assert_same(got["logits"], expected["logits"])
    assert_same(got["hidden"][0], expected["hidden"][0])
    if covariance == "low_rank":
        torch.testing.assert_close(got["logits"].directions, expected["logits"].directions)
    loss(got).backward()
    loss(expected).backward()
    for (name, parameter), same in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, same.grad, rtol=1e-5, atol=1e-5, msg=name)
    for buffer, same in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, same)
        assert not buffer.requires_grad


def test_compiled_by_inductor():
    torch.manual_seed(0)
    model, x = bp.to_variational(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU())), torch.randn(4, 3)
    other = copy.deepcopy(model)
    got, expected = bp.prediction.compile_moments(model)(x), eager(other, x)
    assert_same(got, expected, rtol=1e-5, atol=1e-6)
    for output in (got, expected):
        (parts(output).mean.square().sum() + (100 * parts(output).variance).sum()).backward()
    for (name, parameter), same in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, same.grad, rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(model[1].running_var, other[1].running_var)


def test_compiles_once_for_each_shape_mode_and_setting():
    model = bp.to_variational(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)))
    backend, x = Counter(), torch.randn(2, 3)
    forward = bp.prediction.compile_moments(model, backend=backend)

    def count(call, *args, **kwargs):
        before = backend.count
        call(*args, **kwargs)
        call(*args, **kwargs)
        return backend.count - before

    assert count(forward, x) == 1
    assert count(forward, x[:1]) == 1
    assert count(forward, input=x.clone().requires_grad_()) == 1
    with bp.moments.settings(covariance="diagonal"):
        assert count(forward, x) == 1
    with torch.no_grad():
        assert count(forward, x) == 1
    model.eval()
    assert count(forward, x) == 1
    model[0].weight.requires_grad_(False)
    assert count(forward, x) == 1
    bp.prune_weights(model.requires_grad_(True), "weights=0.5")
    assert count(forward, x) == 1
    assert_same(forward(x), eager(model, x))


def test_training_with_it_follows_the_eager_training():
    model, x = net().train(), torch.randn(4, 3, 5, 5)
    other = copy.deepcopy(model)
    for trained, forward in (
        (model, bp.prediction.compile_moments(model, backend="eager")),
        (other, lambda x: eager(other, x)),
    ):
        optimizer = torch.optim.SGD(trained.parameters(), lr=1e-2)
        for _ in range(3):
            loss(forward(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, parameter), same in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, same, rtol=1e-5, atol=1e-5, msg=name)
    for buffer, same in zip(model.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(buffer, same)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Mixed(nn.Module):
    """A branch without gradients and a custom function."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3))

    def forward(self, x):
        with torch.no_grad():
            offset = self.frozen * self.frozen.exp() + self.scale
        return self.linear(x + offset + self.frozen.detach().exp()) * _Doubled.apply(self.scale)


def test_gradients_stop_and_pass_where_the_forward_says():
    torch.manual_seed(0)
    model = bp.to_variational(Mixed())
    other, x = copy.deepcopy(model), torch.randn(2, 3)
    for output in (bp.prediction.compile_moments(model, backend="eager")(x), eager(other, x)):
        (parts(output).mean.sum() + parts(output).variance.sum()).backward()
    assert other.frozen.grad is None
    assert model.frozen.grad is None or not model.frozen.grad.any()
    torch.testing.assert_close(model.scale.grad, other.scale.grad)
    torch.testing.assert_close(model.linear.weight.grad, other.linear.weight.grad)


def test_uncertain_and_named_inputs():
    model = bp.to_variational(nn.Linear(3, 2))
    x = Moments(torch.randn(5, 3), torch.rand(5, 3))
    got = bp.prediction.compile_moments(model, backend="eager")(input=x)
    assert_same(got, eager(model, x))


def test_autocast_is_recorded_once():
    model, x = bp.to_variational(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))), torch.randn(4, 8)
    forward = bp.prediction.compile_moments(model, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = forward(x), eager(model, x)
    assert got.dtype == torch.bfloat16
    assert got.variance.dtype == torch.float32
    assert_same(got, expected)
    assert forward(x).dtype == torch.float32


def test_training_goes_on_after_inference_mode():
    model, x = net().eval(), torch.randn(2, 3, 5, 5)
    forward = bp.prediction.compile_moments(model, backend="eager")
    with torch.inference_mode():
        first = parts(forward(x)["logits"]).mean.clone()
    output = forward(x)
    loss(output).backward()
    assert torch.equal(first, parts(output["logits"]).mean)
    assert model.conv.weight_log_std.grad.any()


def test_model_output_keeps_its_type():
    outputs = pytest.importorskip("transformers.modeling_outputs")

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return outputs.SequenceClassifierOutput(logits=self.linear(x), hidden_states=(x,))

    model, x = bp.to_variational(Classifier()), torch.randn(4, 3)
    got = bp.prediction.compile_moments(model, backend="eager")(x)
    assert isinstance(got, outputs.SequenceClassifierOutput)
    assert_same(got.logits, eager(model, x).logits)
    assert torch.equal(got.hidden_states[0], x)
    assert got.loss is None


def test_what_cannot_be_compiled_is_told():
    with pytest.raises(ValueError, match="without variational layers"):
        bp.prediction.compile_moments(nn.Linear(2, 2), backend="eager")(torch.randn(1, 2))

    class Odd(nn.Linear):
        def forward(self, x, cache=None):
            return super().forward(x), object()

    model = bp.to_variational(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="input with a set in it.*register"):
        bp.prediction.compile_moments(model, backend="eager")({1})
    model.append(Odd(2, 2))
    with pytest.raises(TypeError, match="output with a object in it"):
        bp.prediction.compile_moments(model, backend="eager")(torch.randn(1, 2))


def test_torch_compile_of_the_model_falls_back_with_the_right_results():
    torch.manual_seed(0)
    model, x = bp.to_variational(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), torch.randn(5, 3)
    other = copy.deepcopy(model)
    backend = Counter()
    with bp.sampling(model, "moments"):
        got = torch.compile(model, backend=backend)(x)
    assert not backend.count
    expected = eager(other, x)
    assert_same(got, expected)
    for output in (got, expected):
        (parts(output).mean.square().sum() + (100 * parts(output).variance).sum()).backward()
    for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, same.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[1].running_mean, other[1].running_mean)
