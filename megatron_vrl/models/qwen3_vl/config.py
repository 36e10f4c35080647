"""Sizes of a dense Qwen3-VL model, read from config.json.

The released checkpoints have `rope_scaling` and `rope_theta` in `text_config`, transformers 5
writes `rope_parameters`. No key has a default.
"""

from collections.abc import Mapping
from math import isqrt
from typing import Any

from megatron_vrl.models.architecture import Architecture, VisionArchitecture


def parse_config(raw: Mapping[str, Any]) -> Architecture:
    """Return the Architecture of a parsed config.json. Raise KeyError if a key is missing."""
    text, vision = raw["text_config"], raw["vision_config"]
    rope = text.get("rope_parameters") or {**text["rope_scaling"], "rope_theta": text["rope_theta"]}
    return Architecture(
        family=raw["model_type"],
        hidden=text["hidden_size"],
        mlp=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        vocab=text["vocab_size"],
        rope_base=rope["rope_theta"],
        mrope_section=tuple(rope["mrope_section"]),
        norm_eps=text["rms_norm_eps"],
        tied_head=raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
        max_positions=text["max_position_embeddings"],
        video_token=raw["video_token_id"],
        image_token=raw["image_token_id"],
        vision_start_token=raw["vision_start_token_id"],
        vision_end_token=raw["vision_end_token_id"],
        qk_norm=True,
        vision=VisionArchitecture(
            hidden=vision["hidden_size"],
            mlp=vision["intermediate_size"],
            layers=vision["depth"],
            heads=vision["num_heads"],
            patch=vision["patch_size"],
            temporal_patch=vision["temporal_patch_size"],
            merge=vision["spatial_merge_size"],
            channels=vision["in_channels"],
            position_grid=isqrt(vision["num_position_embeddings"]),
            deepstack_layers=tuple(vision["deepstack_visual_indexes"]),
        ),
    )
