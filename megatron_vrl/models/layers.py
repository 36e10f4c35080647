"""Modules for Megatron's layer specs: RMSNorm, gated MLP, and the spec of a layer."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_vrl.models.attention import PackedSelfAttention, PlannedAttention

# TransformerConfig fields shared by the language model and the vision tower. These fusions of
# Megatron are off: they need CUDA kernels, or compile for seconds on a CPU.
COMMON_CONFIG: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "add_qkv_bias": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
}
# TransformerConfig fields for each value of `model.recompute`.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with support for sequence parallelism.

    Megatron's wrapper of torch's norm refuses sequence parallelism. It is enough to mark the
    weight: `finalize_model_grads` then sums its gradient over the tensor-parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object
    ) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class LayerModules:
    """Module classes of a transformer layer."""

    column: Any  # linear layer, output channels split over tensor ranks
    row: Any  # linear layer, input channels split over tensor ranks
    norm: Any
    attention: Any = PlannedAttention


MEGATRON_MODULES = LayerModules(ColumnParallelLinear, RowParallelLinear, RMSNorm)


def layer_spec(parts: LayerModules = MEGATRON_MODULES) -> ModuleSpec:
    """Return the spec of a pre-norm transformer layer whose attention executes a plan."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm,
            self_attention=ModuleSpec(
                module=PackedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},  # unused: the plan decides
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column,
                    core_attention=parts.attention,
                    linear_proj=parts.row,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.norm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
