"""Tiny models of the families of transformers, made from their configs by names of sizes, with an input for each.

A family is a folder of `transformers.models`. Its config is the default one with every size made small, its sub-configs
alike; `ADAPTED` holds what has to differ from that for a family to build, to run, or to have the proportions of a real
model where one part would hold nearly all the MACs.
"""

import inspect
import re
from typing import Any

from families_adapted import ADAPTED, HEADS

WIDTH, NUM_HEADS, NUM_LAYERS, VOCABULARY, IMAGE, PATCH = 32, 4, 2, 96, 32, 8

_NAMES = (
    (
        WIDTH,
        (
            "codebook_dim hidden_size d_model n_embd embed_dim embedding_size dim emb_dim hidden_dim model_dim "
            "word_embed_proj_dim "
            "projection_dim text_hidden_size vision_hidden_size encoder_hidden_size decoder_hidden_size "
            "out_hidden_size "
            "embedding_dim projector_hidden_size output_hidden_size project_dim encoder_hidden_dim text_embed_dim "
            "output_dim classifier_proj_size pooler_hidden_size image_text_hidden_size hidden_size_global "
            "attention_size "
            "backbone_hidden_size audio_hidden_size attention_hidden_size moe_hidden_size cross_hidden_size "
            "condition_dim "
            "projection_hidden_dim fusion_hidden_size head_hidden_size patch_embeds_hidden_size text_projection_dim "
            "image_hidden_size proj_codevector_dim xvector_output_dim fpn_hidden_size feature_size_text d_embed "
            "multimodal_hidden_size vision_embed_dim patch_embed_hidden_size vit_dim memory_attention_hidden_size "
            "memory_encoder_hidden_size mask_downsampler_embed_dim memory_fuser_embed_dim image_embedding_size "
            "shared_embed_dim cross_attention_hidden_size projector_dim lru_width perceiver_hidden_size d_latents "
            "adapter_out_dim adapter_in_dim adapter_input_size resampler_dim encoder_dim decoder_dim output_channels "
            "iou_head_hidden_dim"
        ),
    ),
    (
        2 * WIDTH,
        (
            "intermediate_size encoder_ffn_dim decoder_ffn_dim mlp_dim d_ff ffn_dim ffn_hidden_size "
            "moe_intermediate_size "
            "shared_expert_intermediate_size decoder_intermediate_size shared_intermediate_size dim_feedforward "
            "d_inner "
            "dense_intermediate_size moe_shared_expert_intermediate_size encoder_feedforward_dim dim_ff n_inner "
            "intermediate_size_mlp shared_experts_intermediate_size memory_fuser_intermediate_dim linear_units "
            "memory_attention_feed_forward_hidden_size speech_encoder_intermediate_size encoder_linear_units "
            "decoder_linear_units t2u_encoder_ffn_dim t2u_decoder_ffn_dim encoder_intermediate_size "
            "attention_intermediate_size projection_intermediate_size feedforward_size pooler_intermediate_size "
            "block_ff_dim"
        ),
    ),
    (
        NUM_HEADS,
        (
            "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
            "attention_heads "
            "swa_num_attention_heads cross_num_attention_heads decoder_cross_attention_heads "
            "t2u_encoder_attention_heads "
            "t2u_decoder_attention_heads speech_encoder_attention_heads heads resampler_n_heads decoder_num_heads "
            "num_attention_heads_text mamba_n_heads linear_num_heads encoder_num_attention_heads index_n_heads "
            "decoder_num_attention_heads decoder_n_head decoder_self_attention_heads num_self_attention_heads "
            "linear_num_value_heads"
        ),
    ),
    (
        NUM_HEADS // 2,
        (
            "num_key_value_heads swa_num_key_value_heads cross_num_key_value_heads num_kv_heads n_head_kv n_kv_heads "
            "linear_num_key_heads num_key_value_heads_global multi_query_group_num"
        ),
    ),
    (
        WIDTH // NUM_HEADS,
        (
            "head_dim d_kv swa_head_dim cross_head_dim attention_head_dim linear_key_head_dim linear_value_head_dim "
            "linear_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim index_head_dim attention_head_size "
            "kv_channels "
            "head_size dim_head d_head resampler_head_dim resampler_dim_head global_head_dim mamba_d_head rotary_dim"
        ),
    ),
    (
        2 * WIDTH // NUM_HEADS,
        "qk_head_dim",
    ),
    (
        WIDTH // 2,
        "q_lora_rank kv_lora_rank num_pos_feats",
    ),
    (
        NUM_LAYERS,
        (
            "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_blocks layers "
            "num_encoder_layers num_decoder_layers decoder_num_layers text_layers speech_encoder_layers "
            "num_block_layers "
            "t2u_encoder_layers t2u_decoder_layers decoder_depth decoder_num_hidden_layers encoder_num_hidden_layers "
            "conf_num_hidden_layers max_window_layers transformer_layers num_transformer_layers depth_text "
            "resampler_depth num_self_attends_per_block"
        ),
    ),
    (
        VOCABULARY,
        "vocab_size text_vocab_size input_vocab_size output_vocab_size",
    ),
    (
        2,
        (
            "num_experts_per_tok moe_topk top_k moe_top_k num_experts_per_token moe_k moe_router_topk index_topk "
            "n_groups "
            "mask_time_length mask_feature_length mamba_n_groups num_codebooks num_conv_pos_embedding_groups"
        ),
    ),
    (
        4,
        "num_local_experts n_routed_experts num_experts moe_num_experts window_size mamba_num_heads",
    ),
    (
        IMAGE,
        "image_size img_size crop_size pretrain_image_size resolution max_image_size",
    ),
    (
        PATCH,
        "patch_size",
    ),
    (
        8,
        "num_queries num_denoising num_query_tokens train_num_points num_latents num_filters num_conv_pos_embeddings",
    ),
    (
        64,
        "max_position_embeddings n_positions max_source_positions max_target_positions upsample_initial_channel",
    ),
    (
        16,
        "num_position_embeddings context_size sliding_window num_mel_bins mamba_head_dim",
    ),
    (
        1,
        "n_group topk_group",
    ),
    (
        32,
        "codebook_size original_max_position_embeddings codevector_dim base_channels projection_size",
    ),
)
SIZES: dict[str, int] = {name: value for value, names in _NAMES for name in names.split()}
"""Values of the sizes, by their names in configs."""

