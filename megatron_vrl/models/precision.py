"""Which layers and number formats the language model computes with, and whether they are here.

Transformer Engine's layers and attention run on a GPU only; FP8 in its layers, or rounded to by
`fp8.py` anywhere. A run that asks for what is not there ends in one sentence before anything is
built.
"""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_vrl.config import Model, Parallel
from megatron_vrl.errors import ConfigError
from megatron_vrl.models.fp8_emulation import RoundedColumnParallelLinear, RoundedRowParallelLinear
from megatron_vrl.models.layers import (
    MEGATRON,
    LayerParts,
    PlannedAttention,
    RMSNorm,
    TransformerEngineKernel,
    VarlenAttention,
    flash_kernel,
)
from megatron_vrl.models.pipeline_split import check_fp8

ATTENTION = {
    "sdpa": PlannedAttention,
    "flash": partial(VarlenAttention, kernel=flash_kernel),
    "transformer_engine": partial(VarlenAttention, kernel=TransformerEngineKernel),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Our words for where an FP8 scale comes from -> Megatron's: the history of maxima, the tensor
# itself, or each block of 128 of it.
FP8_FORMATS = {"delayed": "hybrid", "current": "hybrid", "blockwise": "e4m3"}
FP8_RECIPES = {"delayed": "delayed", "current": "tensorwise", "blockwise": "blockwise"}


def check_available(cfg: Model, parallel: Parallel, device: torch.device) -> None:
    """Raises ConfigError if this process cannot compute as asked."""
    check_fp8(cfg, parallel)
    if cfg.attention == "flash" and (device.type != "cuda" or cfg.dtype != "bfloat16"):
        raise ConfigError(
            f"model.attention=flash with model.dtype={cfg.dtype} on {device.type}: it runs on a "
            "GPU in bfloat16; set model.attention=auto."
        )
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
            "model.attention=auto."
        )


def attention_of(cfg: Model, device: torch.device) -> str:
    """The row of ATTENTION that `auto` stands for."""
    if cfg.attention != "auto":
        return cfg.attention
    return "flash" if device.type == "cuda" and cfg.dtype == "bfloat16" else "sdpa"


def number_formats(cfg: Model) -> dict[str, Any]:
    """Arguments of TransformerConfig."""
    dtype = DTYPES[cfg.dtype]
    formats: dict[str, Any] = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": cfg.dtype == "bfloat16",
    }
    if cfg.fp8 != "none" and cfg.layers == "transformer_engine":
        formats |= {"fp8": FP8_FORMATS[cfg.fp8], "fp8_recipe": FP8_RECIPES[cfg.fp8]}
    return formats


def layer_parts(cfg: Model, layer: int, num_layers: int, device: torch.device) -> LayerParts:
    """What language layer `layer`, from 0, is made of."""
    attention = ATTENTION[attention_of(cfg, device)]
    first, last = cfg.fp8_skip_first_last_layers
    spared = cfg.fp8 != "none" and not first <= layer < num_layers - last
    if cfg.layers == "megatron" or spared:
        return replace(MEGATRON, attention=attention)
    if cfg.layers == "fp8_emulated":
        column, row = (
            ModuleSpec(module=linear, params={"recipe": cfg.fp8})
            for linear in (RoundedColumnParallelLinear, RoundedRowParallelLinear)
        )
        return LayerParts(column, row, RMSNorm, attention)
    from megatron.core.extensions import transformer_engine as te

    return LayerParts(te.TEColumnParallelLinear, te.TERowParallelLinear, te.TENorm, attention)
