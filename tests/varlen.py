"""Attention over a VarlenPlan by its definition, sequence after sequence, anywhere."""

from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vrl.models.attention import VarlenPlan


def kernel_by_definition(
    config: TransformerConfig, layer_number: int
) -> Callable[..., torch.Tensor]:
    return _attend


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: VarlenPlan
) -> torch.Tensor:
    outputs = []
    for i in range(len(plan.cu_seqlens_q) - 1):
        q = query[plan.cu_seqlens_q[i] : plan.cu_seqlens_q[i + 1]]
        k, v = (
            x[plan.cu_seqlens_k[i] : plan.cu_seqlens_k[i + 1]].repeat_interleave(
                q.shape[1] // x.shape[1], 1
            )
            for x in (key, value)
        )
        sees = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        assert len(q) <= plan.max_seqlen_q and len(k) <= plan.max_seqlen_k
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
        shares = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", shares, v).flatten(1))
    return torch.cat(outputs)
