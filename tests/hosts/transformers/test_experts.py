"""Mixtures of experts of transformers: posteriors, hidden units that leave, MACs, both ways back from the disk."""

import copy
from typing import Any

import pytest
import torch

import bayesprune as bp
from bayesprune.foundation.macs import macs_by_module
from bayesprune.laplace import compensate
from bayesprune.laplace.matrices import input_weight, silenced
from bayesprune.layers.experts import VariationalExperts

transformers = pytest.importorskip("transformers")
pytest.importorskip("bayesprune.hosts.transformers")

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 32}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MIXTURES = {
    "Mixtral": {"intermediate_size": 32, "num_local_experts": 4},
    "Qwen3Moe": {"head_dim": 4, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 16, "num_experts": 4}
    | {"num_experts_per_tok": 2},
    "GptOss": {"head_dim": 4, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    | {"layer_types": ["full_attention"], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}
TOKENS = torch.arange(3, 19).view(2, 8)
mixtures = pytest.mark.parametrize("name", MIXTURES)


def mixture(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **MIXTURES[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if not parameter.any():  # biases
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@mixtures
def test_experts_train_lose_weights_and_units_and_come_back_by_both_ways(name, tmp_path):
    model = mixture(name)
    before = model(TOKENS).logits
    bp.to_variational(model, std="rank_one")
    assert torch.equal(model(TOKENS).logits, before)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, VariationalExperts)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    attachment = bp.attach(optimizer, model, num_data=100)
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    attachment.detach()
    model.eval()
    assert {"down_proj", "gate_up_proj"} <= {r.name.split(".")[-1] for r in bp.prune_weights(model, "weights=0.7").rows}
    report = bp.prune_channels(model, TOKENS, target="macs=0.6", granularity=("mlp",))
    removed = report.removed["model.layers.0.mlp.experts"]
    assert len(removed) > 2 * 32
    bp.save(model, tmp_path)
    expected = model(TOKENS).logits
    for loaded in (bp.load(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(loaded(TOKENS).logits, expected)
        assert isinstance(loaded.model.layers[0].mlp.experts, VariationalExperts)
        assert loaded.model.layers[0].mlp.experts.down_proj.shape == experts.down_proj.shape


@mixtures
def test_all_implementations_count_the_same_macs(name):
    model = mixture(name)
    counts = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.config._experts_implementation = implementation
        counts.append(macs_by_module(model, TOKENS))
    assert counts[0] == counts[1] == counts[2]
    rows, weights = TOKENS.numel() * 2, 16 * 3 * 32  # two experts for every token
    assert counts[0]["model.layers.0.mlp.experts"] == rows * weights


def test_a_uniform_cut_is_in_the_config():
    model = bp.to_variational(mixture("Qwen3Moe"))
    report = bp.prune_channels(model, TOKENS, target="macs=0.6", granularity=("mlp",), uniform=True)
    kept = model.model.layers[0].mlp.experts.intermediate_dim
    assert report.config == {"moe_intermediate_size": kept}
    assert kept < 32


def test_a_router_that_is_a_linear_layer_of_several_outputs_hides_no_experts():
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        **SIZES, intermediate_size=32, intermediate_size_mlp=32, num_local_experts=4, head_dim=4
    )
    model = transformers.Llama4ForCausalLM(config).eval()
    torch.nn.init.normal_(model.model.layers[0].feed_forward.experts.gate_up_proj)
    torch.nn.init.normal_(model.model.layers[0].feed_forward.experts.down_proj)
    report = bp.prune_channels(bp.to_variational(model), TOKENS, target="macs=0.7")
    assert report.removed["model.layers.0.feed_forward.experts"]


@torch.no_grad()
@mixtures
def test_experts_make_up_for_units_that_they_lost_whatever_a_mask_hides(name):
    dense = bp.to_variational(mixture(name))
    tokens = torch.randint(3, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    lost = [unit for expert in range(4) for unit in range(32 * expert, 32 * expert + 8)]
    experts, units = "model.layers.0.mlp.experts", {}
    mask = (torch.arange(16) < 12).long().expand(8, 16)
    for key, batch in {
        "alone": {"input_ids": tokens[:, :12]},
        "padded": {"input_ids": tokens, "attention_mask": mask},
        "padded otherwise": {"input_ids": tokens.where(mask.bool(), 9), "attention_mask": mask},
    }.items():
        model = copy.deepcopy(dense)
        compensate(model, [batch], {experts: lost})
        units[key] = model.get_submodule(experts).down_proj
        if key == "alone":
            silent = copy.deepcopy(dense)
            down = silent.get_submodule(experts)
            input_weight(down).copy_(silenced(down, lost))
            before, now = (((net(**batch).logits - dense(**batch).logits) ** 2).mean() for net in (silent, model))
            assert now < 0.7 * before
    assert not torch.equal(units["alone"], silenced(dense.get_submodule(experts), lost))
    assert torch.allclose(units["padded"], units["alone"], atol=1e-4)
    assert torch.allclose(units["padded"], units["padded otherwise"], atol=1e-4)
