"""Modules for Megatron's layer specs: RMSNorm, gated MLP, and the spec of a layer."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_vrl.models.attention import PackedSelfAttention, PlannedAttention
from megatron_vrl.models.fusion import NORM_IN_LINEAR
from megatron_vrl.models.swiglu import SwiGLU
from megatron_vrl.parallel.mcore_compat import mlp_spec

# TransformerConfig fields shared by the language model and the vision tower. These fusions of
# Megatron are off: they need CUDA kernels, or compile for seconds on a CPU.
COMMON_CONFIG: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "bias_activation_fusion": False,
    "use_te_activation_func": True,  # the MLP takes the activation of its spec, which is ours
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
}


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with support for sequence parallelism.

    Megatron's wrapper of torch's norm refuses sequence parallelism. It is enough to mark the
    weight: `finalize_model_grads` then sums its gradient over the tensor-parallel ranks. torch has
    a kernel for a GPU only; elsewhere `_RMSNorm` saves what that kernel saves.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object
    ) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., C] over its channels."""
        if x.is_cuda:
            return super().forward(x)
        out: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return out


class _RMSNorm(torch.autograd.Function):
    """RMSNorm that saves its input and one number a row, not two float32 copies of the input.

    The result is torch's to the bit. The gradients round differently in their last bits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(wide * scale, weight, out=torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        channels, wide = x.shape[-1], weight.float()
        normed = x * scale  # float32, as all below
        of_weight = (grads[0] * normed).view(-1, channels)
        mean = torch.mv(of_weight, wide).view_as(scale)
        of_x = (grads[0] * wide).addcmul_(normed, mean, value=-1 / channels)
        of_x = torch.mul(of_x, scale, out=torch.empty_like(x))
        return of_x, of_weight.sum(0).to(weight.dtype), None


@dataclass(frozen=True, slots=True)
class LayerModules:
    """Module classes of a transformer layer."""

    column: Any  # linear layer after a norm, output channels split over tensor ranks
    row: Any  # linear layer, input channels split over tensor ranks
    norm: Any
    attention: Any = PlannedAttention
    activation: Any = SwiGLU
    head_norm: Any = None  # norm of each query and key head before the rotation; None: no norm
    norm_in_column: bool = False  # `column` applies the norm itself and holds its weight


MEGATRON_MODULES = LayerModules(ColumnParallelLinear, RowParallelLinear, RMSNorm)


def layer_spec(
    parts: LayerModules = MEGATRON_MODULES, layer: type[TransformerLayer] = TransformerLayer
) -> ModuleSpec:
    """Return the spec of a pre-norm transformer layer whose attention executes a plan.

    Its sharded state dict has the keys of two modules for norm and linear, also with one.
    """
    norm = IdentityOp if parts.norm_in_column else parts.norm
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=PackedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},  # unused: the plan decides
                submodules=SelfAttentionSubmodules(
                    linear_qkv=parts.column,
                    core_attention=parts.attention,
                    linear_proj=parts.row,
                    q_layernorm=parts.head_norm,
                    k_layernorm=parts.head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp_spec(
                MLPSubmodules(
                    linear_fc1=parts.column,
                    linear_fc2=parts.row,
                    activation_func=parts.activation,
                )
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=NORM_IN_LINEAR if parts.norm_in_column else {},
        ),
    )
