"""Modules for Megatron's layer specs: RMSNorm and core attention over packed rows.

Core attention has three backends that compute the same function:

- sdpa: torch's scaled_dot_product_attention over buckets of sequences of nearly equal length; runs
  on any device;
- flash: torch's FlashAttention over sequences of any length in one call; needs a GPU;
- transformer_engine: Transformer Engine's attention, as flash.

Shape letters: L packed rows of this rank, T packed rows of all context-parallel ranks, H query
heads, K key-value heads, D channels of a head, B entries of a bucket, Q queries of an entry, S keys
of an entry, E sequences of a variable-length call.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

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

# torch 2.11 has no `enable_gqa`: it accepts fewer key heads than query heads without a flag.
GQA_KWARGS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


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
class Bucket:
    """Entries of nearly equal length that share one attention call."""

    queries: Tensor  # [B, Q] indices into L; padding is row 0, its output is unused
    keys: Tensor  # [B, S] indices into T, ordered by context rank
    mask: Tensor | None  # [B, 1, Q, S] bool, True where a query attends
    causal: bool  # only with mask None: queries and keys are the same rows, in order


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Queries, keys and masks of all attention calls of a micro-batch. All layers share one
    plan."""

    buckets: tuple[Bucket, ...]
    output_index: Tensor  # [L] index of each row in the concatenated bucket outputs


@dataclass(frozen=True, slots=True)
class VarlenPlan:
    """Index tensors of one variable-length attention call, causal from the bottom right.

    In a sequence with Q queries and S keys, query i attends to the first S - Q + 1 + i keys.
    """

    queries: Tensor  # [sum Q] indices into L
    keys: Tensor  # [sum S] indices into T; a prompt's keys repeat for each answer
    cu_seqlens_q: Tensor  # [E + 1] int32, from 0
    cu_seqlens_k: Tensor  # [E + 1] int32, from 0
    max_seqlen_q: int
    max_seqlen_k: int
    output_index: Tensor  # [L] index of each row in the output


@dataclass
class PlannedSeqParams(PackedSeqParams):
    """Megatron's PackedSeqParams with an attention plan. Megatron passes it to `core_attention`."""

    plan: AttentionPlan | VarlenPlan | None = None
    plan_of_layer: dict[int, AttentionPlan] | None = (
        None  # layer number from 1 -> plan; overrides `plan`
    )
    context: dist.ProcessGroup | None = None  # group that gathers keys and values


def packed_params(num_rows: int, device: torch.device, **plans: Any) -> PlannedSeqParams:
    """Return PlannedSeqParams of one packed sequence of L rows, so that rotary angles apply row by
    row."""
    ends = torch.tensor([0, num_rows], dtype=torch.int32, device=device)
    return PlannedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=num_rows,
        max_seqlen_kv=num_rows,
        **plans,
    )


class PlannedAttention(MegatronModule):
    """Core attention that executes an AttentionPlan with torch's scaled_dot_product_attention."""

    def __init__(self, config: TransformerConfig, layer_number: int, **_: object) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PlannedSeqParams,
        **_: object,
    ) -> Tensor:
        """Return [L, 1, H * D] for query [L, H, D], key and value [L, K, D]."""
        plan = packed_seq_params.plan
        if packed_seq_params.plan_of_layer is not None:
            plan = packed_seq_params.plan_of_layer[self.layer_number]
        assert isinstance(plan, AttentionPlan)
        key, value = _gather_keys_values(key, value, packed_seq_params.context)
        if not plan.buckets:
            return _zero_output(query, key, value)
        outputs = [_bucket_attention(query, key, value, bucket) for bucket in plan.buckets]
        flat = torch.cat(outputs) if len(outputs) > 1 else outputs[0]  # [sum B*Q, H * D]
        return flat.index_select(0, plan.output_index).unsqueeze(1)


Kernel = Callable[[Tensor, Tensor, Tensor, VarlenPlan], Tensor]
"""Function (query [sum Q, H, D], key [sum S, K, D], value [sum S, K, D], plan) -> [sum Q, H *
D]."""


