import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation import noise
from bayesprune.layers import named_posteriors, variational_layers
from tests.cases import LAYERS, layers, small_net, structures

RANDOM = ("auto", "weight_sampling", "flipout", "local_reparameterization")


def snapshot(model: nn.Module) -> dict:
    """All that a module holds, by module: attributes, and copies of tensors."""
    return {name: copy.deepcopy(vars(module)) for name, module in model.named_modules()}


def assert_unchanged(model: nn.Module, before: dict) -> None:
    for name, module in model.named_modules():
        now = vars(module)
        assert now.keys() == before[name].keys(), name
        for key in now.keys() - {"_parameters", "_buffers", "_modules"}:
            assert repr(now[key]) == repr(before[name][key]), (name, key)
        for kind in ("_parameters", "_buffers"):
            assert now[kind].keys() == before[name][kind].keys()
            for key, tensor in now[kind].items():
                assert tensor is None or torch.equal(tensor, before[name][kind][key]), (name, key)


@structures
@layers
def test_posteriors_have_means_and_positive_stds(case, std):
    layer = bp.to_variational(case.layer(), std=std, relative_std=0.25)
    rms = layer.weight.detach().square().mean().sqrt()
    for name, (mean, std_) in layer.posteriors().items():
        assert mean is getattr(layer, name)
        assert std_.dtype == torch.float32
        torch.testing.assert_close(std_.double(), (0.25 * rms).expand(std_.shape), rtol=1e-5, atol=0)
        assert std_.expand(mean.shape).shape == mean.shape
        assert layer.log_std(name).exp().equal(std_)


def test_rank_one_stds_are_an_outer_product():
    layer = bp.to_variational(nn.Conv2d(2, 3, 2), std="rank_one")
    layer.weight_row_log_std.data = torch.randn(3, 1, 1, 1)
    layer.weight_column_log_std.data = torch.randn(1, 2, 1, 1)
    outer = torch.outer(layer.weight_row_log_std.exp().flatten(), layer.weight_column_log_std.exp().flatten())
    std = layer.posteriors()["weight"].std
    torch.testing.assert_close(std.expand(3, 2, 2, 2), outer[:, :, None, None].expand(3, 2, 2, 2))


@pytest.mark.parametrize("estimator", RANDOM)
@structures
def test_nothing_is_remembered_between_forwards(std, estimator):
    model = bp.to_variational(small_net(), std=std, estimator=estimator)
    model[1].eval()
    before = snapshot(model)
    x = torch.randn(2, 1, 4, 4)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    with bp.sampling(model, "flipout"):
        model.eval()(x)
    assert_unchanged(model.train(), before | {"1": snapshot(model)["1"]})


@pytest.mark.parametrize("estimator", RANDOM)
@pytest.mark.parametrize("case", [LAYERS[3], LAYERS[7], LAYERS[16]], ids=lambda case: case.name)
def test_gradients_of_two_forwards_before_one_backward(case, estimator):
    """Against autograd with the same noise, one forward and backward at a time."""
    layer = bp.to_variational(case.layer(), estimator=estimator).double().train()
    inputs = [torch.randn_like(case.input()) for _ in range(2)]
    torch.manual_seed(4)
    for x in inputs:
        layer(x).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    torch.manual_seed(4)
    first, second = (layer(x) for x in inputs)
    (second.square().sum() + first.square().sum()).backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-12)


@structures
def test_std_gradients_are_those_of_the_draw(std, monkeypatch):
    """The chain rule by hand: d loss / d log std = sum of d loss / d w * eps * std over the weights that share it."""
    layer = bp.to_variational(nn.Linear(4, 3), std=std, estimator="weight_sampling").double()
    draws = []
    original = noise.normal
    monkeypatch.setattr(noise, "normal", lambda *a, **k: draws.append(original(*a, **k)) or draws[-1])
    x = torch.randn(5, 4).double()
    layer(x).square().sum().backward()
    for name, eps in zip(("weight", "bias"), draws, strict=True):
        mean, std_ = layer.posteriors()[name]
        expected = (mean.grad * eps * std_).detach()
        for part in layer.log_std_parts(name):
            torch.testing.assert_close(part.grad, expected.sum_to_size(part.shape), rtol=1e-10, atol=1e-12)


