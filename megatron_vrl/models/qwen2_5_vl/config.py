"""Sizes of Qwen2.5-VL, read from config.json.

Two layouts of config.json are in use: the released checkpoints have the language model's keys at
the top level (`rope_scaling`), transformers 5 nests them in `text_config` (`rope_parameters`). No
key has a default.
"""

from collections.abc import Mapping
from typing import Any

from megatron_vrl.models.architecture import Architecture, VisionArchitecture


def parse_config(raw: Mapping[str, Any]) -> Architecture:
    """Return the Architecture of a parsed config.json. Raise KeyError if a key is missing."""
    text = {**raw, **raw.get("text_config", {})}
    rope = text.get("rope_parameters") or {**text["rope_scaling"], "rope_theta": text["rope_theta"]}
    vision = raw["vision_config"]
    return Architecture(
        family=raw["model_type"],
        hidden=text["hidden_size"],
        mlp=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["hidden_size"] // text["num_attention_heads"],
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
        qkv_bias=True,
        vision=VisionArchitecture(
            hidden=vision["hidden_size"],
            mlp=vision["intermediate_size"],
            layers=vision["depth"],
            heads=vision["num_heads"],
            patch=vision["patch_size"],
            temporal_patch=vision["temporal_patch_size"],
            merge=vision["spatial_merge_size"],
            window=vision["window_size"],
            full_attention_layers=tuple(vision["fullatt_block_indexes"]),
            channels=vision.get("in_channels", vision.get("in_chans", 3)),
            tokens_per_second=vision["tokens_per_second"],
        ),
    )
