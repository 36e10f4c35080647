"""Attention over sequences of any length by its definition, sequence after sequence, anywhere."""

from collections.abc import Callable, Iterator

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vrl.models.attention import VarlenPlan
from megatron_vrl.models.cascade_calls import VarlenCall


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


def forward_by_definition(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: VarlenCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [n, H, D] and log-sum-exp [H, n], as `cascade_calls.flash_forward`."""
    out, lse = query.new_empty(query.shape), query.new_empty(query.shape[1::-1])
    for rows, keys in sequences(call):
        scores = _scores(query[rows], key[keys], call)
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), _wide(value[keys], query))
    return out, lse


def backward_by_definition(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    call: VarlenCall,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The algorithm of FlashAttention-2's backward pass (arXiv 2307.08691) for the given lse."""
    of_query = torch.full_like(query, torch.nan)  # a kernel gives memory that it did not clear
    of_key, of_value = torch.full_like(key, torch.nan), torch.full_like(value, torch.nan)
    for rows, keys in sequences(call):
        shares = (_scores(query[rows], key[keys], call) - lse[:, rows, None]).exp()
        slope = torch.einsum("qhd,khd->hqk", grad[rows], _wide(value[keys], query))
        slope = slope - (grad[rows] * out[rows]).sum(-1).t()[:, :, None]
        of_scores = shares * slope / query.shape[2] ** 0.5
        of_query[rows] = torch.einsum("hqk,khd->qhd", of_scores, _wide(key[keys], query))
        of_key[keys] = _narrow(torch.einsum("hqk,qhd->khd", of_scores, query[rows]), key)
        of_value[keys] = _narrow(torch.einsum("hqk,qhd->khd", shares, grad[rows]), value)
    return of_query, of_key, of_value


def sequences(call: VarlenCall) -> Iterator[tuple[slice, slice]]:
    """The queries and keys of each sequence of a call."""
    queries, keys = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    for i in range(len(queries) - 1):
        assert queries[i + 1] - queries[i] <= call.max_seqlen_q
        assert keys[i + 1] - keys[i] <= call.max_seqlen_k
        yield slice(*queries[i : i + 2]), slice(*keys[i : i + 2])


def _scores(query: torch.Tensor, key: torch.Tensor, call: VarlenCall) -> torch.Tensor:
    sees = torch.ones(len(query), len(key), dtype=torch.bool)
    sees = sees.tril(len(key) - len(query)) if call.causal else sees
    scores = torch.einsum("qhd,khd->hqk", query, _wide(key, query)) / query.shape[2] ** 0.5
    hidden: torch.Tensor = scores.masked_fill(~sees, -torch.inf)
    return hidden


def _wide(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    wide: torch.Tensor = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return wide


def _narrow(wide: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    narrow: torch.Tensor = wide.unflatten(1, (key.shape[1], -1)).sum(2)
    return narrow
