"""GPT-2's transposed layer, tied heads, half precision, checkpointing, compilation and adapters."""

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.layers import VariationalLayer
from tests.cases import STRUCTURES
from tests.hosts.transformers.families import FAMILIES, build
from tests.oracles import assert_covariance, output_covariance

transformers = pytest.importorskip("transformers")
pytest.importorskip("bayesprune.hosts.transformers")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

pefts_own_warning = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
TOKENS = torch.arange(3, 19).view(2, 8)
RANDOM = ("weight_sampling", "flipout", "local_reparameterization")


def variational_conv1d(std: str = "per_weight", **options) -> VariationalLayer:
    """4 inputs, 3 outputs, in float64, with stds that differ as far as the structure allows."""
    layer = bp.to_variational(Conv1D(3, 4).double(), std=std, relative_std=0.7, **options).double()
    for name in layer.active_names():
        for part in layer.log_std_parts(name):
            part.data += 0.5 * torch.randn_like(part)
    return layer


def affine(x: torch.Tensor):
    return lambda weight, bias: (x @ weight + bias).flatten()


@pytest.mark.parametrize("estimator", RANDOM)
@pytest.mark.parametrize(
    ("std", "shape"), [("per_weight", (3, 4)), ("rank_one", (2, 3, 4)), ("per_channel", (2, 2, 4))]
)
def test_moments_of_the_output(std, estimator, shape):
    layer, x = variational_conv1d(std), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad(), bp.sampling(layer, estimator):
        samples = torch.stack([layer(x).flatten() for _ in range(2000)])
    posteriors = layer.posteriors()
    means = [posteriors[name].mean.detach() for name in ("weight", "bias")]
    covariance = output_covariance(affine(x), means, [posteriors[name].std.detach() for name in ("weight", "bias")])
    index = torch.arange(samples.shape[1])
    units, examples = index % 3, index // (samples.shape[1] // len(x))
    if estimator == "flipout":
        covariance = covariance * (units[:, None] == units) * (examples[:, None] == examples)
    if estimator == "local_reparameterization":
        covariance = covariance.diag().diag()
    assert_covariance(samples, affine(x)(*means), covariance)


def test_propagated_moments_are_exact():
    layer, x = variational_conv1d(), torch.randn(2, 3, 4, dtype=torch.float64)
    posteriors = layer.posteriors()
    found = bp.predict(layer, x, method="moments")
    assert torch.allclose(found.mean, layer.eval()(x), rtol=1e-12)
    weight, bias = (posteriors[name].std.square() for name in ("weight", "bias"))
    assert torch.allclose(found.variance, x.square() @ weight + bias, rtol=1e-12)


def test_stds_number_outputs_along_the_second_dimension():
    shapes = {std: [tuple(p.shape) for p in variational_conv1d(std).log_std_parts("weight")] for std in STRUCTURES}
    assert shapes == {"per_weight": [(4, 3)], "rank_one": [(1, 3), (4, 1)], "per_channel": [(1, 3)]}


@pytest.mark.parametrize(("shape", "estimator"), [((5, 4), RANDOM[2]), ((2, 5, 4), RANDOM[0])])
def test_auto_draws_outputs_only_where_each_weight_meets_one_position(shape, estimator):
    assert variational_conv1d().train().running_estimator(torch.zeros(shape)) == estimator


def test_operation_is_the_stock_forward_to_the_last_bit():
    layer = variational_conv1d().eval()
    for x in (torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)):
        assert torch.equal(layer.operation(x, layer.weight, layer.bias), layer(x))


def test_patterns_of_zeros_run_along_the_inputs():
    layer = bp.to_variational(Conv1D(3, 8))
    bp.prune_weights(layer, "2:4")
    assert (layer.weight.view(2, 4, 3) != 0).sum(1).eq(2).all()


def test_gpt2_is_converted_but_for_embeddings_and_the_head_tied_to_them():
    model = bp.to_variational(build(FAMILIES["GPT-2"]))
    rows = {row.name: row for row in bp.conversion_table(model)}
    assert rows["transformer.h.0.attn.c_attn"].status == "converted"
    assert rows["lm_head"].reason == "a weight is tied to 'transformer.wte' (Embedding), which is deterministic"
    assert sum(row.status == "converted" for row in rows.values()) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stds_are_float32_in_half_precision(dtype):
    model = bp.to_variational(build(FAMILIES["GPT-2"]).to(dtype)).train()
    model(TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("log_std") else dtype), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert model.half().transformer.h[0].mlp.c_fc.weight_log_std.dtype == torch.float32


@pytest.mark.parametrize("family", ["GPT-2", "BERT"])
def test_checkpointed_layers_draw_the_same_noise_again(family):
    model = bp.to_variational(build(FAMILIES[family])).train()
    inputs, gradients = FAMILIES[family].inputs(), []
    for checkpointed in (False, True):
        if checkpointed:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(**inputs).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(map(torch.equal, *gradients))


def test_compiled_layers_train():
    """A block of GPT-2 as a model: compiling all of it takes half a minute."""
    block = bp.to_variational(build(FAMILIES["GPT-2"]).transformer.h[0].mlp).train()
    x = torch.randn(2, 3, 16)
    torch.compile(block, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    stds = [p.grad for name, p in block.named_parameters() if name.endswith("log_std")]
    assert len(stds) == 4
    assert all(grad is not None and grad.isfinite().all() and grad.abs().max() > 0 for grad in stds)


@pefts_own_warning
def test_adapters_are_layers_like_any_other():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query"], r=2)
    model = peft.get_peft_model(build(FAMILIES["BERT"]), config).eval()
    inputs = {"input_ids": TOKENS}
    for parameter in model.parameters():
        parameter.data += 0.01
    before = model(**inputs).logits
    bp.to_variational(model)
    assert torch.equal(model(**inputs).logits, before)
    rows = {row.name.rpartition(".encoder.")[2]: row for row in bp.conversion_table(model)}
    assert rows["layer.0.attention.self.query.lora_A.default"].status == "converted"
    model.train()(**FAMILIES["BERT"].inputs()).loss.backward()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, VariationalLayer)}
    trained = {name for name, layer in layers.items() if layer.weight_log_std.grad is not None}
    assert trained
    assert all("lora" in name for name in trained)
    assert torch.equal(bp.to_deterministic(model.eval())(**inputs).logits, before)


@pefts_own_warning
def test_only_adapters_may_be_converted():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build(FAMILIES["BERT"]), peft.LoraConfig(target_modules=["query"], r=2))
    bp.to_variational(model, filter_fn=lambda _, name: ".lora_" in name)
    names = [name for name, layer in model.named_modules() if isinstance(layer, VariationalLayer)]
    assert len(names) == 4
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in names)
