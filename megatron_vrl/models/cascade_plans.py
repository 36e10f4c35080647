"""Plans of cascade attention: ranges of rows, and the calls of a device over them.

Example: a prompt of 3 rows with answers of 2 and 1 input rows is `[p p p | a a | b]`. The own
ranges are 0-3, 3-5 and 5-6. The one prefix range has queries 3-6 and keys 0-3: both answers attend
to their prompt in one call, and the prompt's keys are read where they lie.

Under context parallelism a rank computes the queries of its own rows. A sequence that begins before
a rank's contiguous range of rows has a prefix range for its earlier rows.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from megatron_vrl.batching.pack import MicroBatch, length_buckets
from megatron_vrl.models.cascade_attention import CascadePlan
from megatron_vrl.models.cascade_calls import OwnCall, PaddedCall, VarlenCall, ViewCall
from megatron_vrl.models.segments import Index, attention_segments
from megatron_vrl.parallel.arrays import upload

PADDING = 128  # rows of padding that attend to each other, at most
SEPARATE = 512  # rows; a longer sequence has a call of its own on a CPU and is not copied


class Range(NamedTuple):
    """Queries of L and the keys of T (or of L, for own rows) that they attend to."""

    first: int
    end: int
    first_key: int
    end_key: int


def cascade_plan(batch: MicroBatch, device: torch.device, key_heads: int) -> CascadePlan:
    """Return the plan for `device`; `key_heads` are the key-value heads of a tensor rank."""
    if device.type == "cuda":
        return varlen_cascade(batch, device)
    return view_cascade(batch, device, key_heads)


def varlen_cascade(batch: MicroBatch, device: torch.device) -> CascadePlan:
    """Return the plan of a GPU: one own call; without context parallelism one prefix call."""
    own = varlen_call(own_ranges(batch), device, causal=True)
    parts = ascending(prefix_ranges(batch))
    prefix = tuple(varlen_call(part, device, causal=False) for part in parts)
    return CascadePlan((own,), prefix, _key_order(batch, device))


def view_cascade(batch: MicroBatch, device: torch.device, key_heads: int) -> CascadePlan:
    """Return the plan of a CPU: one prefix call for each group."""
    own = _own_calls(own_ranges(batch), key_heads, device)
    prefix = (ViewCall(slice(*r[:2]), slice(*r[2:]), causal=False) for r in prefix_ranges(batch))
    return CascadePlan(own, tuple(prefix), _key_order(batch, device))


def _key_order(batch: MicroBatch, device: torch.device) -> torch.Tensor | None:
    """Return the index of each row of T among the gathered keys; None on one context rank."""
    if len(batch.rows) == len(batch.key_rows):
        return None
    return upload(np.argsort(batch.key_rows), device)


def own_ranges(batch: MicroBatch) -> list[Range]:
    """Return the range of each sequence on this rank, and of pieces of padding; all L rows."""
    segments = attention_segments(batch)
    starts = _local(batch)[segments.query_start]
    ends = starts + segments.query_length
    ranges, at = [], 0
    for first, end in [*sorted(zip(starts.tolist(), ends.tolist(), strict=True)), (None, None)]:
        until = len(batch.rows) if first is None else first
        cuts = [*range(at, until, PADDING), until]
        ranges += [Range(a, b, a, b) for a, b in pairwise(cuts)]
        if first is not None:
            ranges.append(Range(first, end, first, end))
            at = end
    return ranges


def prefix_ranges(batch: MicroBatch) -> list[Range]:
    """Return ranges of queries of L with the earlier rows of T that all of them attend to."""
    segments = attention_segments(batch)
    starts = _local(batch)[segments.query_start]
    ranges: list[Range] = []
    for i in np.argsort(starts, kind="stable").tolist():
        first, part = int(starts[i]), segments.take([i])
        end = first + int(part.query_length[0])
        begin, own = int(part.prefix_start[0]), int(part.own_start[0])
        prefix_end = begin + int(part.prefix_length[0])
        if prefix_end > begin:
            last = ranges[-1] if ranges else None
            if last is not None and (last.end, *last[2:]) == (first, begin, prefix_end):
                ranges[-1] = last._replace(end=end)
            else:
                ranges.append(Range(first, end, begin, prefix_end))
        earlier = int(part.own_length[0] - part.query_length[0])
        if earlier > 0:
            ranges.append(Range(first, end, own, own + earlier))
    return ranges


def _local(batch: MicroBatch) -> Index:
    """Return the index in L of each row of T; 0 for rows of other ranks."""
    local = np.zeros(len(batch.token_ids), dtype=np.int64)
    local[batch.rows] = np.arange(len(batch.rows))
    return local


def ascending(ranges: Sequence[Range]) -> list[list[Range]]:
    """Partition ranges into calls in which queries and keys ascend and do not overlap."""
    calls: list[list[Range]] = []
    for new in ranges:
        for call in calls:
            if call[-1].end <= new.first and call[-1].end_key <= new.first_key:
                call.append(new)
                break
        else:
            calls.append([new])
    return calls


def indexed_rows(batch: MicroBatch) -> int:
    """Return how many queries the prefix calls of a GPU read by their index, and not as a range."""
    calls = ascending(prefix_ranges(batch))
    rows = [sum(part.end - part.first for part in call) for call in calls]
    ranges = [call[-1].end - call[0].first for call in calls]
    return sum(n for n, whole in zip(rows, ranges, strict=True) if n < whole)


def varlen_call(ranges: Sequence[Range], device: torch.device, *, causal: bool) -> VarlenCall:
    """Return one variable-length call over ascending ranges."""
    lengths: list[tuple[int, int]] = []
    at = ranges[0].first_key
    for part in ranges:
        if part.first_key > at:  # keys that no query attends to
            lengths.append((0, part.first_key - at))
        lengths.append((part.end - part.first, part.end_key - part.first_key))
        at = part.end_key
    queries, keys = (np.array(column) for column in zip(*lengths, strict=True))
    ends = [np.concatenate([[0], np.cumsum(n)]).astype(np.int32) for n in (queries, keys)]
    first, end = ranges[0].first, ranges[-1].end
    rows: slice | torch.Tensor = slice(first, end)
    if int(queries.sum()) < end - first:
        index = np.concatenate([np.arange(part.first, part.end) for part in ranges])
        rows = upload(index, device)
    return VarlenCall(
        queries=rows,
        keys=slice(ranges[0].first_key, ranges[-1].end_key),
        causal=causal,
        cu_seqlens_q=upload(ends[0], device),
        cu_seqlens_k=upload(ends[1], device),
        # FlashAttention treats a maximum of 1 as decoding, where each sequence has a query.
        max_seqlen_q=max(2, int(queries.max())),
        max_seqlen_k=int(keys.max()),
        generator_state=upload(np.zeros(2, dtype=np.uint64), device),
    )


def _own_calls(
    ranges: Sequence[Range], key_heads: int, device: torch.device
) -> tuple[OwnCall, ...]:
    """Return the causal calls of a CPU: long sequences alone, short ones of similar length
    together."""
    lengths = [part.end - part.first for part in ranges]
    calls: list[OwnCall] = []
    for i, length in enumerate(lengths):
        if length > SEPARATE:
            calls.append(_view(ranges[i]))
    for members in length_buckets([0 if n > SEPARATE else n for n in lengths]):
        if len(members) == 1:
            calls.append(_view(ranges[members[0]]))
        else:
            chosen = [ranges[i] for i in members]
            calls.append(_padded(chosen, ranges[-1].end, key_heads, device))
    return tuple(calls)


def _view(part: Range) -> ViewCall:
    return ViewCall(slice(*part[:2]), slice(*part[2:]), causal=True)


def _padded(ranges: Sequence[Range], rows: int, key_heads: int, device: torch.device) -> PaddedCall:
    """Return the call over sequences of nearly equal length; `rows` is L."""
    first = np.array([part.first for part in ranges])[:, None]
    length = np.array([part.end for part in ranges])[:, None] - first  # [B, 1]
    offsets = np.arange(int(length.max()))
    heads = np.arange(key_heads)[:, None]
    index = np.where(offsets < length, first + offsets, -1)[:, None]  # [B, 1, S]
    places = [np.where(index < 0, pad, index) * key_heads + heads for pad in (0, rows)]
    on = [upload(place.reshape(-1), device) for place in places]
    return PaddedCall(on[0], on[1], len(offsets))
