"""Self-attention over packed rows: rotation of queries and keys, and core attention by a plan.

Core attention has three backends that compute the same function:

- flash: torch's FlashAttention without copies of keys (`models/cascade_attention.py`);
- sdpa: torch's scaled_dot_product_attention over buckets of sequences of nearly equal length; runs
  on any device in any number format;
- transformer_engine: Transformer Engine's attention over sequences of any length in one call. It
  returns no log-sum-exp, so a prompt's keys are copied for each answer.

Queries, keys and values stay in the one tensor that `linear_qkv` returns until core attention
copies the rows of its calls: `mixed` [L, K, R + 2, D], for each key head its R query heads, the key
head and the value head.

Shape letters: L packed rows of this rank, T packed rows of all context-parallel ranks, H query
heads, K key-value heads, R query heads of a key head, D channels of a head, B entries of a bucket,
Q queries of an entry, S keys of an entry, E sequences of a variable-length call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vrl.models.rotary import rotate


@dataclass(frozen=True, slots=True)
class Bucket:
    """Entries of nearly equal length that share one attention call."""

    queries: Tensor  # [B, Q] indices into L; padding is row 0, its output is unused
    keys: Tensor  # [B, S] indices into T, ordered by context rank
    mask: Tensor | None  # [B, 1, Q, S] bool, True where a query attends; or 0 there, else -inf
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


def with_additive_masks(plan: object, dtype: torch.dtype) -> object:
    """Return the plan with masks to be added to scores, which torch would make in every layer.

    Plans without masks are returned as they are.
    """
    if not isinstance(plan, AttentionPlan):
        return plan
    return replace(plan, buckets=tuple(_with_additive_mask(b, dtype) for b in plan.buckets))


def _with_additive_mask(bucket: Bucket, dtype: torch.dtype) -> Bucket:
    if bucket.mask is None:
        return bucket
    added = torch.zeros_like(bucket.mask, dtype=dtype).masked_fill_(~bucket.mask, -torch.inf)
    return replace(bucket, mask=added)


@dataclass
class PlannedSeqParams(PackedSeqParams):
    """Megatron's PackedSeqParams with an attention plan. Megatron passes it to `core_attention`."""

    plan: object = None  # of the type that the core attention of the layers executes
    plan_of_layer: dict[int, AttentionPlan] | None = (
        None  # layer number from 1 -> plan; overrides `plan`
    )
    context: dist.ProcessGroup | None = None  # group that gathers keys and values
    deepstack_rows: Tensor | None = None  # rows of the hidden states that get DeepStack features


def packed_params(**plans: Any) -> PlannedSeqParams:
    """Return PlannedSeqParams of packed rows. `cu_seqlens` stays None: the plan has the ends."""
    return PlannedSeqParams(qkv_format="thd", **plans)


class PackedSelfAttention(SelfAttention):
    """Megatron's SelfAttention for packed rows with rotary tables and an attention plan.

    It has the parameters of its base class. Left out: inference, fewer key heads than
    tensor-parallel ranks (`pipeline_split.check_divides` refuses them).
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: PlannedSeqParams,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Return output [L, 1, C] and bias for `rotary_pos_emb`, the tables of `rotary_tables`."""
        mixed, _bias = self.linear_qkv(hidden_states)  # [L, 1, K * (R + 2) * D]
        groups = self.num_query_groups_per_partition
        if self.q_layernorm is not None:
            mixed = self._with_head_norms(mixed, groups)
        mixed = rotate(mixed, rotary_pos_emb, groups)
        mixed = mixed.view(len(mixed), groups, -1, self.hidden_size_per_attention_head)
        attend = partial(self.core_attention, packed_seq_params=packed_seq_params)
        if self.checkpoint_core_attention and self.training:
            return self.linear_proj(checkpoint(attend, False, mixed))
        return self.linear_proj(attend(mixed))

    def _with_head_norms(self, mixed: Tensor, groups: int) -> Tensor:
        """Return mixed [L, 1, K * (R + 2) * D] with a norm over each query and each key head."""
        heads = mixed.view(len(mixed), groups, -1, self.hidden_size_per_attention_head)
        query, key = self.q_layernorm(heads[:, :, :-2]), self.k_layernorm(heads[:, :, -2:-1])
        return torch.cat([query, key, heads[:, :, -1:]], dim=2).view_as(mixed)


