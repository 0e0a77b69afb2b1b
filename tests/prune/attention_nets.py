"""Tiny models with attention of every arrangement: queries, keys and values apart or fused, shared, with biases."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from bayesprune.foundation.model import run_forward, tensors_in

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {"vocab_size": 64, "max_position_embeddings": 32, **_SIZES}
_TWO_LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
_STACKS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32, **_TWO_LAYERS}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class AttentionCase:
    """A model, its inputs, and for each set of heads that leave together how many units and query heads it has."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    units: list[tuple[int, int]]

    def net(self) -> nn.Module:
        torch.manual_seed(3)
        net = self.build().eval()
        for parameter in net.parameters():  # initial weights of 0.02 would make every head the same
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        return net


def output_of(net: nn.Module, inputs: Any) -> Tensor:
    return next(tensors_in(run_forward(net, inputs)))


def _ids(length: int = 7) -> Tensor:
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(0))


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": _ids()}


def _tokens_twice() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(5)}


def _image(size: int = 32) -> Tensor:
    return torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(0))


def _of(config: str, model: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**options))


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **options)


def _swin() -> Callable[[], nn.Module]:
    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    return _of("SwinConfig", "SwinForImageClassification", window_size=4, **sizes)


def _deberta() -> Callable[[], nn.Module]:
    options = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    return _of("DebertaV2Config", "DebertaV2ForSequenceClassification", **options, **_TEXT)


ATTENTION = [
    AttentionCase("bert", _of("BertConfig", "BertForSequenceClassification", **_TEXT), _tokens, [(4, 1)] * 2),
    AttentionCase("deberta", _deberta(), _tokens, [(4, 1)] * 2),
    AttentionCase(
        "llama", _of("LlamaConfig", "LlamaForCausalLM", num_key_value_heads=2, **_TEXT), _tokens, [(2, 2)] * 2
    ),
    AttentionCase(
        "gemma",
        _of("GemmaConfig", "GemmaForCausalLM", num_key_value_heads=1, head_dim=8, **_TEXT),
        _tokens,
        [(4, 1)] * 2,
    ),
    AttentionCase("gpt_neox", _of("GPTNeoXConfig", "GPTNeoXForCausalLM", **_TEXT), _tokens, [(4, 1)] * 2),
    AttentionCase(
        "falcon",
        _of("FalconConfig", "FalconForCausalLM", num_kv_heads=2, new_decoder_architecture=True, **_TEXT),
        _tokens,
        [(2, 2)] * 2,
    ),
    AttentionCase(
        "gpt2",
        _of("GPT2Config", "GPT2LMHeadModel", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, **_SPECIAL),
        _tokens,
        [(4, 1)] * 2,
    ),
    AttentionCase(
        "t5",
        _of(
            *("T5Config", "T5ForConditionalGeneration"),
            vocab_size=64,
            **_T5,
        ),
        _tokens_twice,
        [(4, 1)] * 3,
    ),
    AttentionCase("mpnet", _of("MPNetConfig", "MPNetForSequenceClassification", **_TEXT), _tokens, [(4, 1)]),
    AttentionCase(
        "albert",
        _of("AlbertConfig", "AlbertForSequenceClassification", embedding_size=16, **_TEXT),
        _tokens,
        [(4, 1)],
    ),
    AttentionCase(
        "bart",
        _of("BartConfig", "BartForConditionalGeneration", vocab_size=64, max_position_embeddings=32, **_STACKS),
        _tokens_twice,
        [(4, 1)] * 6,
    ),
    AttentionCase(
        "vit",
        _of("ViTConfig", "ViTForImageClassification", image_size=32, patch_size=8, **_SIZES),
        lambda: {"pixel_values": _image()},
        [(4, 1)] * 2,
    ),
    AttentionCase("swin", _swin(), lambda: {"pixel_values": _image()}, [(2, 1)] * 2 + [(4, 1)] * 2),
    AttentionCase(
        "timm_vit",
        _timm("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48),
        _image,
        [(3, 1)] * 2,
    ),
    AttentionCase(
        "timm_swin",
        _timm("swin_tiny_patch4_window7_224", img_size=56, depths=(2, 2), num_heads=(2, 4), embed_dim=32),
        lambda: _image(56),
        [(2, 1)] * 2 + [(4, 1)] * 2,
    ),
]
BY_NAME = {case.name: case for case in ATTENTION}
attention = pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name)
