"""The estimators as one node of the graph, against the plain functions with the same noise."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bayesprune as bp
from bayesprune import estimators
from bayesprune.foundation import device
from bayesprune.foundation.kinds import kind_of
from tests.cases import LAYERS, LayerCase, layers, structures

RANDOM = ("weight_sampling", "local_reparameterization")
random_estimators = pytest.mark.parametrize("estimator", RANDOM)
TOLERANCE = {torch.float64: 5e-6, torch.float32: 2e-4, torch.bfloat16: 0.05}  # of float32 stds in all


@pytest.fixture(params=["processor", "launched"])
def paths(request, monkeypatch):
    """The paths of a processor, and those of devices on which kernels are launched."""
    if request.param == "launched":
        monkeypatch.setattr(device, "CHEAP_CALLS", set())


def variational(case, std, dtype):
    layer = bp.to_variational(case.layer(dtype), std=std, relative_std=0.7).train()
    for name in layer.active_names():
        for part in layer.log_std_parts(name):
            part.data += 0.5 * torch.randn_like(part)
    return layer


def plain(layer, estimator, x, **kwargs):
    """The reference: Gaussians whose stds are computed, in the graph."""
    posteriors, operation = layer.posteriors(), layer.bilinear(**kwargs)
    return estimators.run(
        estimator, operation, x, posteriors["weight"], posteriors.get("bias"), kind_of(layer).feature_dim
    )


def fused(layer, estimator, x, **kwargs):
    with bp.sampling(layer, estimator):
        return layer(x, **kwargs)


def assert_same(layer, run, reference, x, dtype):
    """Values and gradients of a function of two draws, with the same noise."""
    found = []
    for function in (run, reference):
        torch.manual_seed(3)
        inputs = [x.clone().requires_grad_(), x.flip(0).clone().requires_grad_()]
        outputs = [function(x) for x in inputs]
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(output.shape, dtype=dtype, generator=generator) for output in outputs]
        loss = sum((output.square() * weight).sum() for output, weight in zip(outputs, weights, strict=True))
        parameters = [p for p in layer.parameters() if p.requires_grad]
        found.append((*outputs, *torch.autograd.grad(loss, inputs + parameters)))
    assert [output.stride() for output in found[0][:2]] == [output.stride() for output in found[1][:2]]
    for got, wanted in zip(*found, strict=True):
        assert got.dtype == wanted.dtype
        rounding = 1e-6 if dtype == torch.float32 else 0.0  # of sums that nearly cancel
        assert (got - wanted).norm() <= TOLERANCE[dtype] * wanted.norm() + rounding, (got, wanted)


@structures
@random_estimators
@layers
def test_values_and_gradients(case, estimator, std, paths):
    dtype = (torch.float64, torch.float32)[LAYERS.index(case) % 2]
    layer = variational(case, std, dtype)
    assert_same(
        layer,
        lambda x: fused(layer, estimator, x, **case.kwargs),
        lambda x: plain(layer, estimator, x, **case.kwargs),
        case.input(dtype),
        dtype,
    )


@pytest.mark.parametrize("change", ["masked", "gated", "frozen mean", "frozen std", "channels last", "bfloat16"])
@random_estimators
def test_what_else_a_layer_may_be(change, estimator, paths):
    """Masks, gates and half precision may take the plain path; the result must be the same."""
    case = next(case for case in LAYERS if case.name == "conv2d_groups")
    layer, x = variational(case, "rank_one", torch.float32), case.input(torch.float32)
    if change == "masked":
        layer.set_mask("weight", torch.rand_like(layer.weight) > 0.5)
    elif change == "gated":
        bp.gates.add_weight_gates(layer)
        layer.eval()
    elif change == "frozen mean":
        layer.weight.requires_grad_(False)
    elif change == "frozen std":
        layer.weight_row_log_std.requires_grad_(False)
    elif change == "channels last":
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    else:
        layer, x = layer.bfloat16(), x.bfloat16()
    if change == "gated":
        layer.weight_gate.logits.requires_grad_(False)
    dtype = x.dtype
    assert_same(layer, lambda x: fused(layer, estimator, x), lambda x: plain(layer, estimator, x), x, dtype)


@structures
@random_estimators
def test_large_weights_draw_the_noise_of_the_plain_path(estimator, std, paths):
    """The noise of many numbers comes from a table, by blocks."""
    layer = bp.to_variational(nn.Linear(300, 400), std=std).train()
    x = torch.randn(64, 300)
    assert_same(layer, lambda x: fused(layer, estimator, x), lambda x: plain(layer, estimator, x), x, torch.float32)


@structures
@random_estimators
def test_second_derivatives_are_those_of_the_plain_path(estimator, std, paths):
    layer = variational(LAYERS[3], std, torch.float64).double()
    found = []
    for run in (fused, plain):
        torch.manual_seed(5)
        x = LAYERS[3].input().requires_grad_()
        (gradient,) = torch.autograd.grad(run(layer, estimator, x).tanh().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), list(layer.parameters()), allow_unused=True))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(0 if got is None else got, 0 if wanted is None else wanted, rtol=1e-8, atol=1e-10)


@structures
@random_estimators
def test_checkpointing_and_a_retained_graph_repeat_the_noise(estimator, std):
    layer, x = variational(LAYERS[3], std, torch.float64), LAYERS[3].input()
    parameters, gradients = list(layer.parameters()), []
    for use in (False, True):
        torch.manual_seed(5)
        with bp.sampling(layer, estimator):
            output = checkpoint(layer, x, use_reentrant=False) if use else layer(x)
            loss = output.square().sum()
            gradients.append(torch.autograd.grad(loss, parameters, retain_graph=True))
            if not use:
                gradients.append(torch.autograd.grad(loss, parameters))
    for others in gradients[1:]:
        assert all(map(torch.equal, gradients[0], others))


@pytest.mark.parametrize("is_dynamic", [False, True])
@pytest.mark.parametrize(
    ("estimator", "std"),
    [("weight_sampling", "per_weight"), ("local_reparameterization", "rank_one"), ("flipout", "per_channel")],
)
def test_compiles_as_one_graph(estimator, std, is_dynamic):
    """With sizes that are symbols, too, as torch takes them once it has seen several."""
    torch.compiler.reset()
    layer = bp.to_variational(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 2)), std=std)
    with bp.sampling(layer, estimator):
        compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=is_dynamic)
        compiled(torch.randn(3, 2, 4, 4)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name


@random_estimators
def test_function_transforms(estimator):
    """One draw for each of several inputs, by vmap; its gradient by functional_call."""
    layer = bp.to_variational(nn.Linear(3, 2)).train()
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    with bp.sampling(layer, estimator):
        run = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")
        gradients = run(parameters, torch.ones(5, 4, 3))
    assert gradients["weight_log_std"].shape == (5, 2, 3)
    assert not torch.equal(gradients["weight"][0], gradients["weight"][1])


def test_an_empty_batch():
    layer = bp.to_variational(nn.Conv2d(2, 4, 3), std="rank_one", estimator="local_reparameterization").train()
    layer(torch.zeros(0, 2, 5, 5)).sum().backward()
    assert not layer.weight_row_log_std.grad.any()


@structures
def test_an_operation_of_its_own_has_no_foreign_gradient(std):
    """timm's `Conv2dSame` pads in its own forward: the gradients of torch's convolution are not its."""
    pytest.importorskip("bayesprune.hosts.timm.reload")
    conv = pytest.importorskip("timm.layers").Conv2dSame
    case = LayerCase("same", lambda: conv(2, 4, 3, stride=2), (2, 2, 5, 6))
    layer, name = variational(case, std, torch.float32), "local_reparameterization"
    x = case.input(torch.float32)
    assert_same(layer, lambda x: fused(layer, name, x), lambda x: plain(layer, name, x), x, torch.float32)


@structures
def test_nothing_within_reach_and_no_noise_of_the_bias_leave_the_output_finite(std):
    """A std may be far below what the hook of `attach` bounds, and an input may be all zeros."""
    layer = bp.to_variational(nn.Linear(6, 5), std=std, estimator="local_reparameterization").train()
    layer.bias_log_std.data.fill_(-80.0)
    x = torch.zeros(4, 6, requires_grad=True)
    output = layer(x)
    assert torch.equal(output, layer.bias.expand(4, 5))
    gradients = torch.autograd.grad(output.sum(), [x, *layer.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)
