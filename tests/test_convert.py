import copy
import logging
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import bayesprune as bp
from bayesprune.convert import ConversionRow
from bayesprune.errors import UnsupportedModelError
from tests.cases import LAYERS, TimmCase, layers, structures, timm_models


class Tied(nn.Module):
    """Two layers with one weight, as in an autoencoder or a language model."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        second.weight = first.weight

    def forward(self, x):
        return self.second(self.first(x))


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


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
    layers = [module for module in model.modules() if isinstance(module, bp.VariationalLayer)]
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


def test_timm_layers_with_forwards_of_their_own():
    timm_layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(
        timm_layers.Conv2dSame(3, 4, 3, stride=2),
        timm_layers.StdConv2d(4, 4, 3),
        timm_layers.ScaledStdConv2d(4, 4, 3),
        timm_layers.ScaledStdConv2dSame(4, 4, 3),
    ).eval()
    x = torch.randn(2, 3, 20, 20)
    expected, types = model(x), [type(layer) for layer in model]
    bp.to_variational(model, estimator="local_reparameterization")
    assert torch.equal(model(x), expected)
    table = bp.conversion_table(model)
    assert [row.status for row in table] == ["converted", "fallback", "fallback", "fallback"]
    for row, kind in list(zip(table, types, strict=True))[1:]:
        assert f"{kind.__name__} has a forward of its own" in row.reason
    model.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert [type(layer) for layer in bp.to_deterministic(model)] == types


@structures
@layers
def test_a_layer_alone(case, std):
    """The root itself is converted; its output, parameters and class come back."""
    layer, x = case.layer().eval(), case.input()
    expected, state, stock = layer(x, **case.kwargs), copy.deepcopy(layer.state_dict()), type(layer)
    assert bp.to_variational(layer, std=std) is layer
    assert isinstance(layer, stock)
    assert isinstance(layer, bp.VariationalLayer)
    assert torch.equal(layer(x, **case.kwargs), expected)
    bp.to_deterministic(layer)
    assert type(layer) is stock
    assert vars(layer).keys() == vars(case.layer()).keys()
    assert list(layer.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


def test_the_table_says_what_becomes_of_each_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU())

    def keep_last(module, name):
        return name != "2"

    expected = [
        ConversionRow("0", "Linear", "converted"),
        ConversionRow("1", "LayerNorm", "left", "LayerNorm is not a registered type"),
        ConversionRow("2", "Linear", "left", "filter_fn"),
    ]
    before = bp.conversion_table(model, filter_fn=keep_last)
    assert list(before) == expected
    assert not any(isinstance(module, bp.VariationalLayer) for module in model.modules()), "the table changes nothing"
    bp.to_variational(model, filter_fn=keep_last)
    assert list(bp.conversion_table(model, filter_fn=keep_last)) == expected
    assert before.summary() == "1 converted, 0 fallback, 2 left"
    for cell in ("LayerNorm is not a registered type", "filter_fn", "1 converted"):
        assert cell in str(before)
    assert type(model[2]) is nn.Linear


def test_the_filter_gets_modules_and_names():
    seen = []
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Conv1d(2, 2, 1)))
    bp.to_variational(model, filter_fn=lambda module, name: seen.append((name, type(module))) or True)
    assert {("0", nn.Linear), ("1.0", nn.Conv1d)} <= set(seen)


def test_conversion_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="bayesprune"):
        bp.to_variational(net())
    assert "2 converted, 0 fallback, 1 left" in caplog.text


def test_converting_twice_changes_nothing_but_the_estimator():
    model = bp.to_variational(net())
    before = dict(model.named_parameters())
    bp.to_variational(model, relative_std=0.9, estimator="flipout")
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert (model[0].estimator, model[4].estimator) == ("flipout", "flipout")
    with pytest.raises(ValueError, match=r"already has 'per_weight' stds and std='rank_one' .* to_deterministic first"):
        bp.to_variational(model, std="rank_one")


def test_a_second_call_converts_what_the_first_left():
    model = net()
    bp.to_variational(model, filter_fn=lambda module, name: name == "4")
    assert not isinstance(model[0], bp.VariationalLayer)
    bp.to_variational(model)
    assert isinstance(model[0], bp.VariationalLayer)
    assert isinstance(model[4], bp.VariationalLayer)


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
    from bayesprune.train.kl import bind_prior, sum_kl

    bound = bind_prior(layer, bp.priors.Gaussian())
    return sum_kl({posterior: prior for posterior, prior in bound.items() if not posterior.is_weight})


def test_a_layer_tied_later_shares_the_stds_that_exist():
    model = bp.to_variational(nn.Sequential(nn.Linear(4, 4)))
    head = nn.Linear(4, 4)
    head.weight = model[0].weight
    model.append(head)
    bp.to_variational(model)
    assert model[1].weight_log_std is model[0].weight_log_std


def test_a_layer_tied_to_a_deterministic_one_is_left():
    model = Tied(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    rows = {row.name: row for row in bp.conversion_table(model)}
    assert rows["second"].status == "left"
    assert rows["second"].reason == "a weight is tied to 'first' (Embedding), which is deterministic"
    model.other = nn.Linear(4, 5)
    bp.to_variational(model)
    assert type(model.second) is nn.Linear


def test_leaving_one_layer_leaves_those_tied_to_it_by_others():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    model[1].weight, model[2].bias = model[0].weight, model[1].bias
    bp.to_variational(model, filter_fn=lambda module, name: name != "0")
    assert [isinstance(layer, bp.VariationalLayer) for layer in model] == [False, False, False, True]


def test_modes_and_frozen_parameters_stay():
    model = net()
    model[0].eval().requires_grad_(False)
    model[4].weight.requires_grad_(False)
    bp.to_variational(model)
    assert [model[0].training, model[1].training, model[4].training] == [False, True, True]
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"{n}{s}" for n in ("0.weight", "0.bias", "4.weight") for s in ("", "_log_std")}


def test_hooks_survive():
    model, seen = net(), []
    model[0].register_forward_hook(lambda *_: seen.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: seen.append("pre"))
    model[4].register_full_backward_hook(lambda *_: seen.append("backward"))
    model[4].weight.register_hook(lambda _: seen.append("tensor"))
    bp.to_variational(model)
    model(torch.randn(2, 1, 4, 4)).sum().backward()
    assert seen == ["pre", "forward", "tensor", "backward"]


def test_parameters_and_an_optimizer_survive():
    model = net()
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
    model = bp.to_variational(net(), std=std, estimator="flipout")
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
    model = bp.to_variational(net())
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.randn(2, 1, 4, 4)
    assert torch.equal(other.eval()(x), model.eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stds_are_float32(dtype):
    model = bp.to_variational(net().to(dtype))
    assert {p.dtype for name, p in model.named_parameters() if "log_std" in name} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if "log_std" not in name} == {dtype}
    model(torch.randn(2, 1, 4, 4, dtype=dtype)).float().sum().backward()
    assert all(p.grad.dtype == p.dtype for p in model.parameters())


def test_meta_models():
    with torch.device("meta"):
        model = bp.to_variational(net(), std="rank_one")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {"0.weight_row_log_std", "4.weight_column_log_std"} < set(model.state_dict())
    assert model.eval()(torch.randn(2, 1, 4, 4, device="meta")).shape == (2, 2)


def test_stds_start_at_a_fraction_of_the_layers_rms():
    model = net()
    nn.init.zeros_(model[4].weight)
    bp.to_variational(model, relative_std=0.3)
    rms = model[0].weight.square().mean().sqrt()
    for name in ("weight", "bias"):
        std = model[0].log_std(name).exp()
        torch.testing.assert_close(std, (0.3 * rms).expand(std.shape))
    torch.testing.assert_close(model[4].weight_log_std.exp(), torch.full((2, 12), 0.3 * 12**-0.5))


PARAMETRIZED = {
    "parametrizations.weight_norm": (lambda m: parametrizations.weight_norm(m), "its weight is parametrized"),
    "parametrizations.spectral_norm": (lambda m: parametrizations.spectral_norm(m), "its weight is parametrized"),
    "prune.weight": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "its weight is not a parameter"),
    "prune.bias": (lambda m: prune.l1_unstructured(m, "bias", 0.5), "its bias is not a parameter"),
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_computed_weights_are_left(name):
    change, reason = PARAMETRIZED[name]
    model = nn.Sequential(change(nn.Linear(4, 4)), nn.Linear(4, 4)).eval()
    x = torch.randn(2, 4)
    expected = model(x)
    rows = bp.conversion_table(model)
    assert [row.status for row in rows if row.name == "0"] == ["left"]
    assert next(row.reason for row in rows if row.name == "0").startswith(reason)
    bp.to_variational(model)
    assert not isinstance(model[0], bp.VariationalLayer)
    assert torch.equal(model(x), expected)


def test_a_bias_that_is_no_parameter_is_not_lost():
    """Training a layer whose bias is a buffer must not drop the bias."""
    layer = nn.Linear(4, 3)
    del layer.bias
    layer.register_buffer("bias", torch.full((3,), 100.0))
    model = nn.Sequential(layer, nn.Linear(3, 3))
    bp.to_variational(model)
    assert (model[0](torch.randn(2, 4)) > 50).all()
    assert type(model[0]) is nn.Linear


def test_a_forward_that_was_replaced_on_the_instance_is_left():
    """Device maps wrap the forward of each instance, which a change of class no longer reaches."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    original = model[0].forward
    model[0].forward = lambda x: original(x) + 1
    (row,) = (row for row in bp.conversion_table(model) if row.name == "0")
    assert row.status == "left"
    assert row.reason.startswith("its forward was replaced on the instance")
    bp.to_variational(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8])
