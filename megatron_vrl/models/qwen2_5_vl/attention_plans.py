"""Attention plans: packed rows -> buckets of nearly equal length.

`language_plan` is the shared-prompt rule in two kinds of calls of a stock kernel: prompts to
themselves, causal; answers to (their prompt, themselves), causal from the bottom right.
`varlen_plan` is the same rule for a kernel that takes sequences of different lengths. Under
context parallelism a rank holds pieces of both, which see what stands before them likewise.
`vision_plans` is Qwen2.5-VL's: full attention inside a temporal step, or inside its windows.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_vrl.batching.pack import MicroBatch
from megatron_vrl.models.architecture import VisionArchitecture
from megatron_vrl.models.layers import AttentionPlan, Bucket, VarlenPlan
from megatron_vrl.models.segments import Index, Segments, buckets_of, segments_of


class _Builder:
    """Collects buckets and where each row's output will lie."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.device = device
        self.buckets: list[Bucket] = []
        self.place = np.zeros(num_rows, dtype=np.int64)
        self.outputs = 0

    def add(
        self,
        queries: Index,
        valid: NDArray[np.bool_],
        keys: Index,
        mask: NDArray[np.bool_] | None,
        causal: bool,
    ) -> None:
        """queries [B, Q] with their validity, keys [B, S], mask [B, Q, S] or None."""
        slots = np.arange(queries.size).reshape(queries.shape) + self.outputs
        self.place[queries[valid]] = slots[valid]
        self.outputs += queries.size
        on = lambda array: torch.from_numpy(array).to(self.device)  # noqa: E731
        self.buckets.append(
            Bucket(on(queries), on(keys), None if mask is None else on(mask[:, None]), causal)
        )

    def plan(self) -> AttentionPlan:
        return AttentionPlan(tuple(self.buckets), torch.from_numpy(self.place).to(self.device))


def language_plan(batch: MicroBatch, device: torch.device) -> AttentionPlan:
    """Who attends to whom among the rows of this rank and the keys of all."""
    place_of_query = np.zeros(len(batch.token_ids), dtype=np.int64)
    place_of_query[batch.rows] = np.arange(len(batch.rows))
    place_of_key = np.argsort(batch.key_rows)
    build = _Builder(len(batch.rows), device)
    for part, fast in buckets_of(batch):
        rows, valid = _padded(part.start, part.length)
        keys, mask = _keys(part, valid)
        build.add(
            place_of_query[rows], valid, place_of_key[keys], None if fast else mask, causal=fast
        )
    return build.plan()


def varlen_plan(batch: MicroBatch, device: torch.device) -> VarlenPlan:
    """The rule of `language_plan` in one call."""
    place_of_row = np.zeros(len(batch.token_ids), dtype=np.int64)
    place_of_row[batch.rows] = np.arange(len(batch.rows))
    place_of_key = np.argsort(batch.key_rows)
    segments = segments_of(batch)
    queries = place_of_row[_runs(segments.start, segments.length)]
    pairs = (
        np.stack(two, axis=1).reshape(-1)  # a segment's prefix, then its own keys
        for two in ((segments.prefix_start, segments.own_start), (segments.prefix, segments.own))
    )
    keys = place_of_key[_runs(*pairs)]
    place = np.zeros(len(batch.rows), dtype=np.int64)
    place[queries] = np.arange(len(queries))
    lengths = segments.length, segments.prefix + segments.own
    ends = [np.concatenate([[0], np.cumsum(n)]).astype(np.int32) for n in lengths]
    on = lambda array: torch.from_numpy(array).to(device)  # noqa: E731
    return VarlenPlan(
        queries=on(queries),
        keys=on(keys),
        query_ends=on(ends[0]),
        key_ends=on(ends[1]),
        longest_query=int(lengths[0].max(initial=0)),
        longest_key=int(lengths[1].max(initial=0)),
        place=on(place),
    )


def _runs(starts: Index, lengths: Index) -> Index:
    """start, start + 1, ... of each run, one after the other."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


def _keys(part: Segments, valid: NDArray[np.bool_]) -> tuple[Index, NDArray[np.bool_]]:
    """Key rows [B, S] and the mask [B, Q, S]; a padding query looks anywhere."""
    before, before_valid = _padded(part.prefix_start, part.prefix)
    own, _ = _padded(part.own_start, part.own)
    last_seen = (part.own - part.length)[:, None] + np.arange(valid.shape[1])  # [B, Q]
    sees_own = np.arange(own.shape[1]) <= last_seen[:, :, None]
    shape = (*valid.shape, before.shape[1])
    sees_before = np.broadcast_to(before_valid[:, None, :], shape)
    mask = np.concatenate([sees_before, sees_own], axis=2) | ~valid[:, :, None]
    return np.concatenate([before, own], axis=1), mask


def _padded(starts: Index, lengths: Index) -> tuple[Index, NDArray[np.bool_]]:
    """Rows [B, longest] from each start, padded with row 0, and which of them are real."""
    offsets = np.arange(int(lengths.max()))
    valid = offsets[None, :] < lengths[:, None]
    return np.where(valid, starts[:, None] + offsets, 0), valid


def vision_plans(
    slices: list[tuple[int, int]], arch: VisionArchitecture, device: torch.device
) -> dict[int, AttentionPlan]:
    """Plan of every layer (1-based) for temporal steps of (height, width) in patches.

    Rows of a step are in the merged order: the merge x merge patches of one token are adjacent.
    """
    sizes = np.array([h * w for h, w in slices])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    whole = [start + np.arange(size) for start, size in zip(starts, sizes, strict=True)]
    windows = [
        start + rows
        for start, (h, w) in zip(starts, slices, strict=True)
        for rows in _window_rows(h, w, arch)
    ]
    full = _segments_plan(whole, int(sizes.sum()), device)
    window = _segments_plan(windows, int(sizes.sum()), device)
    return {
        layer + 1: full if layer in arch.full_attention_layers else window
        for layer in range(arch.layers)
    }


def _window_rows(height: int, width: int, arch: VisionArchitecture) -> list[Index]:
    """Rows of each window of one temporal step; the last windows of a side may be smaller."""
    side = arch.window // arch.merge // arch.patch  # tokens per side of a window
    rows, cols = height // arch.merge, width // arch.merge
    cells = np.arange(rows * cols).reshape(rows, cols)
    unit = arch.merge**2
    return [
        (cells[i : i + side, j : j + side].reshape(-1, 1) * unit + np.arange(unit)).reshape(-1)
        for i in range(0, rows, side)
        for j in range(0, cols, side)
    ]


def _segments_plan(segments: list[Index], num_rows: int, device: torch.device) -> AttentionPlan:
    """Full attention inside each segment; segments of one length share a call without padding."""
    build = _Builder(num_rows, device)
    by_length: dict[int, list[Index]] = {}
    for segment in segments:
        by_length.setdefault(len(segment), []).append(segment)
    for members in by_length.values():
        rows = np.stack(members)
        build.add(rows, np.ones(rows.shape, dtype=bool), rows, None, causal=False)
    return build.plan()