CHANNELS = re.compile(r"channel|hidden_sizes|dims?$|sizes$|dim_per_stage|filters|neck_hidden|conv_dim")
DEPTHS = re.compile(r"depths|blocks$|num_blocks|blocks_per_stage|numb_of_layers|layer_depths|block_repeats|num_layers")
HEADS_LISTS = re.compile(r"head")
KEPT_LISTS = re.compile(r"kernel|stride|dilation|ratio|upsampl|padding|sections?$|pool|indices|indexes|idx|layers|grid")


def small(value: Any, name: str = "") -> Any:
    """The value of a config with its sizes made small, by their names; dictionaries and lists entry by entry."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        if name in SIZES:
            return SIZES[name]
        if re.search(r"token_(id|index)$", name):
            return value if value < VOCABULARY else 10 + sum(map(ord, name)) % (VOCABULARY - 20)
        return max(8, value // 16) if CHANNELS.search(name) and value > 16 else value
    if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
        if name in ("image_size", "img_size"):
            return [IMAGE] * len(value)
        if name == "patch_size":
            return [PATCH] * len(value)
        if name == "mrope_section":
            return [2, 1, 1]
        if re.search(r"token_(id|index)$", name):
            return [small(item, name) for item in value]
        if KEPT_LISTS.search(name) and not CHANNELS.search(name):
            return [min(item, NUM_LAYERS) for item in value] if DEPTHS.search(name) else list(value)
        if DEPTHS.search(name):
            return [min(item, 1) for item in value]
        if HEADS_LISTS.search(name):
            return [2 if item < NUM_HEADS else NUM_HEADS for item in value]
        if CHANNELS.search(name):
            return [item if item <= 8 else max(8, item // 8) for item in value]
        return list(value)
    if isinstance(value, dict):
        return {key: small(item, key) if isinstance(key, str) else item for key, item in value.items()}
    return value


SKIPPED = {
    *[
        "transformers_version",
        "model_type",
        "architectures",
        "id2label",
        "label2id",
        "dtype",
        "torch_dtype",
        "_name_or_path",
    ],
    *["layer_types", "mlp_layer_types", "_attn_implementation_autoset", "_commit_hash", "problem_type", "return_dict"],
}


def tiny_config(config_class: Any, adapted: dict[str, Any]) -> Any:
    """The config of this class with small sizes; entries of `adapted` win, those of sub-configs under their names."""
    try:
        default = config_class()
    except Exception:  # noqa: BLE001 (what the class wants is in `adapted`)
        default = None
    accepted = inspect.signature(config_class.__init__).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    fields = set(getattr(config_class, "__dataclass_fields__", {})) | set(accepted)
    values: dict[str, Any] = {}
    known = {} if default is None else {**default.to_dict(), **{k: v for k, v in vars(default).items() if k in fields}}
    for name, value in known.items():
        if name in SKIPPED or name.startswith("_") or not (takes_all or name in fields):
            continue
        if hasattr(value, "to_dict"):
            if (entry := adapted.get(name, {})) is None or "sub_config_class" in entry:
                continue
            values[name] = tiny_config(type(value), entry)
        elif isinstance(value, dict) and name in getattr(config_class, "sub_configs", {}):
            continue
        elif (changed := small(value, name)) != value:
            values[name] = changed
    if default is None:
        values |= {name: SIZES[name] for name in fields & set(SIZES)}
    if "num_key_value_heads" in values and known.get("num_attention_heads") == known["num_key_value_heads"]:
        values["num_key_value_heads"] = values.get("num_attention_heads", NUM_HEADS)
    for name, value in adapted.items():
        if isinstance(value, dict) and "sub_config_class" in value:
            values[name] = tiny_config(
                config_of(value["sub_config_class"]), {k: v for k, v in value.items() if k != "sub_config_class"}
            )
        elif not hasattr(values.get(name), "to_dict"):
            values[name] = value
    if default is not None and "layer_types" in fields and "layer_types" not in values:
        values |= layer_types(default, values)
    return config_class(**values)


def layer_types(default: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The kinds of the first layers that differ, where the config lists a kind for each layer."""
    found: dict[str, Any] = {}
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(default, name, None)
        if isinstance(kinds, list) and kinds:
            some = list(dict.fromkeys(kinds))
            found[name] = (some * NUM_LAYERS)[: max(NUM_LAYERS, len(some))]
    if found:
        length = max(map(len, found.values()))
        found = {name: (kinds * length)[:length] for name, kinds in found.items()}
        for name in ("num_hidden_layers", "num_layers", "n_layer"):
            if name in values:
                found[name] = length
    return found


