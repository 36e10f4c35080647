"""Choice of layers, attention backend and dtypes of the language model, with availability checks.

Transformer Engine's layers and attention need a GPU. FP8 is computed by those layers, or emulated
anywhere (`models/fp8_emulation.py`).
"""

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_vrl.config import Model, Parallel
from megatron_vrl.errors import ConfigError
from megatron_vrl.models.adapters import check_lora
from megatron_vrl.models.attention import (
    PlannedAttention,
    TransformerEngineKernel,
    VarlenAttention,
)
from megatron_vrl.models.cascade_attention import CascadeAttention
from megatron_vrl.models.fp8_emulation import (
    EmulatedFp8ColumnParallelLinear,
    EmulatedFp8RowParallelLinear,
)
from megatron_vrl.models.fusion import gradient_fusion, with_gradient_fusion
from megatron_vrl.models.layers import MEGATRON_MODULES, LayerModules, RMSNorm
from megatron_vrl.models.lora import AdaptableColumnParallelLinear, AdaptableRowParallelLinear
from megatron_vrl.models.pipeline_split import check_fp8

ATTENTION = {
    "sdpa": PlannedAttention,
    "flash": CascadeAttention,
    "transformer_engine": partial(VarlenAttention, kernel=TransformerEngineKernel),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Scaling of `model.fp8` -> Megatron's names. delayed scales by the history of maxima, current by
# the tensor's maximum, blockwise by the maximum of each block of 128 values.
FP8_FORMATS = {"delayed": "hybrid", "current": "hybrid", "blockwise": "e4m3"}
FP8_RECIPES = {"delayed": "delayed", "current": "tensorwise", "blockwise": "blockwise"}


def check_available(cfg: Model, parallel: Parallel, device: torch.device) -> None:
    """Raise ConfigError if this process cannot run the configured layers, attention or FP8."""
    check_fp8(cfg, parallel)
    check_lora(cfg)
    if cfg.attention == "flash" and device.type == "cuda" and cfg.dtype != "bfloat16":
        raise ConfigError(
            f"model.attention=flash with model.dtype={cfg.dtype} on a GPU: it runs there in "
            "bfloat16; set model.attention=auto."
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


def attention_backend(cfg: Model, device: torch.device) -> str:
    """Return the key of ATTENTION that `cfg.attention` selects on `device`; it resolves "auto"."""
    if cfg.attention != "auto":
        return cfg.attention
    return "flash" if device.type == "cuda" and cfg.dtype == "bfloat16" else "sdpa"


def precision_config(cfg: Model) -> dict[str, Any]:
    """Return the dtype and FP8 fields of Megatron's TransformerConfig."""
    dtype = DTYPES[cfg.dtype]
    formats: dict[str, Any] = {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": cfg.dtype == "bfloat16",
    }
    if cfg.fp8 != "none" and cfg.layers == "transformer_engine":
        formats |= {"fp8": FP8_FORMATS[cfg.fp8], "fp8_recipe": FP8_RECIPES[cfg.fp8]}
    return formats


def layer_modules(cfg: Model, layer: int, num_layers: int, device: torch.device) -> LayerModules:
    """Return the module classes of language layer `layer`, counted from 0."""
    attention = ATTENTION[attention_backend(cfg, device)]
    if cfg.lora.rank:
        return LayerModules(
            AdaptableColumnParallelLinear, AdaptableRowParallelLinear, RMSNorm, attention
        )
    first, last = cfg.fp8_skip_first_last_layers
    spared = cfg.fp8 != "none" and not first <= layer < num_layers - last
    if cfg.layers == "megatron" or spared:
        return replace(MEGATRON_MODULES, attention=attention)
    if cfg.layers == "fp8_emulated":
        column, row = (
            ModuleSpec(module=linear, params={"recipe": cfg.fp8})
            for linear in (EmulatedFp8ColumnParallelLinear, EmulatedFp8RowParallelLinear)
        )
        return LayerModules(column, row, RMSNorm, attention)
    from megatron.core.extensions import transformer_engine as te

    linears = te.TELayerNormColumnParallelLinear, te.TERowParallelLinear
    if gradient_fusion(cfg, device.type == "cuda").in_transformer_engine:
        linears = tuple(map(with_gradient_fusion, linears))
    return LayerModules(*linears, te.TENorm, attention, norm_in_column=True)
