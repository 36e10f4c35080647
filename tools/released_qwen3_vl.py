"""Config, processor and files of a tiny Qwen3-VL, for make_tiny_model.py.

The files are those of the released Qwen3-VL-4B-Instruct: a config.json with `text_config`, the chat
template in chat_template.json, and one preprocessor file each for images and videos.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from released_layout import generation_config, write_tokenizer

Json = dict[str, Any]

PATCH = 16
MAX_FRAMES = 64  # of a video with the most pixels a frame
# What the released template renders for texts, images and videos, without its tools.
CHAT_TEMPLATE = (
    "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].content is string %}{{- messages[0].content }}"
    "{%- else %}{%- for content in messages[0].content %}"
    "{%- if 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- set image_count = namespace(value=0) %}{%- set video_count = namespace(value=0) %}"
    "{%- for message in messages %}{%- if message.role in ('user', 'assistant') %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for content in message.content %}"
    "{%- if content.type == 'image' or 'image' in content or 'image_url' in content %}"
    "{%- set image_count.value = image_count.value + 1 %}"
    "{%- if add_vision_id %}Picture {{ image_count.value }}: {% endif -%}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif content.type == 'video' or 'video' in content %}"
    "{%- set video_count.value = video_count.value + 1 %}"
    "{%- if add_vision_id %}Video {{ video_count.value }}: {% endif -%}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Texts of a prompt that the tokenizer learns from, beside those of the tasks.
TEXTS = ["<0.5 seconds>"] * 8


def make_config(args: argparse.Namespace, tokenizer: Any) -> Any:
    """Return the config. Half of the rotary pairs count time, as in the tiny Qwen2.5-VL.

    The released models have three DeepStack features. Here the first half of the layers, which two
    pipeline stages put on the first one, and the tower's blocks but the last may be fewer.
    """
    from transformers import Qwen3VLConfig

    features = min(3, args.layers // 2, args.vision_layers - 1)
    pairs = args.hidden // args.heads // 2
    third = pairs // 4
    token = tokenizer.convert_tokens_to_ids
    return Qwen3VLConfig(  # type: ignore[call-arg]
        text_config={
            "vocab_size": args.vocab,
            "hidden_size": args.hidden,
            "intermediate_size": args.mlp,
            "num_hidden_layers": args.layers,
            "num_attention_heads": args.heads,
            "num_key_value_heads": args.kv_heads,
            "head_dim": args.hidden // args.heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": args.rope_base,
                "mrope_section": [pairs - 2 * third, third, third],
                "mrope_interleaved": True,
            },
            "initializer_range": args.init_std,
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": args.vision_layers,
            "hidden_size": args.vision_hidden,
            "intermediate_size": args.vision_mlp,
            "num_heads": args.vision_heads,
            "out_hidden_size": args.hidden,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": list(range(features)),
            "initializer_range": args.init_std,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=False,
        initializer_range=args.init_std,
    )


def make_processor(tokenizer: Any, min_pixels: int, max_pixels: int) -> Any:
    """Return transformers' processor, whose files transformers 5 saves."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    half = [0.5, 0.5, 0.5]
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            size=_size(min_pixels, max_pixels), patch_size=PATCH, image_mean=half, image_std=half
        ),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(
            size=_video_size(min_pixels, max_pixels), cap_pixels_per_frame=False
        ),
        chat_template=CHAT_TEMPLATE,
    )


def write_released(directory: Path, config: Any, tokenizer: Any, pixels: tuple[int, int]) -> None:
    """Write the files, replacing those of equal names. `pixels` is (fewest, most) of an image."""
    files = {
        "config.json": _config(config.to_dict()),
        "generation_config.json": generation_config(config.text_config),
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "preprocessor_config.json": _preprocessor(_size(*pixels))
        | {"image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": _preprocessor(_video_size(*pixels))
        | {"video_processor_type": "Qwen3VLVideoProcessor"},
    }
    for name, tree in files.items():
        (directory / name).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(directory, tokenizer, CHAT_TEMPLATE)


def _config(config: Json) -> Json:
    """Return the config with the keys of transformers 4 for rotary embeddings and dtype."""
    text, vision = config["text_config"], config["vision_config"]
    rope = dict(text["rope_parameters"])
    theta = rope.pop("rope_theta")
    own = (
        "attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_act "
        "hidden_size initializer_range intermediate_size max_position_embeddings model_type "
        "num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps use_cache "
        "vocab_size"
    )
    seen = (
        "deepstack_visual_indexes depth hidden_act hidden_size in_channels initializer_range "
        "intermediate_size num_heads num_position_embeddings out_hidden_size patch_size "
        "spatial_merge_size temporal_patch_size"
    )
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]}
    language = {key: text[key] for key in own.split()} | {"dtype": "float32"} | tied
    tokens = "image_token_id video_token_id vision_start_token_id vision_end_token_id"
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        **{key: config[key] for key in tokens.split()},
        "text_config": language | {"rope_scaling": rope, "rope_theta": theta},
        **tied,
        "transformers_version": "4.57.0.dev0",
        "vision_config": {
            **{key: vision[key] for key in seen.split()},
            "model_type": "qwen3_vl",
        },
    }


def _size(fewest: int, most: int) -> Json:
    return {"shortest_edge": fewest, "longest_edge": most}


def _video_size(fewest: int, most: int) -> Json:
    """Return the limits of a video, whose pixels count over all frames: from 2 to MAX_FRAMES."""
    return _size(2 * fewest, MAX_FRAMES * most)


def _preprocessor(size: Json) -> Json:
    return {
        "size": size,
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
