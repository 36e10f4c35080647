"""Attention plans: packed rows -> buckets of nearly equal length.

`language_plan` is the shared-prompt rule in two kinds of calls of a stock kernel: prompts to
themselves, causal; answers to (their prompt, themselves), causal from the bottom right.
`vision_plans` is Qwen2.5-VL's: full attention inside a temporal step, or inside its windows.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_vrl.batching.pack import MicroBatch, length_buckets
from megatron_vrl.model.architecture import VisionArchitecture
from megatron_vrl.model.layers import AttentionPlan, Bucket

Index = NDArray[np.int64]


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
    build = _Builder(len(batch.token_ids), device)
    for members in length_buckets(batch.prompt_length.tolist()):
        rows, valid = _padded(batch.prompt_start[members], batch.prompt_length[members])
        build.add(rows, valid, rows, None, causal=True)
    group = batch.answer_group
    spans = (batch.prompt_length[group] + batch.answer_length) * (batch.answer_length > 0)
    for members in length_buckets(spans.tolist()):
        rows, valid = _padded(batch.answer_start[members], batch.answer_length[members])
        prompt = group[members]
        p_rows, p_valid = _padded(batch.prompt_start[prompt], batch.prompt_length[prompt])
        own = np.tri(rows.shape[1], dtype=bool) & valid[:, None, :]  # [B, Q, Q]
        own |= ~valid[:, :, None]  # a padding query looks anywhere, so that no row is all False
        seen = np.broadcast_to(p_valid[:, None, :], (len(members), rows.shape[1], p_rows.shape[1]))
        mask = np.concatenate([seen, own], axis=2)
        build.add(rows, valid, np.concatenate([p_rows, rows], axis=1), mask, causal=False)
    return build.plan()


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
