"""What families of transformers need beside small sizes: values of configs by model type, and the classes tried."""

from typing import Any

RESNET = {"sub_config_class": "resnet", "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "embedding_size": 8}
BACKBONE = {**RESNET, "out_features": ["stage4"]}
BACKBONES = {**RESNET, "out_features": ["stage2", "stage3", "stage4"]}
SWIN = {
    "sub_config_class": "swin",
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 2, 4, 4],
    "window_size": 4,
}
SWIN |= {"image_size": 64, "patch_size": 2, "window_size": 4}
SWINS = {**SWIN, "out_features": ["stage1", "stage2", "stage3", "stage4"]}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
QWEN_VISION = {"embed_dim": 32, "num_heads": 4, "mlp_ratio": 2, "hidden_size": 32, "depth": 2}
QWEN_VL = {"text_config": {"rope_parameters": MROPE}, "vision_config": QWEN_VISION}
EFFICIENTNET = {"width_coefficient": 0.25, "hidden_dim": 320, "depthwise_padding": []}
# As the one at 48 kHz; the weights of the one at 24 kHz are parametrized, which `to_variational` refuses.
ENCODEC = {"num_filters": 4, "norm_type": "time_group_norm", "use_causal_conv": False, "normalize": True}
MINICPM = {"vision_config": {"hidden_size": 12}}  # as in the real ones, no multiple of the text's width
INKLING = {"text_config": {"unpadded_vocab_size": 96, "rel_extent": 16, "sliding_window_size": 16}}
FORECAST = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}

ADAPTED: dict[str, dict[str, Any]] = {
    "align": {"vision_config": EFFICIENTNET},
    "autoformer": FORECAST | {"label_length": 4},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "bit": {"num_groups": 4},
    "conditional_detr": {"backbone_config": BACKBONE},
    "csm": {"codec_config": None},
    "dab-detr": {"backbone_config": BACKBONE},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deformable_detr": {"backbone_config": BACKBONES, "num_feature_levels": 3},
    "detr": {"backbone_config": BACKBONE},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 8},
    "decision_transformer": {"n_positions": 64},
    "donut-swin": {"num_heads": [2, 2, 4, 4], "image_size": 64, "patch_size": 2},
    "dory": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "dpt": {"neck_hidden_sizes": [8, 16, 16, 32], "num_hidden_layers": 4, "backbone_out_indices": [1, 2, 3, 4]},
    "efficientnet": EFFICIENTNET,
    "encodec": ENCODEC,
    "encoder-decoder": {"decoder_start_token_id": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "swin": {"embed_dim": 16, "num_heads": [2, 2, 4, 4], "image_size": 64, "patch_size": 2},
    "swinv2": {"embed_dim": 16, "num_heads": [2, 2, 4, 4], "image_size": 64, "patch_size": 2},
    "udop": {"decoder_start_token_id": 0},
    "vitpose": {
        "backbone_config": {"sub_config_class": "vitpose_backbone", "image_size": [32, 32], "patch_size": [8, 8]}
    },
    "vitpose_backbone": {"image_size": [32, 32], "patch_size": [8, 8]},
    "wavtokenizer": {
        "num_filters": 2,
        "hidden_size": 32,
        "codebook_dim": 32,
        "decoder_hidden_size": 48,
        "decoder_intermediate_size": 144,
        "decoder_num_layers": 12,
        "decoder_attention_num_groups": 8,
    },
    "wav2vec2-bert": {"feature_projection_input_dim": 16},
    "wav2vec2": {"mask_time_length": 2, "mask_feature_length": 2},
    "xlstm": {"num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "esmc": {"num_key_value_heads": 4},
    "fsmt": {"src_vocab_size": 96, "tgt_vocab_size": 96},
    "gemma4": {"text_config": {"vocab_size_per_layer_input": 96}},
    "glm4v": {"text_config": {"rope_parameters": MROPE}},
    "glm46v": {"text_config": {"sub_config_class": "glm4v_text", "rope_parameters": MROPE}},
    "glm4v_moe": {"text_config": {"rope_parameters": MROPE}},
    "glm_ocr": {"text_config": {"rope_parameters": MROPE}},
    "glmga": {"text_config": {"rope_parameters": MROPE}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "grounding-dino": {"backbone_config": SWINS},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "informer": FORECAST,
    "inkling2": INKLING,
    "inkling2_loop": INKLING,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": 32},
    "led": {"attention_window": 16},
    "lilt": {"hidden_size": 48},
    "longformer": {"attention_window": 16},
    "longt5": {"decoder_start_token_id": 0},
    "luke": {"entity_vocab_size": 96},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "mask2former": {"backbone_config": SWINS},
    "maskformer": {"backbone_config": SWINS},
    "mgp-str": {"num_bpe_labels": 96, "num_wordpiece_labels": 96},
    "mimi": {"upsample_groups": 8},
    "minicpm_ocr": MINICPM,
    "minicpmv4_6": MINICPM,
    "minicpmv4_7": MINICPM,
    "ministral": {"head_dim": 8},
    "mm-grounding-dino": {"backbone_config": SWINS},
    "mobilenet_v1": {"depth_multiplier": 0.125},
    "mobilevit": {"hidden_sizes": [16, 24, 32]},
    "mobilevitv2": {"image_size": 128, "patch_size": 2, "width_multiplier": 0.25},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemotron": {"head_dim": 8},
    "oneformer": {"backbone_config": SWINS},
    "omdet-turbo": {"backbone_config": SWINS},
    "opt": {"word_embed_proj_dim": 32},
    "paddleocr_vl": {"text_config": {"rope_parameters": MROPE}},
    "pegasus_x": {"block_size": 16, "num_global_tokens": 2},
    "qwen2_5_vl": QWEN_VL,
    "qwen2_vl": QWEN_VL,
    "qwen3_vl": {"text_config": {"rope_parameters": MROPE}},
    "qwen3_vl_moe": {"text_config": {"rope_parameters": MROPE}},
    "colqwen2": {"vlm_config": {"sub_config_class": "qwen2_vl", **QWEN_VL}},
    "reformer": {"axial_pos_shape": [2, 4], "feed_forward_size": 64},
    "rt_detr": {"backbone_config": BACKBONES, "num_denoising": 0},
    "rt_detr_v2": {"backbone_config": BACKBONES, "num_denoising": 0},
    "switch_transformers": {"decoder_start_token_id": 0},
    "t5": {"decoder_start_token_id": 0},
    "table-transformer": {"backbone_config": BACKBONE},
    "time_series_transformer": FORECAST,
}

HEADS: dict[str, str] = {}
