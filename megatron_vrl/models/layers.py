"""The layers we put into Megatron's specs: an RMSNorm and core attention for packed rows.

Three backends follow one rule of who attends to whom: torch's scaled_dot_product_attention in
buckets of nearly equal length, anywhere; on a GPU, over sequences of any length in one call,
torch's FlashAttention or Transformer Engine's attention.

Shape letters: L packed rows of this rank, T of all context-parallel ranks, H query heads, K
key-value heads, D channels of a head, B entries of a bucket, Q their queries, S their keys, E
sequences of a call over different lengths.
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

# TransformerConfig of language model and vision tower alike. These fusions of Megatron's are off:
# they need CUDA kernels, or compile for seconds on a CPU.
BOTH_TOWERS: dict[str, Any] = {
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
# Its fields for each value of `model.recompute`.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}

# torch 2.11 takes fewer key heads than query heads without being told so.
FEWER_KEY_HEADS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm that may run on a slice of the sequence.

    Megatron's own wrapper refuses sequence parallelism; marking the weight is all it takes, since
    `finalize_model_grads` then sums its gradient over the tensor-parallel ranks.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object
    ) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Entries of nearly equal length that go through one attention call."""

    queries: Tensor  # [B, Q] rows of L; padding points at row 0 and its output is never read
    keys: Tensor  # [B, S] rows of T, rank after rank
    mask: Tensor | None  # [B, 1, Q, S] bool, True where a query may look
    causal: bool  # with mask None: queries and keys are the same rows, in order


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Which row looks at which: made once per micro-batch, used by every layer."""

    buckets: tuple[Bucket, ...]
    place: Tensor  # [L] position of each row in the concatenated outputs of the buckets


@dataclass(frozen=True, slots=True)
class VarlenPlan:
    """The rule as one call over sequences of different lengths, causal from the bottom right: of a
    sequence with Q queries and S keys, query i sees the first S - Q + 1 + i keys."""

    queries: Tensor  # [sum Q] rows of L
    keys: Tensor  # [sum S] rows of T, rank after rank; a prompt's once for each answer
    query_ends: Tensor  # [E + 1] int32, from 0
    key_ends: Tensor  # [E + 1] int32, from 0
    longest_query: int
    longest_key: int
    place: Tensor  # [L] position of each row in the output


@dataclass
class PlannedSeqParams(PackedSeqParams):
    """Megatron's carrier of packing, from the model's input to `core_attention`."""

    plan: AttentionPlan | VarlenPlan | None = None
    plan_of_layer: dict[int, AttentionPlan] | None = None  # 1-based layer; overrides `plan`
    context: dist.ProcessGroup | None = None  # over which keys and values are gathered


def packed(num_rows: int, device: torch.device, **plans: Any) -> PlannedSeqParams:
    """One packed sequence of L rows, so that rotary angles are taken row by row."""
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
    """`core_attention`: follows an AttentionPlan by torch's scaled_dot_product_attention."""

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
        """query [L, H, D], key and value [L, K, D] -> [L, 1, H * D]."""
        plan = packed_seq_params.plan
        if packed_seq_params.plan_of_layer is not None:
            plan = packed_seq_params.plan_of_layer[self.layer_number]
        assert isinstance(plan, AttentionPlan)
        key, value = _of_all_ranks(key, value, packed_seq_params.context)
        if not plan.buckets:
            return _nothing(query, key, value)
        outputs = [_attend(query, key, value, bucket) for bucket in plan.buckets]
        flat = torch.cat(outputs) if len(outputs) > 1 else outputs[0]  # [sum B*Q, H * D]
        return flat.index_select(0, plan.place).unsqueeze(1)


Kernel = Callable[[Tensor, Tensor, Tensor, VarlenPlan], Tensor]
"""query [sum Q, H, D], key and value [sum S, K, D] and their plan -> [sum Q, H * D]"""


class VarlenAttention(MegatronModule):
    """`core_attention`: follows a VarlenPlan by a kernel, made for its layer."""

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
        """query [L, H, D], key and value [L, K, D] -> [L, 1, H * D]."""
        plan = packed_seq_params.plan
        assert isinstance(plan, VarlenPlan)
        key, value = _of_all_ranks(key, value, packed_seq_params.context)
        if not len(plan.queries):
            return _nothing(query, key, value)
        flat = self.kernel(
            query.index_select(0, plan.queries),
            key.index_select(0, plan.keys),
            value.index_select(0, plan.keys),
            plan,
        )
        return flat.index_select(0, plan.place).unsqueeze(1)


def flash_kernel(config: TransformerConfig, layer_number: int) -> Kernel:
    """torch's FlashAttention."""
    return _flash


def _flash(query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan) -> Tensor:
    attended: Any = varlen_attn(
        query,
        key,
        value,
        plan.query_ends,
        plan.key_ends,
        plan.longest_query,
        plan.longest_key,
        window_size=(-1, 0),  # causal from the bottom right
        **FEWER_KEY_HEADS,
    )  # [sum Q, H, D]
    return attended.flatten(1)


class TransformerEngineKernel(torch.nn.Module):
    """Transformer Engine's DotProductAttention, which chooses FlashAttention or cuDNN."""

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
        flat: Tensor = self.attention(
            query,
            key,
            value,
            cu_seqlens_q=plan.query_ends,
            cu_seqlens_kv=plan.key_ends,
            max_seqlen_q=plan.longest_query,
            max_seqlen_kv=plan.longest_key,
        )
        return flat


def _of_all_ranks(
    key: Tensor, value: Tensor, context: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """[L, K, D] of each -> [T, K, D]; gradients of all ranks are summed on the way back."""
    if context is None or context.size() == 1:
        return key, value
    return (
        gather_from_sequence_parallel_region(key, group=context),
        gather_from_sequence_parallel_region(value, group=context),
    )


def _nothing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of padding alone; it hangs on all three, since the ranks wait for each other's gradients."""
    return query.flatten(1).unsqueeze(1) * 0 + 0 * (key.sum() + value.sum())


def _attend(query: Tensor, key: Tensor, value: Tensor, bucket: Bucket) -> Tensor:
    q = _rows(query, bucket.queries)
    k, v = _rows(key, bucket.keys), _rows(value, bucket.keys)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bucket.mask, is_causal=bucket.causal, enable_gqa=q.shape[1] != k.shape[1]
    )  # [B, H, Q, D]
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """[rows, H, D] at [B, Q] -> [B, H, Q, D]."""
    rows = tensor.index_select(0, index.flatten())
    return rows.view(*index.shape, *tensor.shape[1:]).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class LayerParts:
    """Classes that a layer is made of."""

    column: Any  # linear, output channels split over tensor ranks
    row: Any  # linear, input channels split
    norm: Any
    attention: Any = PlannedAttention


MEGATRON = LayerParts(ColumnParallelLinear, RowParallelLinear, RMSNorm)


def layer_spec(parts: LayerParts = MEGATRON) -> ModuleSpec:
    """A pre-norm transformer layer that attends by a plan."""
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
