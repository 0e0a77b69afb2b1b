import copy
import pickle

import pytest
import torch
from torch import nn

import bayesprune as bp
from tests.cases import LAYERS, Tied, TimmCase, layers, small_net, structures, timm_models


def tensors(output) -> list[torch.Tensor]:
    return list(output) if isinstance(output, tuple | list) else [output]


@timm_models
def test_timm_models(case: TimmCase):
    """Evaluation is the stock model's to the last bit; one training step reaches every std; the round trip is exact."""
    model, x = case.model().eval(), case.input()
    keys, types, parameters = list(model.state_dict()), [type(m) for m in model.modules()], list(model.parameters())
    with torch.no_grad():
        expected = model(x)
        assert bp.to_variational(model) is model
        assert torch.equal(model(x), expected)
    layers = [module for module in model.modules() if isinstance(module, bp.layers.VariationalLayer)]
    assert all(layer.stock_type in types for layer in layers)
    assert {id(p) for p in parameters} <= {id(p) for p in model.parameters()}
    state = copy.deepcopy(model.state_dict())

    loss = sum(output.square().mean() for output in tensors(model.train()(x)))
    loss.backward()
    silent = [name for name, p in model.named_parameters() if "log_std" in name and p.grad is None]
    assert all(name.removesuffix("_log_std").endswith(case.raw) for name in silent), silent
    assert bool(silent) == bool(case.raw)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    model.load_state_dict(state)
    assert bp.to_deterministic(model.eval()) is model
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == types
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@structures
@layers
def test_a_layer_alone(case, std):
    """The root itself is converted; its output, parameters and class come back."""
    layer, x = case.layer().eval(), case.input()
    expected, state, stock = layer(x, **case.kwargs), copy.deepcopy(layer.state_dict()), type(layer)
    assert bp.to_variational(layer, std=std) is layer
    assert isinstance(layer, stock)
    assert isinstance(layer, bp.layers.VariationalLayer)
    assert torch.equal(layer(x, **case.kwargs), expected)
    bp.to_deterministic(layer)
    assert type(layer) is stock
    assert vars(layer).keys() == vars(case.layer()).keys()
    assert list(layer.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


def test_converting_twice_changes_nothing_but_the_estimator():
    model = bp.to_variational(small_net())
    before = dict(model.named_parameters())
    bp.to_variational(model, relative_std=0.9, estimator="flipout")
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert (model[0].estimator, model[4].estimator) == ("flipout", "flipout")
    with pytest.raises(ValueError, match=r"already has 'per_weight' stds and std='rank_one' .* to_deterministic first"):
        bp.to_variational(model, std="rank_one")


def test_a_second_call_converts_what_the_first_left():
    model = small_net()
    bp.to_variational(model, filter_fn=lambda module, name: name == "4")
    assert not isinstance(model[0], bp.layers.VariationalLayer)
    bp.to_variational(model)
    assert isinstance(model[0], bp.layers.VariationalLayer)
    assert isinstance(model[4], bp.layers.VariationalLayer)


def test_shared_modules_stay_shared():
    shared = nn.Linear(4, 4)
    model = bp.to_variational(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2] is shared
    assert [row.name for row in bp.conversion_table(model)] == ["0"]
    torch.testing.assert_close(bp.kl_divergence(model), bp.kl_divergence(model[0]))
    assert type(bp.to_deterministic(model)[2]) is nn.Linear


@structures
def test_tied_weights_have_tied_stds(std):
    model = bp.to_variational(Tied(nn.Linear(4, 4), nn.Linear(4, 4)), std=std)
    assert model.second.weight is model.first.weight
    for one, other in zip(model.first.log_std_parts("weight"), model.second.log_std_parts("weight"), strict=True):
        assert one is other
    assert model.second.bias_log_std is not model.first.bias_log_std
    alone = bp.to_variational(copy.deepcopy(bp.to_deterministic(copy.deepcopy(model.second))), std=std)
    bias = bp.to_variational(copy.deepcopy(bp.to_deterministic(copy.deepcopy(model.first))), std=std)
    weights_counted_twice = bp.kl_divergence(alone) + bp.kl_divergence(bias)
    weight = bp.kl_divergence(model.first) - kl_of_bias(model.first)
    torch.testing.assert_close(bp.kl_divergence(model), weights_counted_twice - weight)


def kl_of_bias(layer: nn.Module) -> torch.Tensor:
    from bayesprune.train.complexity import sum_kl
    from bayesprune.train.kl import bind_prior

    bound = bind_prior(layer, bp.priors.Gaussian())
    return sum_kl({posterior: prior for posterior, prior in bound.items() if not posterior.is_weight})


def test_a_layer_tied_later_shares_the_stds_that_exist():
    model = bp.to_variational(nn.Sequential(nn.Linear(4, 4)))
    head = nn.Linear(4, 4)
    head.weight = model[0].weight
    model.append(head)
    bp.to_variational(model)
    assert model[1].weight_log_std is model[0].weight_log_std


def test_modes_and_frozen_parameters_stay():
    model = small_net()
    model[0].eval().requires_grad_(False)
    model[4].bias.requires_grad_(False)
    bp.to_variational(model)
    assert [model[0].training, model[1].training, model[4].training] == [False, True, True]
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"0.weight", "0.bias", "4.bias", "4.bias_log_std"}


