"""Attention plans: index arrays for the attention calls of a packed micro-batch.

- `language_plan` (sdpa): a prompt attends causally to itself; an answer attends to its prompt and
  causally to itself. Sequences of nearly equal length share a call.
- `varlen_plan` (transformer_engine): the rule of `language_plan` in one call over sequences
  of different lengths.
- `cascade_plans.py` (flash): the rule of `language_plan` without copies of keys.
- `segments_plan`: full attention inside each segment, for vision towers.

Under context parallelism a rank computes the queries of its own rows and reads the keys of all.

Example: a prompt of 3 rows with answers of 2 and 1 input rows is `[p p p | a a | b]`. Row 4, the
second of `a`, attends to rows 0 to 4; row 5, `b`, attends to rows 0 to 2 and 5.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_vrl.batching.pack import MicroBatch
from megatron_vrl.models.attention import AttentionPlan, Bucket, VarlenPlan
from megatron_vrl.models.segments import Index, Segments, attention_segments, segment_buckets
from megatron_vrl.parallel.arrays import upload


class _PlanBuilder:
    """Builder of an AttentionPlan: collects buckets and the output index of each row."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.device = device
        self.buckets: list[Bucket] = []
        self.output_index = np.zeros(num_rows, dtype=np.int64)
        self.outputs = 0

    def add(
        self,
        queries: Index,
        valid: NDArray[np.bool_],
        keys: Index,
        mask: NDArray[np.bool_] | None,
        causal: bool,
    ) -> None:
        """Append a bucket: queries [B, Q], `valid` [B, Q], keys [B, S], mask [B, Q, S] or None."""
        slots = np.arange(queries.size).reshape(queries.shape) + self.outputs
        self.output_index[queries[valid]] = slots[valid]
        self.outputs += queries.size
        on = lambda array: upload(array, self.device)  # noqa: E731
        self.buckets.append(
            Bucket(on(queries), on(keys), None if mask is None else on(mask[:, None]), causal)
        )

    def plan(self) -> AttentionPlan:
        """Return the plan of all buckets added."""
        return AttentionPlan(tuple(self.buckets), upload(self.output_index, self.device))


def language_plan(batch: MicroBatch, device: torch.device) -> AttentionPlan:
    """Return the plan for sdpa: the queries of this rank and the keys of all context ranks."""
    query_index = np.zeros(len(batch.token_ids), dtype=np.int64)
    query_index[batch.rows] = np.arange(len(batch.rows))
    key_index = np.argsort(batch.key_rows)
    build = _PlanBuilder(len(batch.rows), device)
    for part, fast in segment_buckets(batch):
        rows, valid = _padded(part.query_start, part.query_length)
        keys, mask = _keys(part, valid)
        build.add(query_index[rows], valid, key_index[keys], None if fast else mask, causal=fast)
    return build.plan()


def varlen_plan(batch: MicroBatch, device: torch.device) -> VarlenPlan:
    """Return the plan for a variable-length kernel; it computes the same attention as
    `language_plan`."""
    row_index = np.zeros(len(batch.token_ids), dtype=np.int64)
    row_index[batch.rows] = np.arange(len(batch.rows))
    key_index = np.argsort(batch.key_rows)
    segments = attention_segments(batch)
    queries = row_index[_index_ranges(segments.query_start, segments.query_length)]
    starts = segments.prefix_start, segments.own_start  # a segment's keys: prefix, own rows
    key_lengths = segments.prefix_length, segments.own_length
    pairs = (np.stack(two, axis=1).reshape(-1) for two in (starts, key_lengths))
    keys = key_index[_index_ranges(*pairs)]
    output_index = np.zeros(len(batch.rows), dtype=np.int64)
    output_index[queries] = np.arange(len(queries))
    lengths = segments.query_length, segments.prefix_length + segments.own_length
    ends = [np.concatenate([[0], np.cumsum(n)]).astype(np.int32) for n in lengths]
    on = lambda array: upload(array, device)  # noqa: E731
    return VarlenPlan(
        queries=on(queries),
        keys=on(keys),
        cu_seqlens_q=on(ends[0]),
        cu_seqlens_k=on(ends[1]),
        max_seqlen_q=int(lengths[0].max(initial=0)),
        max_seqlen_k=int(lengths[1].max(initial=0)),
        output_index=on(output_index),
    )


def _index_ranges(starts: Index, lengths: Index) -> Index:
    """Return the concatenated ranges start, start + 1, ..., start + length - 1."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


def _keys(part: Segments, valid: NDArray[np.bool_]) -> tuple[Index, NDArray[np.bool_]]:
    """Return key rows [B, S] and the mask [B, Q, S]. A padding query may attend to every key."""
    before, before_valid = _padded(part.prefix_start, part.prefix_length)
    own, _ = _padded(part.own_start, part.own_length)
    last_seen = (part.own_length - part.query_length)[:, None] + np.arange(valid.shape[1])  # [B, Q]
    sees_own = np.arange(own.shape[1]) <= last_seen[:, :, None]
    shape = (*valid.shape, before.shape[1])
    sees_before = np.broadcast_to(before_valid[:, None, :], shape)
    mask = np.concatenate([sees_before, sees_own], axis=2) | ~valid[:, :, None]
    return np.concatenate([before, own], axis=1), mask


def _padded(starts: Index, lengths: Index) -> tuple[Index, NDArray[np.bool_]]:
    """Return rows [B, longest] counted from each start, padded with row 0, and which of them are
    valid."""
    offsets = np.arange(int(lengths.max()))
    valid = offsets[None, :] < lengths[:, None]
    return np.where(valid, starts[:, None] + offsets, 0), valid


def segments_plan(segments: list[Index], num_rows: int, device: torch.device) -> AttentionPlan:
    """Return the plan of full attention inside each segment. Equal lengths share a call without
    padding."""
    build = _PlanBuilder(num_rows, device)
    by_length: dict[int, list[Index]] = {}
    for segment in segments:
        by_length.setdefault(len(segment), []).append(segment)
    for members in by_length.values():
        rows = np.stack(members)
        build.add(rows, np.ones(rows.shape, dtype=bool), rows, None, causal=False)
    return build.plan()