class PlannedAttention(MegatronModule):
    """Core attention that executes an AttentionPlan with torch's scaled_dot_product_attention."""

    def __init__(self, config: TransformerConfig, layer_number: int, **_: object) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number

    def forward(self, mixed: Tensor, packed_seq_params: PlannedSeqParams) -> Tensor:
        """Return [L, 1, H * D] for mixed [L, K, R + 2, D]."""
        plan = packed_seq_params.plan
        if packed_seq_params.plan_of_layer is not None:
            plan = packed_seq_params.plan_of_layer[self.layer_number]
        assert isinstance(plan, AttentionPlan)
        return self.attend(mixed, exchanged(mixed, packed_seq_params.context), plan)

    def attend(self, mixed: Tensor, elsewhere: Tensor | None, plan: AttentionPlan) -> Tensor:
        """Return what `forward` returns, for keys and values `elsewhere` [T, K, 2, D] if given."""
        if not plan.buckets:
            return _zero_output(mixed, elsewhere)
        calls = [(bucket.queries, bucket.keys) for bucket in plan.buckets]
        rows = _gather_rows(mixed, elsewhere, calls)
        outputs = [
            _bucket_attention(*of_call, bucket)
            for of_call, bucket in zip(rows, plan.buckets, strict=True)
        ]
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

    def forward(self, mixed: Tensor, packed_seq_params: PlannedSeqParams) -> Tensor:
        """Return [L, 1, H * D] for mixed [L, K, R + 2, D]."""
        plan = packed_seq_params.plan
        assert isinstance(plan, VarlenPlan)
        return self.attend(mixed, exchanged(mixed, packed_seq_params.context), plan)

    def attend(self, mixed: Tensor, elsewhere: Tensor | None, plan: VarlenPlan) -> Tensor:
        """Return what `forward` returns, for keys and values `elsewhere` [T, K, 2, D] if given."""
        if not len(plan.queries):
            return _zero_output(mixed, elsewhere)
        (rows,) = _gather_rows(mixed, elsewhere, [(plan.queries, plan.keys)])
        flat = self.kernel(*rows, plan)
        return flat.index_select(0, plan.output_index).unsqueeze(1)


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
            key.contiguous(),
            value.contiguous(),
            cu_seqlens_q=plan.cu_seqlens_q,
            cu_seqlens_kv=plan.cu_seqlens_k,
            max_seqlen_q=plan.max_seqlen_q,
            max_seqlen_kv=plan.max_seqlen_k,
        )
        return flat


Rows = tuple[Tensor, Tensor, Tensor]  # query [n, H, D], key [m, K, D], value [m, K, D] of a call


def exchanged(mixed: Tensor, context: dist.ProcessGroup | None) -> Tensor | None:
    """Return keys and values of all context-parallel ranks, [T, K, 2, D]; None for one rank.

    The backward pass sums the gradients of all ranks.
    """
    if context is None or context.size() == 1:
        return None
    return gather_from_sequence_parallel_region(mixed[:, :, -2:].contiguous(), group=context)


def _gather_rows(
    mixed: Tensor, elsewhere: Tensor | None, calls: Sequence[tuple[Tensor, Tensor]]
) -> list[Rows]:
    """Return copies of the rows of every attention call from mixed [L, K, R + 2, D].

    A call has the indices of its queries in L, and of its keys in `elsewhere` [T, K, 2, D] or, if
    that is None, in L.
    """
    queries, keys = zip(*((q.flatten(), k.flatten()) for q, k in calls), strict=True)
    flat = _GatherRows.apply(mixed, elsewhere, queries, keys)
    return [flat[start : start + 3] for start in range(0, len(flat), 3)]


class _GatherRows(torch.autograd.Function):
    """Index selects of all calls whose gradients add up in one tensor of the shape of `mixed`.

    Autograd's own gradients would be one tensor for each select, slice and sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        elsewhere: Tensor | None,
        queries: tuple[Tensor, ...],
        keys: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        source = mixed[:, :, -2:] if elsewhere is None else elsewhere  # [T, K, 2, D]
        ctx.queries, ctx.keys, ctx.shape = queries, keys, mixed.shape
        ctx.elsewhere = None if elsewhere is None else elsewhere.shape
        copies = []
        for of_query, of_key in zip(queries, keys, strict=True):
            copies.append(mixed[:, :, :-2].index_select(0, of_query).flatten(1, 2))
            copies += source.index_select(0, of_key).unbind(2)
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = grads[0].new_zeros(ctx.shape)
        sums = total[:, :, -2:] if ctx.elsewhere is None else grads[0].new_zeros(ctx.elsewhere)
        for call in reversed(range(len(ctx.queries))):  # the order of autograd
            query, *key_value = grads[3 * call : 3 * call + 3]
            of_query = query.view(len(query), ctx.shape[1], -1, ctx.shape[3])
            total[:, :, :-2].index_add_(0, ctx.queries[call], of_query)
            for which, grad in enumerate(key_value):
                sums[:, :, which].index_add_(0, ctx.keys[call], grad)
        return total, None if ctx.elsewhere is None else sums, None, None


def _zero_output(mixed: Tensor, elsewhere: Tensor | None) -> Tensor:
    """Return zeros [L, 1, H * D] for a rank whose rows are all padding.

    The zeros depend on every input, because the other ranks wait for this rank in the backward pass
    of their exchange.
    """
    zeros = mixed[:, :, :-2].flatten(1).unsqueeze(1) * 0
    return zeros if elsewhere is None else zeros + 0 * elsewhere.sum()


def _bucket_attention(query: Tensor, key: Tensor, value: Tensor, bucket: Bucket) -> Tensor:
    """Return the outputs [B * Q, H * D] of one bucket."""
    entries = len(bucket.queries)
    q, k, v = (x.view(entries, -1, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bucket.mask, is_causal=bucket.causal, enable_gqa=q.shape[1] != k.shape[1]
    )  # [B, H, Q, D]
    return out.transpose(1, 2).flatten(2).flatten(0, 1)