class VarlenAttention(MegatronModule):
    """Core attention that executes a VarlenPlan with `kernel(config, layer_number)`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        kernel: Callable[[TransformerConfig, int], Kernel],
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.kernel = kernel(config, layer_number)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PlannedSeqParams,
        **_: object,
    ) -> Tensor:
        """Return [L, 1, H * D] for query [L, H, D], key and value [L, K, D]."""
        plan = packed_seq_params.plan
        assert isinstance(plan, VarlenPlan)
        key, value = _gather_keys_values(key, value, packed_seq_params.context)
        if not len(plan.queries):
            return _zero_output(query, key, value)
        flat = self.kernel(
            query.index_select(0, plan.queries),
            key.index_select(0, plan.keys),
            value.index_select(0, plan.keys),
            plan,
        )
        return flat.index_select(0, plan.output_index).unsqueeze(1)


def flash_kernel(config: TransformerConfig, layer_number: int) -> Kernel:
    """Return torch's FlashAttention as a Kernel; both arguments are unused."""
    return _flash


def _flash(query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan) -> Tensor:
    """Return [sum Q, H * D] by torch's variable-length FlashAttention."""
    attended: Any = varlen_attn(
        query,
        key,
        value,
        plan.cu_seqlens_q,
        plan.cu_seqlens_k,
        plan.max_seqlen_q,
        plan.max_seqlen_k,
        window_size=(-1, 0),  # causal from the bottom right
        **GQA_KWARGS,
    )  # [sum Q, H, D]
    return attended.flatten(1)


class TransformerEngineKernel(torch.nn.Module):
    """Kernel that calls Transformer Engine's DotProductAttention (FlashAttention or cuDNN)."""

    def __init__(self, config: TransformerConfig, layer_number: int) -> None:
        super().__init__()
        from transformer_engine.pytorch import DotProductAttention

        tensor_ranks = config.tensor_model_parallel_size
        self.attention = DotProductAttention(
            config.num_attention_heads // tensor_ranks,
            config.kv_channels,
            num_gqa_groups=config.num_query_groups // tensor_ranks,
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            layer_number=layer_number,
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan) -> Tensor:
        """Return [sum Q, H * D] for query [sum Q, H, D], key and value [sum S, K, D]."""
        flat: Tensor = self.attention(
            query,
            key,
            value,
            cu_seqlens_q=plan.cu_seqlens_q,
            cu_seqlens_kv=plan.cu_seqlens_k,
            max_seqlen_q=plan.max_seqlen_q,
            max_seqlen_kv=plan.max_seqlen_k,
        )
        return flat


def _gather_keys_values(
    key: Tensor, value: Tensor, context: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Return keys and values of all context-parallel ranks, [T, K, D] of [L, K, D].

    The backward pass sums the gradients of all ranks.
    """
    if context is None or context.size() == 1:
        return key, value
    return (
        gather_from_sequence_parallel_region(key, group=context),
        gather_from_sequence_parallel_region(value, group=context),
    )


def _zero_output(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return zeros [L, 1, H * D] for a rank whose rows are all padding.

    The zeros depend on query, key and value, because the other ranks wait for this rank in the
    backward pass of the gather.
    """
    return query.flatten(1).unsqueeze(1) * 0 + 0 * (key.sum() + value.sum())


def _bucket_attention(query: Tensor, key: Tensor, value: Tensor, bucket: Bucket) -> Tensor:
    """Return the outputs [B * Q, H * D] of one bucket."""
    q = _gather_rows(query, bucket.queries)
    k, v = _gather_rows(key, bucket.keys), _gather_rows(value, bucket.keys)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bucket.mask, is_causal=bucket.causal, enable_gqa=q.shape[1] != k.shape[1]
    )  # [B, H, Q, D]
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def _gather_rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Return [B, H, Q, D]: the rows of `tensor` [rows, H, D] at `index` [B, Q]."""
    rows = tensor.index_select(0, index.flatten())
    return rows.view(*index.shape, *tensor.shape[1:]).transpose(1, 2)


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
                module=SelfAttention,
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
