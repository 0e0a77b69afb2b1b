"""Kinds of models beyond the usual ones: routers, recurrences, rotations by complex numbers, transforms."""

from dataclasses import replace

import pytest
import torch

import bayesprune as bp
from tests.moments.test_architectures import (
    CLASSES,
    CLASSIFIER,
    DECODER,
    IDS,
    IMAGE,
    LM,
    PAIR,
    PIXELS,
    TEXT,
    TOKENS,
    HFCase,
    check,
    ids,
    ratio_to_samples,
)

EXPERTS = DECODER | {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
KINDS = {
    "router": HFCase("Mixtral", LM, EXPERTS | {"num_local_experts": 4}, TOKENS),
    "state space": HFCase(
        "Mamba",
        LM,
        {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        {"input_ids": IDS},
    ),
    "router and complex rotations": HFCase(
        "DeepseekV2",
        LM,
        {key: value for key, value in EXPERTS.items() if key != "head_dim"}
        | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8}
        | {"q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 2},
        TOKENS,
    ),
    "windows in memory": HFCase("Longformer", CLASSIFIER, TEXT | {"attention_window": 4}, CLASSES),
    "Fourier transforms": HFCase("FNet", CLASSIFIER, TEXT, CLASSES),
    "images among tokens": HFCase(
        "Llava",
        PAIR,
        {
            "text_config": DECODER | {"model_type": "llama"},
            "vision_config": IMAGE | {"model_type": "clip_vision_model", "projection_dim": 16},
            "image_token_index": 39,
            "image_seq_length": 4,
        },
        {"input_ids": torch.cat([torch.full((2, 4), 39), IDS.clamp_max(38)], 1), "pixel_values": PIXELS},
    ),
}


@pytest.mark.parametrize("case", KINDS.values(), ids=map(ids, KINDS.values()))
def test_moments_and_their_gradients(case):
    model = case.model("eager")
    with torch.no_grad():
        expected = model(**case.inputs)
    bp.to_variational(model, relative_std=0.02)
    with bp.sampling(model, "moments"):
        output = model(**case.inputs)
    check(output.logits, expected.logits)
    torch.testing.assert_close(output.logits.mean + 0, expected.logits, rtol=0.3, atol=0.3)
    (output.logits.mean.square().sum() + output.logits.variance.sum()).backward()
    stds = [p for name, p in model.named_parameters() if name.endswith("_log_std") and p.grad is not None]
    assert stds
    assert all(p.grad.isfinite().all() for p in stds)


@pytest.mark.parametrize("name", ["router", "state space"])
def test_against_weight_samples(name):
    case = replace(KINDS[name], config=KINDS[name].config | {"hidden_size": 48, "intermediate_size": 64})
    model = case.model("eager")
    assert 0.6 < ratio_to_samples(model, lambda: model(**case.inputs).logits, 50) < 1.6
