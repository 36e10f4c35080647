"""Sizes of a vision-language model, read from a checkpoint's config.json by its family.

The two dataclasses hold what any family needs. A field with a default is a feature that some
families lack. A key that is missing in config.json is a CheckpointError.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_vrl.config import Parallel
from megatron_vrl.errors import CheckpointError
from megatron_vrl.models.families import FAMILIES, family_named
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
    channels: int
    window: int = 0  # pixels per side of a window-attention block; 0: full attention in each block
    full_attention_layers: tuple[int, ...] = ()  # 0-based, of a tower with windows
    tokens_per_second: float = 0.0  # scale of temporal positions; 0: positions count steps
    position_grid: int = 0  # side of the table of learned positions; 0: rotary positions only
    deepstack_layers: tuple[int, ...] = ()  # 0-based blocks whose output is merged, too (DeepStack)

    @property
    def patch_values(self) -> int:
        """Return the number of input values of one patch, over all frames of its temporal step."""
        return self.channels * self.temporal_patch * self.patch**2


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Sizes of the language model, and of the vision tower in `vision`."""

    family: str  # a row of `families.FAMILIES`
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope_base: float
    mrope_section: tuple[int, int, int]  # pairs of channels for time, height, width
    norm_eps: float
    tied_head: bool
    max_positions: int
    video_token: int
    image_token: int
    vision_start_token: int
    vision_end_token: int
    vision: VisionArchitecture
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head

    @property
    def vision_width(self) -> int:
        """Return the channels of the tower's output for one vision token.

        They are the embedding's, and with DeepStack as many again for each merged block.
        """
        return self.hidden * (1 + len(self.vision.deepstack_layers))


def read_architecture(path: str | Path) -> Architecture:
    """Return the Architecture of `path`: a checkpoint directory with config.json, or the JSON file
    itself.

    Raise CheckpointError if the file is absent, describes another model or lacks a key.
    """
    file = Path(path)
    file = file if file.suffix == ".json" else file / "config.json"
    try:
        raw = json.loads(file.read_bytes())
    except OSError as error:
        if known := advice(file.parent if file.name == "config.json" else file):
            raise CheckpointError(known) from None
        raise CheckpointError(f"Cannot read {file}: {error.strerror}. Give a checkpoint.") from None
    except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
        raise CheckpointError(
            f"{file} is not JSON ({error}): restore it from the checkpoint."
        ) from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} holds no JSON object: restore it from the checkpoint.")
    if raw.get("model_type") not in FAMILIES:
        known = " or ".join(family_named(name).title for name in FAMILIES)
        raise CheckpointError(
            f"{file} describes model_type={raw.get('model_type')!r}, not "
            f"{' or '.join(map(repr, FAMILIES))}: give a {known} checkpoint."
        )
    _check_not_quantised(file, raw)
    try:
        return _checked(family_named(raw["model_type"]).parse_config(raw))
    except KeyError as error:
        raise CheckpointError(
            f"{file} lacks the key {error}: take the released config.json."
        ) from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{file} has a value that no model has ({error}): take the released config.json."
        ) from None


def _checked(arch: Architecture) -> Architecture:
    """Return `arch`. Raise ValueError, naming the field, if a value has a wrong type."""
    try:
        TypeAdapter(Architecture).validate_json(json.dumps(asdict(arch)), strict=True)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        field = ".".join(map(str, wrong["loc"]))
        raise ValueError(f"{field} is {wrong['input']!r:.40}; {wrong['msg']}") from None
    return arch


def config_dtype(directory: str | Path) -> str | None:
    """Return the dtype in DIR/config.json, for example "bfloat16"; None if there is none."""
    raw = json.loads((Path(directory) / "config.json").read_text())
    text = raw.get("text_config") or {}
    keys = ("dtype", "torch_dtype")
    dtypes = (part[key] for part in (raw, text) for key in keys if part.get(key))
    return next(dtypes, None)


def _check_not_quantised(file: Path, raw: dict[str, Any]) -> None:
    """Raise CheckpointError if config.json describes quantised weights."""
    text = raw.get("text_config")
    for part in (raw, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                values = part[key] if isinstance(part[key], dict) else {}
                method = values.get("quant_method", "an unnamed method")
                raise CheckpointError(
                    f"{file} has a {key} ({method}): quantised weights are not read, give the "
                    "checkpoint in bfloat16, float16 or float32."
                )


def padded_vocab(arch: Architecture, cfg: Parallel) -> int:
    """Return the rows of the embedding: the vocabulary padded to a multiple of the tensor-parallel
    size.

    Padding rows are zero; they are never sampled, trained or exported.
    """
    return -(-arch.vocab // cfg.tensor) * cfg.tensor
