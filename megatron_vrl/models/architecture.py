"""Sizes of a Qwen2.5-VL model, read from a checkpoint's config.json.

Two layouts of config.json are in use: the released checkpoints have the language model's keys at
the top level (`rope_scaling`), transformers 5 nests them in `text_config` (`rope_parameters`). No
key has a default; a missing key is a CheckpointError.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vrl.config import Parallel
from megatron_vrl.errors import CheckpointError
from megatron_vrl.storage.no_checkpoint import advice


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionArchitecture:
    """Sizes of the vision tower."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    patch: int  # pixels
    temporal_patch: int  # frames
    merge: int  # patches per side of one token
    window: int  # pixels per side of a window-attention block
    full_attention_layers: tuple[int, ...]  # 0-based
    channels: int
    tokens_per_second: float

    @property
    def patch_values(self) -> int:
        """Return the number of input values of one patch, over all frames of its temporal step."""
        return self.channels * self.temporal_patch * self.patch**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Sizes of the language model, and of the vision tower in `vision`."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    rope_base: float
    mrope_section: tuple[int, int, int]  # pairs of channels for time, height, width
    norm_eps: float
    tied_head: bool
    max_positions: int
    video_token: int
    image_token: int
    vision_start_token: int
    vision: VisionArchitecture

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


def read_architecture(path: str | Path) -> Architecture:
    """Return the Architecture of `path`: a checkpoint directory with config.json, or the JSON file
    itself.

    Raise CheckpointError if the file is absent, describes another model or lacks a key.
    """
    file = Path(path)
    file = file if file.suffix == ".json" else file / "config.json"
    try:
        raw = json.loads(file.read_text())
    except OSError as error:
        if known := advice(file.parent if file.name == "config.json" else file):
            raise CheckpointError(known) from None
        raise CheckpointError(f"Cannot read {file}: {error.strerror}. Give a checkpoint.") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{file} is not JSON ({error}): restore it from the checkpoint."
        ) from None
    if raw.get("model_type") != "qwen2_5_vl":
        raise CheckpointError(
            f"{file} describes model_type={raw.get('model_type')!r}, not 'qwen2_5_vl': "
            "give a Qwen2.5-VL checkpoint."
        )
    _check_not_quantised(file, raw)
    try:
        return _parse(raw)
    except KeyError as error:
        raise CheckpointError(
            f"{file} lacks the key {error}: take the released config.json."
        ) from None


def config_dtype(directory: str | Path) -> str | None:
    """Return the dtype in DIR/config.json, for example "bfloat16"; None if there is none."""
    raw = json.loads((Path(directory) / "config.json").read_text())
    text = raw.get("text_config") or {}
    keys = ("dtype", "torch_dtype")
    dtypes = (part[key] for part in (raw, text) for key in keys if part.get(key))
    return next(dtypes, None)


def _check_not_quantised(file: Path, raw: dict[str, Any]) -> None:
    """Raise CheckpointError if config.json describes quantised weights."""
    for part in (raw, raw.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                values = part[key] if isinstance(part[key], dict) else {}
                method = values.get("quant_method", "an unnamed method")
                raise CheckpointError(
                    f"{file} has a {key} ({method}): quantised weights are not read, give the "
                    "checkpoint in bfloat16, float16 or float32."
                )


def _parse(raw: dict[str, Any]) -> Architecture:
    """Return the Architecture of a parsed config.json. Raise KeyError if a key is missing."""
    text = {**raw, **raw.get("text_config", {})}
    rope = text.get("rope_parameters") or {**text["rope_scaling"], "rope_theta": text["rope_theta"]}
    vision = raw["vision_config"]
    return Architecture(
        hidden=text["hidden_size"],
        mlp=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        vocab=text["vocab_size"],
        rope_base=rope["rope_theta"],
        mrope_section=tuple(rope["mrope_section"]),
        norm_eps=text["rms_norm_eps"],
        tied_head=raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
        max_positions=text["max_position_embeddings"],
        video_token=raw["video_token_id"],
        image_token=raw["image_token_id"],
        vision_start_token=raw["vision_start_token_id"],
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


def padded_vocab(arch: Architecture, cfg: Parallel) -> int:
    """Return the rows of the embedding: the vocabulary padded to a multiple of the tensor-parallel
    size.

    Padding rows are zero; they are never sampled, trained or exported.
    """
    return -(-arch.vocab // cfg.tensor) * cfg.tensor