def config_of(model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


# The first of these mappings that has the model gives its class: those whose loss needs no more than labels.
TASKS = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MASKED_LM",
    "CTC",
    "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION",
)
AUTO = {
    "SEQ_TO_SEQ_CAUSAL_LM": "AutoModelForSeq2SeqLM",
    "SPEECH_SEQ_2_SEQ": "AutoModelForSpeechSeq2Seq",
    "IMAGE_CLASSIFICATION": "AutoModelForImageClassification",
    "VIDEO_CLASSIFICATION": "AutoModelForVideoClassification",
    "AUDIO_CLASSIFICATION": "AutoModelForAudioClassification",
    "SEQUENCE_CLASSIFICATION": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "IMAGE_TEXT_TO_TEXT": "AutoModelForImageTextToText",
    "MASKED_LM": "AutoModelForMaskedLM",
    "CTC": "AutoModelForCTC",
    "SEMANTIC_SEGMENTATION": "AutoModelForSemanticSegmentation",
    "DEPTH_ESTIMATION": "AutoModelForDepthEstimation",
    "": "AutoModel",
}


def families() -> dict[str, str]:
    """The model types that stand for the families, by family: the folders of `transformers.models` with a model."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    mapped = {t for name, entries in vars(modeling_auto).items() if name.endswith("MAPPING_NAMES") for t in entries}
    found: dict[str, list[str]] = {}
    for model_type in CONFIG_MAPPING_NAMES:
        if model_type in mapped:
            found.setdefault(model_type_to_module_name(model_type), []).append(model_type)
    return {
        family: next((t for t in types if t.replace("-", "_") == family), types[0])
        for family, types in sorted(found.items())
    }


def model_class(model_type: str) -> tuple[Any, str]:
    """The class that is tried for a model type, and the Auto class that loads it."""
    import transformers
    from transformers.models.auto import modeling_auto

    if model_type in HEADS:
        return getattr(transformers, HEADS[model_type]), "AutoModel"
    decoders = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    for task in TASKS:
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
        is_decoder = task == "SEQUENCE_CLASSIFICATION" and model_type in decoders
        if is_decoder and model_type not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            continue
        if model_type in names:
            name = names[model_type] if isinstance(names[model_type], str) else names[model_type][0]
            return with_auto_class(getattr(transformers, name), AUTO[task])
    other = {t: n for k, v in vars(modeling_auto).items() if k.endswith("MAPPING_NAMES") for t, n in v.items()}
    is_known = model_type in modeling_auto.MODEL_MAPPING_NAMES
    name = modeling_auto.MODEL_MAPPING_NAMES[model_type] if is_known else other[model_type]
    return with_auto_class(getattr(transformers, name if isinstance(name, str) else name[0]), "AutoModel")


def with_auto_class(kind: Any, auto: str) -> tuple[Any, str]:
    """The class with the Auto class that loads it, or by its own name where the Auto class does not know its config."""
    import transformers

    return kind, auto if kind.config_class in getattr(transformers, auto)._model_mapping else kind.__name__


def build(model_type: str, *, most_parameters: int | None = None) -> Any:
    """The tiny model, in evaluation mode.

    Raises:
        ValueError: it would have more parameters than that.
    """
    import torch

    kind, _ = model_class(model_type)
    config = tiny_config(kind.config_class, ADAPTED.get(model_type, {}))
    if most_parameters is not None:
        with torch.device("meta"):
            number = sum(parameter.numel() for parameter in kind(config).parameters())
        if number > most_parameters:
            raise ValueError(f"{number:,} parameters with small sizes, more than {most_parameters:,}")
    torch.manual_seed(0)
    return kind(config).eval()
