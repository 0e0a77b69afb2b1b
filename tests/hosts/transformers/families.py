"""Tiny models of thirty families of transformers, made from their configs, with inputs for each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """A tiny model: its class, the values of its config that are not the default, its inputs, its Auto class."""

    model: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    auto: str


def randint(high: int, *shape: int) -> Any:
    import torch

    return torch.randint(3, high, shape, generator=torch.Generator().manual_seed(1))


def randn(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def classified_text() -> dict[str, Any]:
    return {"input_ids": randint(60, 2, 8), "labels": randint(5, 2) - 3}


def generated_text() -> dict[str, Any]:
    tokens = randint(60, 2, 8)
    return {"input_ids": tokens, "labels": tokens}


def translated_text() -> dict[str, Any]:
    return {"input_ids": randint(60, 2, 8), "labels": randint(60, 2, 6)}


def classified_images() -> dict[str, Any]:
    return {"pixel_values": randn(2, 3, 32, 32), "labels": randint(5, 2) - 3}


def images_and_texts() -> dict[str, Any]:
    return {"input_ids": randint(60, 2, 8), "pixel_values": randn(2, 3, 32, 32), "return_loss": True}


def transcribed_audio() -> dict[str, Any]:
    return {"input_features": randn(2, 8, 40), "labels": randint(60, 2, 6)}


def classified_audio() -> dict[str, Any]:
    return {"input_values": randn(2, 800), "labels": randint(5, 2) - 3}


SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = {**SIZES, "intermediate_size": 64, "max_position_embeddings": 32, "pad_token_id": 0}
DECODER = {**SIZES, "intermediate_size": 64, "max_position_embeddings": 32}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**DECODER, **TOKENS, "num_key_value_heads": 2}
VIT = {key: value for key, value in SIZES.items() if key != "vocab_size"}
VIT |= {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
CLASSIFIER, CAUSAL, SEQ2SEQ = "AutoModelForSequenceClassification", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
IMAGE = "AutoModelForImageClassification"


def text(model: str, config: dict[str, Any]) -> Family:
    return Family(model, config, classified_text, CLASSIFIER)


def causal(model: str, config: dict[str, Any]) -> Family:
    return Family(model, config, generated_text, CAUSAL)


TRANSLATORS = ("T5", "BART", "Whisper")
FAMILIES = {
    "BERT": text("BertForSequenceClassification", ENCODER),
    "RoBERTa": text("RobertaForSequenceClassification", ENCODER),
    "DistilBERT": text(
        "DistilBertForSequenceClassification",
        {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 32},
    ),
    "ModernBERT": text("ModernBertForSequenceClassification", {**ENCODER, **TOKENS, "cls_token_id": 1}),
    "DeBERTa-v2": text(
        "DebertaV2ForSequenceClassification",
        {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "ELECTRA": text("ElectraForSequenceClassification", {**ENCODER, "embedding_size": 8}),
    "ALBERT": text("AlbertForSequenceClassification", {**ENCODER, "embedding_size": 8}),
    "MPNet": text("MPNetForSequenceClassification", ENCODER),
    "T5": Family(
        "T5ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 64, "num_layers": 2, "num_heads": 4, **TOKENS}
        | {"decoder_start_token_id": 0},
        translated_text,
        SEQ2SEQ,
    ),
    "BART": Family(
        "BartForConditionalGeneration",
        {"vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64}
        | {"decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, **TOKENS}
        | {"max_position_embeddings": 32, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
        translated_text,
        SEQ2SEQ,
    ),
    "GPT-2": causal(
        "GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, **TOKENS}
    ),
    "GPT-NeoX": causal("GPTNeoXForCausalLM", {**DECODER, **TOKENS}),
    "OPT": causal(
        "OPTForCausalLM",
        {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 32, **TOKENS},
    ),
    "Llama": causal("LlamaForCausalLM", GROUPED),
    "Mistral": causal("MistralForCausalLM", GROUPED),
    "Qwen2": causal("Qwen2ForCausalLM", GROUPED),
    "Qwen3": causal("Qwen3ForCausalLM", {**GROUPED, "head_dim": 4}),
    "Gemma": causal("GemmaForCausalLM", {**GROUPED, "head_dim": 4}),
    "Phi": causal("PhiForCausalLM", {**DECODER, **TOKENS}),
    "BLOOM": causal("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 4, **TOKENS}),
    "Falcon": causal("FalconForCausalLM", {**SIZES, **TOKENS, "ffn_hidden_size": 64}),
    "Mixtral": causal("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "Qwen2-MoE": causal(
        "Qwen2MoeForCausalLM",
        {**GROUPED, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "ViT": Family("ViTForImageClassification", VIT, classified_images, IMAGE),
    "DeiT": Family("DeiTForImageClassification", VIT, classified_images, IMAGE),
    "Swin": Family(
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        classified_images,
        IMAGE,
    ),
    "ConvNeXt": Family(
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
        classified_images,
        IMAGE,
    ),
    "CLIP": Family(
        "CLIPModel",
        {"text_config": {**ENCODER, **TOKENS}, "vision_config": VIT, "projection_dim": 16},
        images_and_texts,
        "AutoModel",
    ),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        {"vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64}
        | {"decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8}
        | {"max_source_positions": 20, "max_target_positions": 16, **TOKENS, "decoder_start_token_id": 1}
        | {"suppress_tokens": None, "begin_suppress_tokens": None},
        transcribed_audio,
        "AutoModelForSpeechSeq2Seq",
    ),
    "Wav2Vec2": Family(
        "Wav2Vec2ForSequenceClassification",
        {**SIZES, "intermediate_size": 64, "conv_dim": [16, 16], "conv_kernel": [10, 4], "conv_stride": [5, 4]}
        | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16}
        | {"mask_time_prob": 0.0, "apply_spec_augment": False},
        classified_audio,
        "AutoModelForAudioClassification",
    ),
}


def build(family: Family) -> Any:
    import torch
    import transformers

    model_class = getattr(transformers, family.model)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**family.config)).eval()


def example_inputs(name: str) -> dict[str, Any]:
    """What `prune_channels` gets: the inputs without labels."""
    inputs = FAMILIES[name].inputs()
    if name in TRANSLATORS:
        inputs["decoder_input_ids"] = inputs["labels"]
    return {key: value for key, value in inputs.items() if key not in ("labels", "return_loss")}


def prompt(name: str) -> dict[str, Any] | None:
    """What `generate` gets, for families that generate text."""
    if name in TRANSLATORS or FAMILIES[name].auto == CAUSAL:
        return {key: value for key, value in FAMILIES[name].inputs().items() if key != "labels"}
    return None
