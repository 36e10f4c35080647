"""Attention plans of Qwen2.5-VL's tower: full attention inside a temporal step or its windows."""

import numpy as np
import torch

from megatron_vrl.models.architecture import VisionArchitecture
from megatron_vrl.models.attention import AttentionPlan
from megatron_vrl.models.attention_plans import segments_plan
from megatron_vrl.models.segments import Index


def vision_plans(
    slices: list[tuple[int, int]], arch: VisionArchitecture, device: torch.device
) -> dict[int, AttentionPlan]:
    """Return the plan of every layer, numbered from 1, for temporal steps of (height, width)
    patches.

    Patches of a step are in merge order: the merge x merge patches of one token are adjacent.
    """
    sizes = np.array([h * w for h, w in slices])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    whole = [start + np.arange(size) for start, size in zip(starts, sizes, strict=True)]
    windows = [
        start + rows
        for start, (h, w) in zip(starts, slices, strict=True)
        for rows in _window_rows(h, w, arch)
    ]
    full = segments_plan(whole, int(sizes.sum()), device)
    window = segments_plan(windows, int(sizes.sum()), device)
    return {
        layer + 1: full if layer in arch.full_attention_layers else window
        for layer in range(arch.layers)
    }


def _window_rows(height: int, width: int, arch: VisionArchitecture) -> list[Index]:
    """Return the rows of each window of a temporal step. Windows at the right and bottom may be
    smaller."""
    side = arch.window // arch.merge // arch.patch  # tokens along one side of a window
    rows, cols = height // arch.merge, width // arch.merge
    cells = np.arange(rows * cols).reshape(rows, cols)
    unit = arch.merge**2
    return [
        (cells[i : i + side, j : j + side].reshape(-1, 1) * unit + np.arange(unit)).reshape(-1)
        for i in range(0, rows, side)
        for j in range(0, cols, side)
    ]
