import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bayesprune as bp
from bayesprune.foundation import noise
from tests.cases import structures


class OwnAttention(nn.MultiheadAttention):
    def forward(self, query):
        return super().forward(query, query, query)


def attention(**kwargs) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.3)
    return layer


KINDS = pytest.mark.parametrize(
    "kwargs",
    [{}, {"bias": False}, {"kdim": 5, "vdim": 3}, {"add_bias_kv": True}, {"add_zero_attn": True}],
    ids=["plain", "without_bias", "kdim_vdim", "bias_kv", "zero_attention"],
)


def inputs(layer: nn.MultiheadAttention) -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 4, 8), torch.randn(2, 5, layer.kdim), torch.randn(2, 5, layer.vdim)


@structures
@KINDS
def test_evaluation_and_round_trip(kwargs, std):
    layer = attention(**kwargs).eval()
    x, keys, types = inputs(layer), list(layer.state_dict()), [type(m) for m in layer.modules()]
    expected, weights = layer(*x)
    bp.to_variational(layer, std=std)
    output = layer(*x)
    assert torch.equal(output[0], expected)
    assert torch.equal(output[1], weights)
    assert torch.equal(layer(query=x[0], key=x[1], value=x[2], need_weights=False)[0], layer(*x, need_weights=False)[0])
    bp.to_deterministic(layer)
    assert (list(layer.state_dict()), [type(m) for m in layer.modules()]) == (keys, types)


@KINDS
def test_one_draw_of_all_projections(kwargs):
    """Training is the stock attention with weights drawn from the posteriors."""
    layer = bp.to_variational(attention(**kwargs), relative_std=0.5)
    stock, x = bp.to_deterministic(copy.deepcopy(layer)), inputs(layer)
    torch.manual_seed(3)
    output, _ = layer(*x)
    torch.manual_seed(3)
    drawn = {}
    for prefix, module in (("", layer), ("out_proj.", layer.out_proj)):
        for name, (mean, std) in module.posteriors().items():
            drawn[prefix + name] = mean + std * noise.normal_like(mean, dtype=mean.dtype)
    assert {"out_proj.weight"} < set(drawn)
    expected, _ = torch.func.functional_call(stock, dict(stock.named_parameters()) | drawn, x)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    for name, parameter in layer.named_parameters():
        if kwargs == {"kdim": 5, "vdim": 3} or not name.startswith("in_proj_bias"):  # the key's bias has no effect
            assert parameter.grad.abs().sum() > 0, name


def test_extra_tokens_stay_deterministic():
    """bias_k and bias_v are tokens beside the keys and values, not weights of a projection."""
    layer = bp.to_variational(attention(add_bias_kv=True))
    assert layer.active_names() == ["in_proj_weight", "in_proj_bias"]
    report = bp.prune_weights(layer, "weights=0.5")
    assert [row.name for row in report.rows] == ["in_proj_weight", "out_proj.weight"]


def test_removed_weights_of_projections_draw_no_noise():
    layer = bp.to_variational(attention(), relative_std=0.5)
    layer.set_mask("in_proj_weight", torch.zeros(24, 8, dtype=torch.bool))
    layer.set_mask("in_proj_bias", torch.zeros(24, dtype=torch.bool))
    layer.out_proj.set_mask("weight", torch.zeros(8, 8, dtype=torch.bool))
    layer.out_proj.set_mask("bias", torch.zeros(8, dtype=torch.bool))
    x = inputs(layer)
    for estimator in ("weight_sampling", "mean", "auto"):
        with bp.sampling(layer, estimator):
            output = layer(*x)[0]
        assert torch.equal(output, torch.zeros(2, 4, 8)), estimator
    layer(*x)[0].sum().backward()
    assert layer.in_proj_weight.grad.abs().sum() == 0
    assert layer.in_proj_weight_log_std.grad.abs().sum() == 0


def test_leaving_the_attention_leaves_its_output_projection():
    """torch's attention reads the raw weight of `out_proj`, so a converted one would have stds that never act."""
    model = nn.Sequential(attention(), nn.Linear(8, 8))
    bp.to_variational(model, filter_fn=lambda module, name: not isinstance(module, nn.MultiheadAttention))
    rows = {row.name: row for row in bp.conversion_table(model, filter_fn=lambda m, n: False)}
    assert (rows["0"].status, rows["0.out_proj"].status, rows["1"].status) == ("left", "left", "converted")
    assert type(model[0].out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear


def test_leaving_the_output_projection_alone():
    layer = bp.to_variational(attention(), filter_fn=lambda module, name: name != "out_proj")
    assert not isinstance(layer.out_proj, bp.layers.VariationalLayer)
    x = inputs(layer)
    assert not torch.equal(layer(*x)[0], layer(*x)[0])


def test_an_attention_with_a_forward_of_its_own_is_left():
    model = nn.Sequential(OwnAttention(8, 2), nn.Linear(8, 8))
    rows = {row.name: row for row in bp.conversion_table(model)}
    assert rows["0"].status == rows["0.out_proj"].status == "left"
    assert rows["0"].reason == "OwnAttention is not a registered type"
    assert "MultiheadAttention" in rows["0.out_proj"].reason
    bp.to_variational(model)
    assert type(model[0]) is OwnAttention


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_with_the_fast_path(norm_first):
    """In evaluation torch's fused encoder reads raw weights past every forward: right at the means, wrong for draws."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x = torch.randn(2, 4, 8)
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        expected = encoder(x)
        bp.to_variational(encoder)
        assert torch.equal(encoder(x), expected)
        for _ in range(2):
            with bp.sampling(encoder):
                assert not torch.equal(encoder(x), encoder(x))
            assert torch.equal(encoder(x), expected)
    assert torch.backends.mha.get_fastpath_enabled()
    prediction = bp.predict(encoder, x, num_samples=4)
    assert (prediction.variance > 0).all()
    encoder.train()(x).square().sum().backward()
    stds = [name for name, parameter in encoder.named_parameters() if "log_std" in name and parameter.grad is None]
    assert stds == []


def test_encoder_samples_all_of_its_layers():
    """Each converted layer alone makes the output of a sampling encoder vary."""
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    bp.to_variational(encoder)
    x = torch.randn(2, 4, 8)
    for _, layer in list(encoder.named_modules()):
        if isinstance(layer, bp.layers.VariationalLayer):
            for other in encoder.modules():
                if isinstance(other, bp.layers.VariationalLayer):
                    for name in other.active_names():
                        other.log_std_parts(name)[0].data.fill_(0.0 if other is layer else -40.0)
            with torch.no_grad(), bp.sampling(encoder):
                assert (encoder(x) - encoder(x)).abs().max() > 1e-3, type(layer)


def test_attention_of_a_model_stays_a_function_of_its_draw():
    """F.multi_head_attention_forward agrees, so nothing else of the module changed."""
    layer = bp.to_variational(attention()).eval()
    x = torch.randn(4, 2, 8)
    expected, _ = F.multi_head_attention_forward(
        x, x, x, 8, 2, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0,
        layer.out_proj.weight, layer.out_proj.bias,
    )  # fmt: skip
    assert torch.equal(layer(*(x.transpose(0, 1),) * 3)[0].transpose(0, 1), expected)
