"""Which layers and number formats the language model computes with, and whether they are here.

Transformer Engine's layers and attention run on a GPU only, and FP8 only in its layers. A run that
asks for them elsewhere ends in one sentence before anything is built. *Not run yet on a GPU.*
"""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from megatron_vrl.config import Model
from megatron_vrl.errors import ConfigError
from megatron_vrl.model.chunks import check_fp8
from megatron_vrl.model.layers import (
    MEGATRON,
    LayerParts,
    PlannedAttention,
    TransformerEngineAttention,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Our words for where an FP8 scale comes from -> Megatron's: the history of maxima, the tensor
# itself, or each block of 128 of it.
FP8_RECIPES = {"delayed": "delayed", "current": "tensorwise", "blockwise": "blockwise"}


def check_available(cfg: Model, device: torch.device) -> None:
    """Raises ConfigError if this process cannot compute as asked."""
    check_fp8(cfg)
    lacks = "no GPU" if device.type != "cuda" else "no Transformer Engine"
    if device.type == "cuda" and find_spec("transformer_engine") is not None:
        return
    if cfg.layers == "transformer_engine":
        raise ConfigError(
            f"model.layers=transformer_engine, but this machine has {lacks}: set "
            "model.layers=megatron and model.fp8=none."
        )
    if cfg.attention == "transformer_engine":
        raise ConfigError(
            f"model.attention=transformer_engine, but this machine has {lacks}: set "
            "model.attention=sdpa."
        )


def number_formats(cfg: Model) -> dict[str, Any]:
    """Arguments of TransformerConfig."""
    dtype = DTYPES[cfg.dtype]
    formats: dict[str, Any] = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": cfg.dtype == "bfloat16",
    }
    if cfg.fp8 != "none":  # e4m3 forward, e5m2 for gradients
        formats |= {"fp8": "hybrid", "fp8_recipe": FP8_RECIPES[cfg.fp8]}
    return formats


def layer_parts(cfg: Model) -> LayerParts:
    """What the language model's layers are made of."""
    attention = PlannedAttention if cfg.attention == "sdpa" else TransformerEngineAttention
    if cfg.layers == "megatron":
        return replace(MEGATRON, attention=attention)
    from megatron.core.extensions import transformer_engine as te

    return LayerParts(te.TEColumnParallelLinear, te.TERowParallelLinear, te.TENorm, attention)
