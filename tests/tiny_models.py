"""Tiny random checkpoints for tests, built by transformers' own classes.

Apart from tests/tiny.py, so that the processes of a launch need not import transformers.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_vrl.rollout.vllm.torchvision_shim import declare_missing_ops
from tests.tiny import IMAGE_TOKEN, VIDEO_TOKEN, VISION_END, VISION_START

declare_missing_ops()

from transformers import (  # noqa: E402
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

__all__ = [
    "MODELS",
    "Qwen2_5_VLConfig",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLConfig",
    "Qwen3VLForConditionalGeneration",
    "hf_model",
    "model_of_config",
    "qwen3_model",
    "save",
]


def hf_model(
    *, tied: bool = False, kv_heads: int = 2, vocab: int = 96, seed: int = 0, hidden: int = 64
) -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": hidden * 3 // 2,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocab,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [hidden // 32, hidden * 3 // 64, hidden * 3 // 64],
            },
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": tied,
            "bos_token_id": None,
            "eos_token_id": 94,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "out_hidden_size": hidden,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        video_token_id=VIDEO_TOKEN,
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for param in model.parameters():  # larger than the default, so that errors show
            param.normal_(std=0.15).add_(
                1.0 if param.dim() == 1 and len(param) in (32, hidden) else 0
            )
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    model.float().eval()
    return model


def qwen3_model(
    *, tied: bool = False, kv_heads: int = 2, vocab: int = 96, seed: int = 0
) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL whose head size is not hidden / heads.

    Its tower has a block between two DeepStack mergers, a block after the last, and a table of
    positions between the sizes of the test's grids.
    """
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "head_dim": 16,
            "vocab_size": vocab,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": tied,
            "eos_token_id": 94,
        },
        vision_config={
            "depth": 5,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "num_position_embeddings": 25,
            "out_hidden_size": 48,
            "deepstack_visual_indexes": [0, 1, 3],
        },
        video_token_id=VIDEO_TOKEN,
        image_token_id=IMAGE_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.normal_(std=0.15).add_(1.0 if "norm" in name and "weight" in name else 0)
    assert isinstance(model, Qwen3VLForConditionalGeneration)
    model.float().eval()
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "untied": hf_model,
    "tied": partial(hf_model, tied=True, vocab=95),  # which two tensor ranks do not divide
    "four-kv-heads": partial(hf_model, kv_heads=4),
    "qwen3-untied": qwen3_model,
    "qwen3-tied": partial(qwen3_model, tied=True, vocab=95),
    "qwen3-four-kv-heads": partial(qwen3_model, kv_heads=4),
}


def model_of_config(path: Path) -> Any:
    """transformers' model of a config.json, on the meta device."""
    families = {
        "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
        "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    }
    config, model = families[json.loads(path.read_text())["model_type"]]
    with torch.device("meta"):
        return model(config.from_pretrained(path))


def save(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory
