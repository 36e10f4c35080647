"""Index tensors of a vision tower, and the share of a rank in its temporal steps.

Shape letters: P patches of this rank, D channels of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vrl.models.architecture import VisionArchitecture
from megatron_vrl.models.attention import AttentionPlan
from megatron_vrl.parallel.arrays import upload
from megatron_vrl.parallel.mesh import Axis

Grid = tuple[int, int, int]  # temporal steps; height and width in patches


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShare:
    """Temporal steps that one rank encodes."""

    steps: list[tuple[int, int]]  # height and width in patches
    patches: slice  # this rank's among the patches of all temporal steps
    counts: list[int]  # tokens of each rank that shares the temporal steps


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedPositions:
    """Interpolation of the table of learned positions at U places, which patches may share."""

    cells: Tensor  # [U, 4] rows of the table around each place
    weights: Tensor  # [U, 4] float32
    place: Tensor  # [P] index in U


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionInputs:
    """Index tensors of the vision tower for the temporal steps of one rank."""

    patches: slice  # this rank's among the patches of all temporal steps
    counts: list[int]  # tokens of each rank that shares the temporal steps
    angles: Tensor  # [P, 1, 1, D] float32 rotary angles
    plans: dict[int, AttentionPlan]  # layer number from 1 -> plan
    learned: LearnedPositions | None = None  # None: rotary positions only


# (grids, sizes of the tower, device, ranks that share the temporal steps; None: this rank has all)
MakeVisionInputs = Callable[
    [Sequence[Grid], VisionArchitecture, torch.device, Axis | None], VisionInputs
]


def share_steps(grids: Sequence[Grid], merge: int, sharing: Axis | None) -> StepShare:
    """Return the share of this rank; all temporal steps without `sharing`."""
    steps = [(h, w) for t, h, w in grids for _ in range(t)]
    sizes = [h * w for h, w in steps]
    bounds = shard_steps(sizes, sharing.size if sharing else 1)
    first, last = bounds[sharing.rank if sharing else 0]
    begin = sum(sizes[:first])
    return StepShare(
        steps=steps[first:last],
        patches=slice(begin, begin + sum(sizes[first:last])),
        counts=[sum(sizes[a:b]) // merge**2 for a, b in bounds],
    )


def vision_inputs(
    share: StepShare,
    arch: VisionArchitecture,
    plans: dict[int, AttentionPlan],
    device: torch.device,
) -> VisionInputs:
    """Return the inputs of a tower with rotary positions alone."""
    return VisionInputs(
        patches=share.patches,
        counts=share.counts,
        angles=upload(rotary_angles(share.steps, arch), device),
        plans=plans,
    )


def shard_steps(sizes: Sequence[int], ranks: int) -> list[tuple[int, int]]:
    """Partition temporal steps into one contiguous range [first, last) per rank, of nearly equal
    patches.

    Rank r ends before the step that would exceed (r + 1) / ranks of all patches.
    """
    ends = np.cumsum(sizes) if len(sizes) else np.zeros(0)
    total = float(ends[-1]) if len(sizes) else 0.0
    cuts = [0]
    for rank in range(1, ranks):
        cuts.append(int(np.searchsorted(ends, total * rank / ranks, side="right")))
    return list(zip(cuts, [*cuts[1:], len(sizes)], strict=True))


def rotary_angles(
    steps: Sequence[tuple[int, int]], arch: VisionArchitecture
) -> NDArray[np.float32]:
    """Return rotary angles [P, 1, 1, D] of the patches of `steps`, (height, width) each.

    The first quarter of a head's channels encodes the row, the second quarter the column. Both are
    repeated for the second half (rotate-half convention).
    """
    quarter = arch.hidden // arch.heads // 4
    frequency = 1.0 / 10000.0 ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    m = arch.merge
    coordinates = [np.zeros((0, 2))]
    for height, width in steps:
        rows, cols = np.indices((height, width))
        merged = [
            axis.reshape(height // m, m, width // m, m).swapaxes(1, 2).reshape(-1)
            for axis in (rows, cols)
        ]
        coordinates.append(np.stack(merged, axis=1))  # [patches of the step, 2]
    at = torch.from_numpy(np.concatenate(coordinates)).float()
    half = (at[:, :, None] * frequency).flatten(1)  # [P, D / 2]
    angles: NDArray[np.float32] = torch.cat([half, half], dim=-1)[:, None, None, :].numpy()
    return angles