def test_frozen_normalisation_does_not_change_the_estimator():
    model = bp.to_variational(small_net()).train()
    model[1].eval()
    assert model[0].running_estimator(torch.zeros(2, 1, 4, 4)) == "weight_sampling"
    assert model[4].running_estimator(torch.zeros(2, 12)) == "local_reparameterization"
    x = torch.randn(2, 1, 4, 4)
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("training", [True, False])
def test_stds_keep_float32_when_the_model_is_cast(training):
    """A bf16 log std cannot take a step of 1e-2."""
    model = bp.to_variational(small_net()).train(training)
    for cast in (lambda: model.to(torch.bfloat16), model.half, model.bfloat16):
        before = {name: part.clone() for name, part in model.named_parameters() if "log_std" in name}
        cast()
        assert model[0].weight.dtype in (torch.bfloat16, torch.float16)
        for name, part in before.items():
            assert torch.equal(model.get_parameter(name), part), name
    model.bfloat16()
    model(torch.randn(2, 1, 4, 4).bfloat16()).float().sum().backward()
    assert model[0].weight.grad.dtype == torch.bfloat16
    if training:
        assert model[0].weight_log_std.grad.dtype == torch.float32


def test_moving_a_model_keeps_parameters_and_tied_stds():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    bp.to_variational(model)
    before = dict(model.named_parameters())
    model.bfloat16().float().to("cpu")
    assert model[1].weight_log_std is model[0].weight_log_std
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert bp.to_variational(nn.Linear(2, 2)).double().weight_log_std.dtype == torch.float64


def test_posteriors_of_a_model_are_named_like_its_parameters():
    model = bp.to_variational(small_net())
    posteriors = {posterior.name: posterior for posterior in named_posteriors(model)}
    assert list(posteriors) == ["0.weight", "0.bias", "4.weight", "4.bias"]
    assert [name for name, _ in variational_layers(model)] == ["0", "4"]
    for name, posterior in posteriors.items():
        assert posterior.mean is model.get_parameter(name)
        assert posterior.is_weight == name.endswith("weight")
        assert posterior.unit_dims == ((0,) if posterior.is_weight else ())
        assert posterior.mask is None
        assert [part.shape for part in posterior.log_std_parts] == [posterior.mean.shape]


def test_a_resized_layer_says_what_to_do():
    layer = bp.to_variational(nn.Linear(4, 3))
    layer.weight = nn.Parameter(layer.weight[:2].detach())
    layer.bias = nn.Parameter(layer.bias[:2].detach())
    assert layer.eval()(torch.zeros(1, 4)).shape == (1, 2)
    with pytest.raises(ValueError, match=r"weight has shape \(2, 4\) but a log std of shape \(3, 4\).*SNRImportance"):
        layer.train()(torch.zeros(1, 4))


@structures
def test_checkpoints_reload_exactly(std):
    model, other = (bp.to_variational(small_net(), std=std) for _ in range(2))
    for parameter in model.parameters():
        parameter.data.normal_()
    assert other.load_state_dict(model.state_dict()) == ([], [])
    x = torch.randn(2, 1, 4, 4)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(other(x), expected)


@structures
def test_stock_checkpoints_load_strictly(std):
    """Before and after conversion a stock checkpoint is one of this model; the stds stay."""
    stock = small_net()
    model = bp.to_variational(small_net(), std=std)
    stds = {name: part.clone() for name, part in model.named_parameters() if "log_std" in name}
    model.load_state_dict(stock.state_dict(), strict=True)
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(model.eval()(x), stock.eval()(x))
    assert all(torch.equal(model.get_parameter(name), part) for name, part in stds.items())


def test_incomplete_checkpoints_are_refused():
    model = bp.to_variational(small_net())
    state = model.state_dict()
    del state["0.weight_log_std"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0.weight_log_std\""):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({key: value for key, value in small_net().state_dict().items() if key != "4.weight"})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"0.weight_row_log_std\""):
        model.load_state_dict(bp.to_variational(small_net(), std="rank_one").state_dict())


def test_assignment_from_a_meta_model():
    """Large checkpoints are loaded with assign=True into a model without storage."""
    trained = bp.to_variational(small_net())
    trained[4].set_mask("weight", torch.rand(2, 12) > 0.5)
    with torch.device("meta"):
        model = bp.to_variational(small_net())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model[0].weight_log_std.dtype == torch.float32
    model.load_state_dict(trained.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(model.eval()(x), trained.eval()(x))
    assert torch.equal(model[4].weight_mask, trained[4].weight_mask)


@pytest.mark.parametrize("mode", ["training", "sampling"])
def test_copies_on_several_gpus_are_refused_where_they_would_draw(mode):
    """nn.DataParallel makes copies without parameters, which would train without noise and say nothing."""
    layer = bp.to_variational(nn.Linear(4, 3)).train(mode == "training")
    draws = bp.sampling(layer, "weight_sampling") if mode == "sampling" else nullcontext()
    with draws, pytest.raises(UnsupportedModelError, match=r"nn\.DataParallel copies layers without their posteriors"):
        layer._replicate_for_data_parallel()
    assert not layer.eval()._replicate_for_data_parallel()._parameters