def test_weights_that_are_not_real_numbers_are_left(dtype):
    odd = nn.Linear(4, 4, bias=False)
    odd.weight = nn.Parameter(torch.ones(4, 4, dtype=dtype), requires_grad=False)
    model = bp.to_variational(nn.Sequential(odd, nn.Linear(4, 4)))
    row = bp.conversion_table(model)[0]
    assert (row.status, row.reason) == ("left", f"its weight is {dtype}, not a floating point number")


@pytest.mark.parametrize("empty", [lambda: nn.Linear(0, 4), lambda: nn.Linear(4, 0), lambda: nn.Conv2d(2, 0, 1)])
def test_empty_layers_are_left(empty):
    with pytest.warns(UserWarning, match="zero-element"):
        layer = empty()
    model = bp.to_variational(nn.Sequential(layer, nn.Linear(4, 4)))
    row = bp.conversion_table(model)[0]
    assert row.status == "left"
    assert row.reason == f"its weight is empty, of shape {tuple(layer.weight.shape)}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_weights_that_are_not_finite_are_refused(parameter, value):
    model = net()
    getattr(model[4], parameter).data.view(-1)[:2] = value
    with pytest.raises(ValueError, match=rf"4\.{parameter} has 2 of \d+ values that are NaN or infinite"):
        bp.to_variational(model)
    assert type(model[0]) is nn.Conv2d, "a refused model is as it was"
    bp.to_variational(model, filter_fn=lambda module, name: name != "4")


