"""Cascade attention: all answers of a group read their prompt's keys at once, where they lie.

A row attends to its own sequence in a causal call, and to the earlier rows that its sequence
continues in a prefix call without a mask. Both calls return the log-sum-exp of their scores, by
which their outputs are merged (as FlashInfer's cascade attention and vLLM's `merge_attn_states`
do). The backward pass gives each call the merged output and log-sum-exp. From them a kernel
computes the softmax over all keys, so its gradients are exact, and no gradient of a log-sum-exp is
needed (as in ring attention, arXiv 2310.01889).

The kernels of a device are in `models/cascade_calls.py`, the plans in
`models/cascade_plans.py`.

Shape letters: L packed rows of this rank, T packed rows of all context-parallel ranks, n queries of
a call, K key-value heads, R query heads of a key head, H = K * R, D channels of a head.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vrl.models.attention import PlannedSeqParams, exchanged
from megatron_vrl.models.cascade_calls import OwnCall, Rows, Saved, VarlenCall, ViewCall, taken


@dataclass(frozen=True, slots=True)
class CascadePlan:
    """Attention calls of a micro-batch, shared by all layers."""

    own: tuple[OwnCall, ...]  # each row once, with the rows of its own sequence on this rank
    prefix: tuple[ViewCall | VarlenCall, ...]  # rows with earlier rows of T that all of them see
    key_order: Tensor | None  # [T] index of each packed row among gathered keys; None: L is T


class CascadeAttention(MegatronModule):
    """Core attention that executes a CascadePlan."""

    def __init__(self, config: TransformerConfig, layer_number: int, **_: object) -> None:
        super().__init__(config=config)

    def forward(self, mixed: Tensor, packed_seq_params: PlannedSeqParams) -> Tensor:
        """Return [L, 1, H * D] for mixed [L, K, R + 2, D]."""
        plan = packed_seq_params.plan
        assert isinstance(plan, CascadePlan)
        return self.attend(mixed, exchanged(mixed, packed_seq_params.context), plan)

    def attend(self, mixed: Tensor, elsewhere: Tensor | None, plan: CascadePlan) -> Tensor:
        """Return what `forward` returns, for keys and values `elsewhere` [T, K, 2, D] if given."""
        if elsewhere is not None:
            assert plan.key_order is not None
            elsewhere = elsewhere.index_select(0, plan.key_order)
        attended: Tensor = _Cascade.apply(mixed, elsewhere, plan)
        return attended.flatten(1).unsqueeze(1)


class _Cascade(torch.autograd.Function):
    """Autograd function over all calls. It keeps `mixed`, the keys, the output and its lse."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, elsewhere: Tensor | None, plan: CascadePlan) -> Tensor:
        rows, groups, heads = len(mixed), mixed.shape[1], mixed.shape[2] - 2
        own = mixed[:, :, -2:]
        out = mixed.new_empty(rows + 1, groups, heads, mixed.shape[3])
        wide = torch.float64 if mixed.dtype == torch.float64 else torch.float32
        lse = mixed.new_empty(rows + 1, groups, heads, dtype=wide)
        for call in plan.own:
            call.write(out, lse, call.forward(mixed, own))
        lse[rows].fill_(torch.inf)
        for call in plan.prefix:
            further = call.forward(mixed, own if elsewhere is None else elsewhere)
            merge(out, lse, call.queries, *further)
        result = out[:rows]
        ctx.plan = plan
        ctx.save_for_backward(mixed, elsewhere, result, lse)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        mixed, elsewhere, out, lse = ctx.saved_tensors
        rows = len(mixed)
        saved = Saved(mixed, grads[0].contiguous(), out, lse)
        total = mixed.new_empty(rows + 1, *mixed.shape[1:])
        for call in ctx.plan.own:
            call.set_gradients(total, *call.backward(saved, mixed[:, :, -2:]))
        total = total[:rows]
        source = mixed[:, :, -2:] if elsewhere is None else elsewhere
        sums = total[:, :, -2:] if elsewhere is None else torch.zeros_like(elsewhere)
        for call in ctx.plan.prefix:
            call.add_gradients(total, sums, *call.backward(saved, source))
        return total, None if elsewhere is None else sums, None


def merge(out: Tensor, lse: Tensor, rows: Rows, other: Tensor, other_lse: Tensor) -> None:
    """Merge other [n, K, R, D] over further keys with the rows of `out`, and their lse."""
    here, sums = taken(out, rows), taken(lse, rows)
    shares = torch.stack([sums, other_lse]).softmax(0).unsqueeze(-1)  # of both parts of the keys
    torch.addcmul(here * shares[0], other, shares[1], out=here)
    torch.logaddexp(sums, other_lse, out=sums)
    if not isinstance(rows, slice):
        out.index_copy_(0, rows, here)
        lse.index_copy_(0, rows, sums)
