"""Steps on a GPU that is not there: no operand lies elsewhere, and nothing waits for the device.

Tensors without data (`FakeTensorMode`) say on which device each operation would run: operands that do not belong
together raise, as does a number that is read from the device. The autograd engine needs a driver for them, so that the
pieces of the backward pass are called as it calls them.
"""

import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

import bayesprune as bp
from bayesprune import estimators
from bayesprune.estimators import draws, factored, functions, local, squares, together
from bayesprune.foundation import noise
from bayesprune.layers import masks, named_posteriors
from bayesprune.prune.scores import weights
from bayesprune.prune.weights import floors, prune
from bayesprune.train import kl
from bayesprune.train.attachment import ATTACHMENTS
from tests.cases import structures

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Tensors made inside have no data; the library takes them for ordinary ones."""
    for module in (draws, functions):
        monkeypatch.setattr(module, "is_plain", lambda *tensors: True)
    monkeypatch.setattr(noise, "can_repeat", lambda device: True)
    monkeypatch.setattr(noise, "draw_seed", lambda: 1)
    monkeypatch.setattr(noise, "coming_seeds", lambda count: [1] * count)
    monkeypatch.setattr(noise, "_seeded", lambda device, seed: None)  # a generator of a GPU needs its driver
    monkeypatch.setattr(noise, "_table_on", lambda device: torch.empty(noise._TABLE + noise.MAX_AT_ONCE, device=device))
    monkeypatch.setattr(masks, "_masked", weakref.WeakSet())  # layers of other tests have data
    caches = [bp.train.joined.spread, bp.train.joined._offsets, together._row_of_unit, together._first_units]
    caches += [factored._tiny, factored._ones]
    for cache in caches:
        cache.cache_clear()
    with FakeTensorMode():
        yield
        for attachment in list(ATTACHMENTS):
            attachment.detach()
    for cache in caches:
        cache.cache_clear()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, groups=1, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.hidden, self.head = nn.Conv2d(8, 8, 3, groups=2), nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.grouped(self.norm(self.conv(x)).relu()).flatten(2).mT
        return self.head(self.hidden(x).relu()).mean(1)


def on_gpu(std, estimator, dtype=torch.float32):
    """A variational network whose tensors lie on the GPU."""
    with torch.utils._python_dispatch._disable_current_modes():
        model = bp.to_variational(Net(), std=std, estimator=estimator)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                own = dtype if not name.endswith("log_std") else torch.float32
                module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=own, device=GPU))
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)
    return model


@contextmanager
def autocast(dtype):
    """bfloat16 as under `torch.autocast`, which asks for a driver first."""
    if dtype is None:
        yield
        return
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_what_would_be_noticed(gpu):
    with pytest.raises(RuntimeError, match="device"):
        torch.empty(2, device=GPU) + torch.empty(2)
    with pytest.raises(DataDependentOutputException):
        torch.empty(2, device=GPU).sum().item()


@structures
@pytest.mark.parametrize("estimator", ["weight_sampling", "local_reparameterization", "flipout"])
@pytest.mark.parametrize("half", [None, torch.bfloat16, "weights"])
def test_forward(gpu, std, estimator, half, monkeypatch):
    model = on_gpu(std, estimator, torch.bfloat16 if half == "weights" else torch.float32)
    monkeypatch.setattr(kl, "_sizes", lambda model: {id(p.mean): kl._Size(1.0, 1) for p in named_posteriors(model)})
    bp.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, num_data=10)
    x = torch.empty(4, 3, 6, 6, device=GPU, dtype=torch.bfloat16 if half == "weights" else torch.float32)
    for _ in range(2):  # drawn when asked for, then ahead
        with autocast(None if half == "weights" else half):
            output = model(x)
        assert output.device == GPU
        assert output.dtype == (torch.float32 if half is None else torch.bfloat16)


class Context:
    """What the engine hands a function."""

    def __init__(self, *inputs):
        self.needs_input_grad = [isinstance(value, torch.Tensor) for value in inputs]

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def set_materialize_grads(self, value):
        pass


def runs(function, *inputs):
    """Forward and backward of an autograd function, and the gradients' places."""
    context = Context(*inputs)
    with torch.no_grad():
        outputs = function.forward(context, *inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = function.backward(context, *[torch.empty_like(output) for output in outputs])
    assert len(found) == len(inputs)
    for gradient, value in zip(found, inputs, strict=True):
        if isinstance(value, torch.Tensor):
            assert (gradient.shape, gradient.dtype, gradient.device) == (value.shape, value.dtype, GPU)


@structures
def test_backward_of_draws(gpu, std):
    posteriors = [p.layer.posterior(p.parameter) for p in named_posteriors(on_gpu(std, "weight_sampling"))]
    assert all(map(estimators.has_seeds, posteriors))
    kinds = [draws._kind_of(posterior, seed) for seed, posterior in enumerate(posteriors)]
    runs(draws._Draws, kinds, *[t for mean, parts, mask in posteriors for t in (mean, mask, *parts)])


@structures
@pytest.mark.parametrize("name", ["conv", "grouped", "hidden"])
def test_backward_of_local_noise(gpu, std, name, monkeypatch):
    layer = getattr(on_gpu(std, "local_reparameterization"), name)
    x = torch.empty((4, 7, 8) if name == "hidden" else (4, layer.in_channels, 6, 6), device=GPU)
    weight, bias = layer.posterior("weight"), layer.posterior("bias") if layer.bias is not None else None
    operation, of_bias = layer.bilinear(), None if bias is None else bias.log_stds[0]
    output = layer.operation(x, weight.mean, None)
    draw = estimators.seeded.SeededNoise.of(output, operation.kind.feature_dim)
    if operation.std_factors(weight.log_stds) is None:
        runs(local._FullNoise, output, (draw, operation, weight.mean.shape), x, of_bias, *weight.log_stds)
        return
    parts = weight.log_stds if of_bias is None else (*weight.log_stds, of_bias)
    runs(squares._Squares, *parts)
    options = factored.FactoredNoise(draw, operation, tuple(weight.mean.shape[2:]))
    inputs = output, options, x, *operation.std_factors(weight.log_stds), of_bias
    for kept in (0, factored._KEPT_AT_MOST):
        monkeypatch.setattr(factored, "_KEPT_AT_MOST", kept)
        runs(factored.LinearNoise if name == "hidden" else factored.ConvNoise, *inputs)


@structures
@pytest.mark.parametrize("warmup", [0.0, 0.5])
@pytest.mark.parametrize("is_scaled", [False, True])
def test_hook(gpu, std, is_scaled, warmup, monkeypatch):
    """Also with gradients that a gradient scaler has multiplied, and while the KL warms up."""
    model = on_gpu(std, "weight_sampling")
    monkeypatch.setattr(kl, "_sizes", lambda model: {id(p.mean): kl._Size(1.0, 1) for p in named_posteriors(model)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0, foreach=True)
    attachment = bp.attach(optimizer, model, num_data=10, num_steps=100, warmup=warmup)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        if is_scaled:
            optimizer.grad_scale, optimizer.found_inf = torch.empty((), device=GPU), torch.empty((), device=GPU)
        attachment._before_step(optimizer, (optimizer,), {})
        attachment._after_step(optimizer)
    assert all(tensor.device == GPU for p in model.parameters() for tensor in (p, p.grad) if tensor is not None)


@structures
def test_scores(gpu, std):
    model = on_gpu(std, "weight_sampling")
    scores = [*bp.signal_to_noise(model).values()]
    scores += [score(p) for score in (weights.magnitude, weights.SNRScore(0.5)) for p in named_posteriors(model)]
    assert {score.device for score in scores} == {GPU}


@structures
@pytest.mark.parametrize("target", ["weights=0.5", "snr=1", "2:4", {"head": 0.5}])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_single_weights_go_without_a_copy_of_their_scores(gpu, std, target, scope, monkeypatch):
    """What decides how many go is read as few numbers, of all tensors at once: no score is NaN, all floors are met."""
    reads = []

    def reads_as(number):
        def numbers_of(tensors):
            assert all(tensor.numel() == 1 and tensor.device == GPU for tensor in tensors)
            reads.append(len(tensors))
            return [number] * len(tensors)

        return numbers_of

    monkeypatch.setattr(prune, "numbers_of", reads_as(0))
    monkeypatch.setattr(floors, "numbers_of", reads_as(10**6))
    model = on_gpu(std, "weight_sampling")
    for _ in range(2):
        bp.prune_weights(model, target, scope=scope)
    masks = [p.mask for p in named_posteriors(model) if p.mask is not None]
    assert {mask.device for mask in masks} == {GPU}
    assert len(masks) == (4 if target != "2:4" else 3)
    assert len(reads) <= 12, "they do not grow with the number of layers"
