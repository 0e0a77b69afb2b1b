"""What FSDP 2 needs of a model before it is sharded; the runs themselves are in test_callback_distributed.py."""

import pytest
import torch

import bayesprune as bp
from bayesprune.errors import UnsupportedModelError
from bayesprune.hosts.transformers.guards import check_dtypes, freeze_stds, thaw
from tests.hosts.transformers import tiny


def training(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_stds_are_frozen_for_a_while():
    """What the user froze stays frozen."""
    model = tiny.llama()
    model.model.layers[0].requires_grad_(False)
    bp.to_variational(model, std="rank_one")
    before = training(model)
    frozen = freeze_stds(model)
    assert training(model) == {name for name in before if "log_std" not in name}
    thaw(frozen)
    assert training(model) == before
    assert any("layers.1" in name and "log_std" in name for name in before)


def test_half_precision_is_refused_unless_it_is_mixed():
    model = bp.to_variational(tiny.llama().to(torch.bfloat16))
    check_dtypes(bp.to_variational(tiny.llama()), "no")
    check_dtypes(model, "bf16")
    message = r"layers.0.self_attn.q_proj in torch.bfloat16.*dtype=torch.float32.*TrainingArguments\(bf16=True\)"
    with pytest.raises(UnsupportedModelError, match=message):
        check_dtypes(model, "no")
