"""Every stock layer under every estimator: the moments of its outputs, against the exact ones."""

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.foundation.kinds import kind_of
from bayesprune.layers import registered_types
from tests.cases import LAYERS, STRUCTURES, LayerCase, layers
from tests.oracles import assert_covariance, linear_map, output_covariance

NUM_DRAWS, COPIES = 2000, 100
RANDOM = ("weight_sampling", "flipout", "local_reparameterization")


def variational(case: LayerCase, std: str = "per_weight", relative_std: float = 0.7) -> nn.Module:
    """The case's layer in float64 with stds that differ from weight to weight as far as the structure allows."""
    layer = bp.to_variational(case.layer(), std=std, relative_std=relative_std).double()
    for name in layer.active_names():
        for part in layer.log_std_parts(name):
            part.data += 0.5 * torch.randn_like(part)
    return layer


def stock_function(layer: nn.Module, x: torch.Tensor, kwargs: dict):
    """The stock forward as a function of weight and bias."""
    stock = layer.stock_type.__new__(layer.stock_type)
    stock.__dict__.update(bp.to_deterministic(layer).__dict__)
    names = [name for name in ("weight", "bias") if stock._parameters[name] is not None]

    def function(*tensors):
        return torch.func.functional_call(stock, dict(zip(names, tensors, strict=True)), (x,), kwargs).flatten()

    return function, [getattr(stock, name).detach() for name in names]


def visible(covariance: torch.Tensor, output: torch.Tensor, estimator: str, feature_dim: int):
    """What an estimator draws of the exact covariance: flipout's examples and units are uncorrelated."""
    if estimator == "weight_sampling":
        return covariance
    if estimator == "local_reparameterization":
        return covariance.diag().diag()
    index = torch.stack(torch.meshgrid(*map(torch.arange, output.shape), indexing="ij"), -1).flatten(0, -2)
    examples, units = index[:, 0], index[:, feature_dim + output.dim()]
    return covariance * (examples[:, None] == examples) * (units[:, None] == units)


def own_structure(case: LayerCase) -> str:
    return STRUCTURES[LAYERS.index(case) % 3]


@pytest.mark.parametrize("estimator", RANDOM)
@layers
def test_moments_of_the_output(case, estimator):
    assert_moments(case, estimator, own_structure(case))


IN_EVERY_STRUCTURE = [case for case in LAYERS if case.name in ("linear", "conv2d_groups", "transposed2d_groups")]


@pytest.mark.parametrize("estimator", RANDOM)
@pytest.mark.parametrize(
    ("case", "std"),
    [(case, std) for case in IN_EVERY_STRUCTURE for std in STRUCTURES if std != own_structure(case)],
    ids=lambda value: getattr(value, "name", value),
)
def test_moments_with_the_other_structures(case, estimator, std):
    assert_moments(case, estimator, std)


@pytest.mark.parametrize("estimator", RANDOM)
def test_moments_with_timms_same_padding(estimator):
    """A forward of its own that is linear in its weight."""
    conv = pytest.importorskip("timm.layers").Conv2dSame
    assert_moments(LayerCase("same", lambda: conv(2, 2, 3, stride=2), (2, 2, 4, 3)), estimator, "per_weight")


def assert_moments(case: LayerCase, estimator: str, std: str) -> None:
    layer, x = variational(case, std), case.input()
    posteriors, feature_dim = layer.posteriors(), kind_of(layer).feature_dim
    # Local noise is independent from example to example, so that copies of the input are as good as calls.
    copies = COPIES if estimator == "local_reparameterization" and x.dim() + feature_dim > 0 else 1
    many = x if copies == 1 else x.repeat(copies, *[1] * (x.dim() - 1))
    with torch.no_grad(), bp.sampling(layer, estimator):
        output = layer(x, **case.kwargs)
        calls = [layer(many, **case.kwargs).reshape(copies, -1) for _ in range(NUM_DRAWS // copies)]
    samples = torch.cat(calls)
    function, means = stock_function(layer, x, case.kwargs)
    covariance = output_covariance(function, means, [posteriors[name].std for name in posteriors])
    expected = visible(covariance, output, estimator, feature_dim)
    assert_covariance(samples, function(*means), expected)


@layers
def test_the_weights_of_a_unit_reach_one_output_channel(case):
    """What `unit_dims` promises to structures, priors and pruning."""
    layer, x = variational(case), case.input()
    kind, shape = kind_of(layer), layer.weight.shape
    feature_dim, unit_dims = kind.feature_dim, kind.unit_dims
    output = layer.eval()(x, **case.kwargs)
    function, means = stock_function(layer, x, case.kwargs)
    reached = (linear_map(function, *means)[0] != 0).view(*output.shape, *shape)
    reached = reached.movedim(output.dim() + feature_dim, 0).reshape(output.shape[feature_dim], -1, *shape).any(1)
    for dim in set(range(len(shape))) - set(unit_dims):
        reached = reached.any(1 + dim, keepdim=True)
    assert (reached.sum(0) == 1).all()


@layers
def test_operation_is_the_stock_forward(case):
    layer, x = variational(case), case.input()
    with torch.no_grad():
        expected = layer.eval()(x, **case.kwargs)
        assert torch.equal(layer.operation(x, layer.weight, layer.bias, **case.kwargs), expected)
        with bp.sampling(layer, "mean"):
            assert torch.equal(layer.train()(x, **case.kwargs), expected)


@layers
def test_auto_draws_outputs_only_where_each_weight_meets_one_position(case):
    layer = variational(case).train()
    expected = "local_reparameterization" if case.is_local else "weight_sampling"
    assert layer.running_estimator(case.input()) == expected
    torch.manual_seed(1)
    output = layer(case.input(), **case.kwargs)
    torch.manual_seed(1)
    with bp.sampling(layer, expected):
        assert torch.equal(layer(case.input(), **case.kwargs), output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["auto", *RANDOM])
@layers
def test_training_step_on_zeros_is_finite(case, estimator, dtype):
    layer = bp.to_variational(case.layer(dtype), estimator=estimator).train()
    output = layer(torch.zeros(case.shape, dtype=dtype), **case.kwargs)
    assert output.dtype == dtype
    output.float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("estimator", RANDOM)
@layers
def test_removed_weights_draw_no_noise(case, estimator):
    """With all weights and biases gone the output is zero under every estimator."""
    layer = variational(case)
    for name in layer.active_names():
        layer.set_mask(name, torch.zeros_like(getattr(layer, name), dtype=torch.bool))
    with bp.sampling(layer, estimator):
        assert layer(case.input(), **case.kwargs).abs().max() < 1e-100


def test_every_registered_layer_has_cases():
    built = {type(case.layer()) for case in LAYERS}
    torchs = {found for found in registered_types() if found.__module__.startswith("torch")}
    assert torchs - built == {nn.MultiheadAttention}


def test_the_input_may_be_named():
    """Stock layers call it `input`; a model may pass it by that name."""
    layer = bp.to_variational(nn.Linear(4, 3)).eval()
    x = torch.randn(2, 4)
    assert torch.equal(layer(input=x), layer(x))
    conv = bp.to_variational(nn.Conv2d(4, 3, 1)).train()
    assert conv(input=torch.randn(2, 4, 2, 2)).shape == (2, 3, 2, 2)