def test_models_without_a_layer_to_convert():
    with pytest.raises(ValueError, match=r"no layer: the model has LayerNorm \(1\); registered types are Linear,"):
        bp.to_variational(nn.Sequential(nn.LayerNorm(4), nn.ReLU()))
    with pytest.raises(ValueError, match=r"the model has Linear \(1\); .*Left because: filter_fn"):
        bp.to_variational(nn.Linear(2, 2), filter_fn=lambda module, name: False)
    with pytest.raises(ValueError, match="the model has no module with parameters"):
        bp.to_variational(nn.ReLU())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": "low_rank"}, "std is 'low_rank'; expected one of per_weight, rank_one, per_channel"),
        ({"relative_std": 0.0}, "relative_std is 0.0; expected a positive number"),
        ({"relative_std": float("nan")}, "relative_std is nan"),
        ({"relative_std": float("inf")}, "relative_std is inf"),
        ({"estimator": "sample"}, "estimator is 'sample'; expected one of auto"),
    ],
)
def test_options_are_checked(options, message):
    model = net()
    with pytest.raises(ValueError, match=re.escape(message)):
        bp.to_variational(model, **options)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_wrapped_models_are_refused():
    wrapped = {
        "wrapped in DataParallel": nn.DataParallel(net()),
        "compiled model": torch.compile(net()),
        "scripted model": torch.jit.script(net()),
    }
    wrapped["wrapped in DistributedDataParallel"] = nn.parallel.DistributedDataParallel.__new__(
        nn.parallel.DistributedDataParallel
    )
    nn.Module.__init__(wrapped["wrapped in DistributedDataParallel"])
    in_place = net()
    in_place.compile()
    for message, model in [*wrapped.items(), ("compiled model", in_place)]:
        with pytest.raises(UnsupportedModelError, match=message):
            bp.to_variational(model)


def test_to_deterministic_of_a_stock_model_changes_nothing():
    model = net()
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
