import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bayesprune as bp
from bayesprune.foundation import noise
from bayesprune.layers import base, registered_types, variational_type
from tests.oracles import assert_mean


class Renamed(nn.Linear):
    """Inherits the forward: as good as Linear."""


class Normalised(nn.Conv2d):
    """A forward of its own, not linear in its weight."""

    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


class OwnConvForward(nn.Conv2d):
    """The stock forward, but what it calls is its own."""

    def _conv_forward(self, input, weight, bias):
        return 3 * super()._conv_forward(input, weight, bias)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.fixture
def restored_registry():
    before = dict(base._REGISTERED)
    yield
    base._REGISTERED.clear()
    base._REGISTERED.update(before)
    base.variational_type.cache_clear()


def test_exact_types_come_first():
    assert variational_type(nn.Linear).__name__ == "VariationalLinear"
    assert variational_type(nn.LayerNorm) is None
    assert variational_type(nn.Embedding) is None
    assert {nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d} <= set(registered_types())


def test_a_subclass_with_the_stock_forward_is_converted():
    layer = bp.to_variational(Renamed(4, 3))
    assert isinstance(layer, Renamed)
    assert type(layer).__name__ == "VariationalRenamed"
    assert type(layer).fallback_reason is None
    assert layer.running_estimator(torch.zeros(2, 4)) == "local_reparameterization"
    assert type(bp.to_deterministic(layer)) is Renamed


@pytest.mark.parametrize("stock", [Normalised, OwnConvForward])
def test_a_subclass_with_a_forward_of_its_own_falls_back(stock):
    layer = stock(4, 3, 1)
    x = torch.randn(2, 4, 1, 1)
    expected = layer(x)
    bp.to_variational(layer, estimator="flipout")
    assert torch.equal(layer.eval()(x), expected)
    assert layer.train().running_estimator(x) == "weight_sampling"
    (row,) = bp.conversion_table(layer)
    assert (row.status, row.type) == ("fallback", stock.__name__)
    assert "forward of its own" in row.reason


def test_the_fallback_draws_through_the_layers_own_forward():
    layer = bp.to_variational(Normalised(4, 3, 1, bias=False), relative_std=0.5)
    x = torch.randn(2, 4, 1, 1)
    torch.manual_seed(1)
    output = layer(x)
    torch.manual_seed(1)
    drawn = layer.weight + layer.weight_log_std.exp() * noise.normal_like(layer.weight, dtype=torch.float32)
    torch.testing.assert_close(output, F.conv2d(x, drawn / drawn.norm()))
    output.sum().backward()
    assert layer.weight_log_std.grad.abs().sum() > 0


def test_run_time_classes_copy_and_pickle():
    for layer in (Renamed(4, 3), Normalised(4, 3, 1)):
        bp.to_variational(layer, std="rank_one")
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(again) is type(layer)
            assert again.std == "rank_one"
            assert all(torch.equal(a, b) for a, b in zip(again.parameters(), layer.parameters(), strict=True))
            assert type(bp.to_deterministic(again)) is type(layer).stock_type


def test_registering_a_layer(restored_registry):
    assert variational_type(Doubled).fallback_reason is not None

    @bp.register_layer(Doubled)
    class VariationalDoubled(bp.layers.VariationalLayer, Doubled):
        """Linear in its weight, but it multiplies the output too: f(x^2, std^2) is not the variance of f(x, w)."""

        is_linear_in_weight = False

    layer = bp.to_variational(Doubled(4, 3, bias=False), relative_std=1.0)
    assert type(layer) is VariationalDoubled
    x = torch.randn(2, 5, 4)
    with torch.no_grad(), bp.sampling(layer, "mean"):
        assert torch.equal(layer(x), 2 * F.linear(x, layer.weight))
    for estimator in ("weight_sampling", "flipout", "local_reparameterization"):
        with torch.no_grad(), bp.sampling(layer, estimator):
            draws = torch.stack([layer(torch.eye(4)) for _ in range(500)])
        deviations = (draws - 2 * layer.weight.T.detach()) / (2 * layer.weight_log_std.T.detach().exp())
        assert_mean(deviations.square(), 1.0, "variance over the exact one")


def test_registering_a_class_that_is_no_such_layer_is_refused():
    with pytest.raises(TypeError, match="Wrong is registered for Conv2d; expected a class that derives from Var"):

        @bp.register_layer(nn.Conv2d)
        class Wrong(bp.layers.VariationalLayer, nn.Linear):
            pass
