"""Index tensors of Qwen3-VL's vision tower: full attention and learned positions.

Shape letters: P patches of this rank, U places of the distinct sizes of its temporal steps.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_vrl.models.architecture import VisionArchitecture
from megatron_vrl.models.attention import AttentionPlan
from megatron_vrl.models.attention_plans import segments_plan
from megatron_vrl.models.vision_inputs import (
    Grid,
    LearnedPositions,
    VisionInputs,
    share_steps,
    vision_inputs,
)
from megatron_vrl.parallel.arrays import upload
from megatron_vrl.parallel.mesh import Axis

Step = tuple[int, int]  # height and width of one temporal step in patches


def tower_inputs(
    grids: Sequence[Grid], arch: VisionArchitecture, device: torch.device, sharing: Axis | None
) -> VisionInputs:
    """Return the index tensors of this rank's temporal steps."""
    share = share_steps(grids, arch.merge, sharing)
    plans: dict[int, AttentionPlan] = {}
    if share.steps:
        plan = _full_attention(share.steps, device)
        plans = {layer + 1: plan for layer in range(arch.layers)}
    cells, weights, place = learned_positions(share.steps, arch)
    learned = LearnedPositions(
        cells=upload(cells, device), weights=upload(weights, device), place=upload(place, device)
    )
    return replace(vision_inputs(share, arch, plans, device), learned=learned)


def _full_attention(steps: Sequence[Step], device: torch.device) -> AttentionPlan:
    """Return the plan of full attention inside each temporal step."""
    ends = np.cumsum([0, *(height * width for height, width in steps)])
    rows = [np.arange(first, last) for first, last in pairwise(ends)]
    return segments_plan(rows, int(ends[-1]), device)


def learned_positions(
    steps: Sequence[Step], arch: VisionArchitecture
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Return cells [U, 4] of the table of positions and their weights [U, 4], and the place [P] of
    each patch in them.

    The corners of a step lie on the corners of the table. The embeddings in between are bilinear
    interpolations of the four nearest cells. Steps of equal size share their places.
    """
    begin: dict[Step, int] = {}
    cells, weights = [np.zeros((0, 4), np.int64)], [np.zeros((0, 4), np.float32)]
    for step in dict.fromkeys(steps):
        begin[step] = sum(map(len, cells))
        rows, columns = (_neighbours(length, arch.position_grid) for length in step)
        cell = rows[0][:, None, :, None] * arch.position_grid + columns[0][None, :, None, :]
        weight = rows[1][:, None, :, None] * columns[1][None, :, None, :]
        order = _merge_order(*step, arch.merge)
        cells.append(cell.reshape(-1, 4)[order])
        weights.append(weight.reshape(-1, 4)[order])
    place = [begin[h, w] + np.arange(h * w) for h, w in steps]
    none = np.zeros(0, np.int64)
    return np.concatenate(cells), np.concatenate(weights), np.concatenate([none, *place])


def _neighbours(length: int, side: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the two nearest of `side` cells [length, 2] of each patch along an axis, and their
    weights."""
    at = np.arange(length, dtype=np.float32) * np.float32(side - 1) / np.float32(max(1, length - 1))
    below = np.floor(at).astype(np.int64)
    above = np.minimum(below + 1, side - 1)
    fraction = at - below.astype(np.float32)
    return np.stack([below, above], axis=1), np.stack([1 - fraction, fraction], axis=1)


def _merge_order(height: int, width: int, merge: int) -> NDArray[np.int64]:
    """Return the row-major indices of a step's patches in merge order: the merge x merge patches of
    one token are adjacent."""
    index = np.arange(height * width).reshape(height // merge, merge, width // merge, merge)
    return index.swapaxes(1, 2).reshape(-1)
