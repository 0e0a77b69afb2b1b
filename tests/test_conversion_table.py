"""What conversion leaves, falls back on or refuses, and that it says why."""

import logging
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import bayesprune as bp
from bayesprune.convert import ConversionRow
from bayesprune.errors import UnsupportedModelError
from tests.cases import Tied, small_net


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
    assert not any(isinstance(module, bp.layers.VariationalLayer) for module in model.modules()), (
        "the table changes nothing"
    )
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
        bp.to_variational(small_net())
    assert "2 converted, 0 fallback, 1 left" in caplog.text


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
    assert [isinstance(layer, bp.layers.VariationalLayer) for layer in model] == [False, False, False, True]


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
    assert not isinstance(model[0], bp.layers.VariationalLayer)
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
    model = small_net()
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
    model = small_net()
    with pytest.raises(ValueError, match=re.escape(message)):
        bp.to_variational(model, **options)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_wrapped_models_are_refused():
    wrapped = {
        "wrapped in DataParallel": nn.DataParallel(small_net()),
        "compiled model": torch.compile(small_net()),
        "scripted model": torch.jit.script(small_net()),
    }
    wrapped["wrapped in DistributedDataParallel"] = nn.parallel.DistributedDataParallel.__new__(
        nn.parallel.DistributedDataParallel
    )
    nn.Module.__init__(wrapped["wrapped in DistributedDataParallel"])
    in_place = small_net()
    in_place.compile()
    for message, model in [*wrapped.items(), ("compiled model", in_place)]:
        with pytest.raises(UnsupportedModelError, match=message):
            bp.to_variational(model)
