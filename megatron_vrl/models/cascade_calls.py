"""Attention calls that return a log-sum-exp and have a backward pass for merged outputs.

`ViewCall` and `PaddedCall` are torch's FlashAttention for a CPU, in any number format. `VarlenCall`
is torch's FlashAttention for a GPU. `models/cascade_attention.py` merges the calls.

Shape letters: L packed rows of this rank, T packed rows of all context-parallel ranks, n queries of
a call, m keys of a call, K key-value heads, R query heads of a key head, H = K * R, D channels of a
head, B entries of a padded call, S rows of an entry.
"""

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.attention.varlen import AuxRequest, varlen_attn

# torch 2.11 has no `enable_gqa`: it accepts fewer key heads than query heads without a flag.
GQA_KWARGS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)
Rows = slice | Tensor  # a range of rows, or indices of rows


class Saved(NamedTuple):
    """Tensors that the backward pass of a call reads."""

    mixed: Tensor  # [L, K, R + 2, D]
    grad: Tensor  # [L, K, R, D] gradient of the merged output
    out: Tensor  # [L, K, R, D] merged output
    lse: Tensor  # [L + 1, K, R] merged log-sum-exp; the last row is infinite


class OwnCall(Protocol):
    """Causal attention of rows to rows of their own sequence, each row in one call."""

    def forward(self, mixed: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp for keys and values source [rows, K, 2, D]."""

    def write(self, out: Tensor, lse: Tensor, result: tuple[Tensor, Tensor]) -> None:
        """Write the result of `forward` into out [L + 1, K, R, D] and lse [L + 1, K, R]."""

    def backward(self, saved: Saved, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of queries, keys and values for the merged output."""

    def set_gradients(self, total: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Write the result of `backward` into total [L + 1, K, R + 2, D]."""


@dataclass(frozen=True, slots=True)
class ViewCall:
    """Call of torch's FlashAttention for the CPU on views: the key heads are its batch."""

    queries: slice  # n of L
    keys: slice  # m of T
    causal: bool

    def forward(self, mixed: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return output [n, K, R, D] and log-sum-exp [n, K, R]."""
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *self._views(mixed, source), 0.0, self.causal
        )
        return out.permute(2, 0, 1, 3), lse.permute(2, 0, 1)

    def write(self, out: Tensor, lse: Tensor, result: tuple[Tensor, Tensor]) -> None:
        """Write the result of `forward` into the rows of `out` and `lse`."""
        out[self.queries].copy_(result[0])
        lse[self.queries].copy_(result[1])

    def backward(self, saved: Saved, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of queries [K, R, n, D], keys and values [K, 1, m, D]."""
        gradients: tuple[Tensor, Tensor, Tensor] = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                saved.grad[self.queries].permute(1, 2, 0, 3),
                *self._views(saved.mixed, source),
                saved.out[self.queries].permute(1, 2, 0, 3),
                saved.lse[self.queries].permute(1, 2, 0),
                0.0,
                self.causal,
            )
        )
        return gradients

    def set_gradients(self, total: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Write the result of `backward` into the rows of `total`."""
        parts = torch.cat([query, key, value], dim=1)
        total[self.queries].copy_(parts.permute(2, 0, 1, 3))

    def add_gradients(
        self, total: Tensor, sums: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Add the result of `backward` to total [L, K, R + 2, D] and sums [T, K, 2, D]."""
        views = self._views(total, sums)
        for view, gradient in zip(views, (query, key, value), strict=True):
            view.add_(gradient)

    def _views(self, mixed: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [K, R, n, D], keys [K, 1, m, D] and values [K, 1, m, D]."""
        heads_first = mixed[self.queries, :, :-2].permute(1, 2, 0, 3)
        key, value = source[self.keys].permute(1, 2, 0, 3).split(1, dim=1)
        return heads_first, key, value


@dataclass(frozen=True, slots=True)
class PaddedCall:
    """Causal call of torch's FlashAttention for the CPU on sequences of nearly equal length.

    Shorter sequences are padded at their end, so no row sees padding. In the backward pass the
    log-sum-exp of padding is infinite, and its gradients are 0.
    """

    rows: Tensor  # [B * K * S] index of row and key head in L * K; padding is 0
    slots: Tensor  # [B * K * S] the same index; padding is in row L
    length: int  # S

    def forward(self, mixed: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return output [B * K * S, R, D] and log-sum-exp [B * K * S, R]."""
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *self._gathered(mixed), 0.0, True
        )
        return out.transpose(1, 2).flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)

    def write(self, out: Tensor, lse: Tensor, result: tuple[Tensor, Tensor]) -> None:
        """Write the result of `forward` into the rows of `out` and `lse`; padding into the last."""
        for into, values in zip((out, lse), result, strict=True):
            into.flatten(0, 1).index_copy_(0, self.slots, values)

    def backward(self, saved: Saved, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of queries [B * K, R, S, D], keys and values [B * K, 1, S, D]."""
        gradients: tuple[Tensor, Tensor, Tensor] = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                self._entries(saved.grad, self.rows),
                *self._gathered(saved.mixed),
                self._entries(saved.out, self.rows),
                self._entries(saved.lse, self.slots),
                0.0,
                True,
            )
        )
        return gradients

    def set_gradients(self, total: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Write the result of `backward` into the rows of `total`; padding into the last."""
        parts = torch.cat([x.transpose(1, 2) for x in (query, key, value)], dim=2)
        total.flatten(0, 1).index_copy_(0, self.slots, parts.flatten(0, 1))

    def _gathered(self, mixed: Tensor) -> tuple[Tensor, ...]:
        """Return copies of queries [B * K, R, S, D], keys and values [B * K, 1, S, D]."""
        heads = mixed.shape[2] - 2
        return self._entries(mixed, self.rows).split([heads, 1, 1], dim=1)

    def _entries(self, values: Tensor, index: Tensor) -> Tensor:
        """Return [B * K, heads, S, ...] of values [rows, K, heads, ...]."""
        chosen = values.flatten(0, 1).index_select(0, index)
        return chosen.unflatten(0, (-1, self.length)).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class VarlenCall:
    """Call of torch's FlashAttention for a GPU over sequences of any length.

    A sequence with keys and no query stands for keys between those of two other sequences.
    """

    queries: Rows  # n of L
    keys: slice  # m of T
    causal: bool
    cu_seqlens_q: Tensor  # [E + 1] int32, from 0 to n, of E sequences
    cu_seqlens_k: Tensor  # [E + 1] int32, from 0 to m
    max_seqlen_q: int
    max_seqlen_k: int
    generator_state: Tensor  # [2] uint64 zeros: the kernel's dropout is off

    def forward(self, mixed: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return output [n, K, R, D] and log-sum-exp [n, K, R]."""
        query = taken(mixed[:, :, :-2], self.queries)
        key, value = source[self.keys].unbind(2)
        out, lse = flash_forward(query.flatten(1, 2), key, value, self)
        return out.view(query.shape), lse.t().unflatten(1, query.shape[1:3])

    def write(self, out: Tensor, lse: Tensor, result: tuple[Tensor, Tensor]) -> None:
        """Write the result of `forward` into the rows of `out` and `lse`, a range."""
        assert isinstance(self.queries, slice)
        out[self.queries].copy_(result[0])
        lse[self.queries].copy_(result[1])

    def backward(self, saved: Saved, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of queries [n, K, R, D], keys and values [m, K, D]."""
        query, grad, out = (
            taken(x, self.queries).flatten(1, 2)
            for x in (saved.mixed[:, :, :-2], saved.grad, saved.out)
        )
        lse = taken(saved.lse, self.queries).flatten(1).t().contiguous()  # [H, n]
        key, value = source[self.keys].unbind(2)
        of_query, of_key, of_value = flash_backward(grad, query, key, value, out, lse, self)
        return of_query.unflatten(1, saved.grad.shape[1:3]), of_key, of_value

    def set_gradients(self, total: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Write the result of `backward` into the rows of `total`, a range."""
        assert isinstance(self.queries, slice)
        rows = total[self.queries]
        rows[:, :, :-2].copy_(query)
        torch.stack([key, value], dim=2, out=rows[:, :, -2:])

    def add_gradients(
        self, total: Tensor, sums: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Add the result of `backward` to total [L, K, R + 2, D] and sums [T, K, 2, D]."""
        if isinstance(self.queries, slice):
            total[self.queries, :, :-2].add_(query)
        else:
            total[:, :, :-2].index_add_(0, self.queries, query)
        for view, gradient in zip(sums[self.keys].unbind(2), (key, value), strict=True):
            view.add_(gradient)


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, call: VarlenCall
) -> tuple[Tensor, Tensor]:
    """Return output [n, H, D] and log-sum-exp [H, n] of torch's variable-length kernel.

    Arguments are query [n, H, D], key and value [m, K, D] in any strides of rows and heads.
    """
    result: Any = varlen_attn(
        query,
        key,
        value,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.max_seqlen_q,
        call.max_seqlen_k,
        window_size=(-1, 0 if call.causal else -1),
        return_aux=AuxRequest(lse=True),
        **GQA_KWARGS,
    )
    out, lse = result
    return out, lse


def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    call: VarlenCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value for merged `out` and `lse`.

    This is the operation that `varlen_attn` calls in its own backward pass, which passes the
    output of the one call.
    """
    unused = query.new_empty(0)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad,
        query,
        key,
        value,
        out,
        lse,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.max_seqlen_q,
        call.max_seqlen_k,
        0.0,  # dropout
        call.causal,
        call.generator_state,
        unused,
        window_size_left=-1,
        window_size_right=0 if call.causal else -1,
    )
    return gradients


def taken(values: Tensor, rows: Rows) -> Tensor:
    """Return the rows of `values`: a view of a range, a copy of indices."""
    return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)