def test_hooks_survive():
    model, seen = small_net(), []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: seen.append("pre"))
    model[4].register_full_backward_hook(lambda *_: seen.append("backward"))
    model[4].weight.register_hook(lambda _: seen.append("tensor"))
    bp.to_variational(model)
    model(torch.randn(2, 1, 4, 4)).sum().backward()
    assert seen == ["pre", "forward", "tensor", "backward"]


def test_parameters_and_an_optimizer_survive():
    model = small_net()
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bp.to_variational(model)
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    weight = model[0].weight.detach().clone()
    model(torch.randn(2, 1, 4, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, weight)
    bp.to_deterministic(model)
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())


@structures
@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(again, std):
    model = bp.to_variational(small_net(), std=std, estimator="flipout")
    other = again(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert other.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    assert other[0].estimator == "flipout"
    x = torch.randn(2, 1, 4, 4)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(other(x), expected)


def test_copies_keep_ties():
    other = copy.deepcopy(bp.to_variational(Tied(nn.Linear(4, 4), nn.Linear(4, 4))))
    assert other.first.weight is other.second.weight
    assert other.first.weight_log_std is other.second.weight_log_std


def test_a_saved_module_is_the_stock_class_to_others(tmp_path):
    """A pickle names the stock class, which also exists where classes made at run time do not yet."""
    model = bp.to_variational(small_net())
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(other.eval()(x), model.eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stds_are_float32(dtype):
    model = bp.to_variational(small_net().to(dtype))
    assert {p.dtype for name, p in model.named_parameters() if "log_std" in name} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "log_std" not in name} == {dtype}
    model(torch.randn(2, 1, 4, 4, dtype=dtype)).float().sum().backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())


def test_stds_lie_in_memory_as_the_means_do():
    """Else each draw would go through one of the two in strides; so do logits of gates, and masks."""
    model = bp.to_variational(nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last))
    stride = model.weight.stride()
    assert model.weight_log_std.stride() == stride != (36, 9, 3, 1)
    assert len(model.weight_log_std.unique()) == 1
    bp.prune_weights(model, "weights=0.5")
    assert model.mask("weight", whole=True).stride() == stride
    bp.gates.add_weight_gates(model)
    assert model.weight_gate.logits.stride() == stride


def test_meta_models():
    with torch.device("meta"):
        model = bp.to_variational(small_net(), std="rank_one")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {"0.weight_row_log_std", "4.weight_column_log_std"} < set(model.state_dict())
    assert model.eval()(torch.randn(2, 1, 4, 4, device="meta")).shape == (2, 2)


def test_stds_start_at_a_fraction_of_the_layers_rms():
    model = small_net()
    nn.init.zeros_(model[4].weight)
    bp.to_variational(model, relative_std=0.3)
    rms = model[0].weight.square().mean().sqrt()
    for name in ("weight", "bias"):
        std = model[0].log_std(name).exp()
        torch.testing.assert_close(std, (0.3 * rms).expand(std.shape))
    torch.testing.assert_close(model[4].weight_log_std.exp(), torch.full((2, 12), 0.3 * 12**-0.5))


def test_to_deterministic_of_a_stock_model_changes_nothing():
    model = small_net()
    state = copy.deepcopy(model.state_dict())
    assert bp.to_deterministic(model) is model
    assert model.state_dict().keys() == state.keys()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
def test_a_compiled_variational_model_draws_and_evaluates():
    model = bp.to_variational(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(3, 4)
    assert not torch.equal(compiled(x), compiled(x))
    compiled(x).sum().backward()
    assert model[0].weight_log_std.grad.abs().sum() > 0
    model.eval()
    assert torch.equal(compiled(x), model(x))


def test_all_layer_cases_have_names_of_their_own():
    assert len({case.name for case in LAYERS}) == len(LAYERS)
