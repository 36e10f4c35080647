"""Tensors that the passes over one micro-batch read, built on the host and sent before the passes.

A copy from pageable memory waits for all queued work of a GPU. Therefore every index tensor of a
step is made here, pinned, and sent before the first pass. Left out: frames and cached vision
embeddings, which are large; each pass sends its own, pinned.

Shape letters: L packed rows of this rank, N loss tokens, P patches of this rank, D channels of a
head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vrl.batching.pack import MicroBatch
from megatron_vrl.models.architecture import Architecture, VisionArchitecture
from megatron_vrl.models.attention import AttentionPlan
from megatron_vrl.models.qwen2_5_vl.attention_plans import language_plan, varlen_plan, vision_plans
from megatron_vrl.models.qwen2_5_vl.cascade_plans import cascade_plan
from megatron_vrl.parallel.arrays import upload
from megatron_vrl.parallel.mesh import Axis, Mesh

Grid = tuple[int, int, int]  # temporal steps; height and width in patches


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionInputs:
    """Index tensors of the vision tower for the temporal steps of one rank."""

    patches: slice  # this rank's among the patches of all temporal steps
    counts: list[int]  # tokens of each rank that shares the temporal steps
    angles: Tensor  # [P, 1, 1, D] float32 rotary angles
    plans: dict[int, AttentionPlan]  # layer number from 1 -> plan


@dataclass(frozen=True, slots=True, kw_only=True)
class PassInputs:
    """Micro-batch with its tensors on the device."""

    batch: MicroBatch
    token_ids: Tensor  # [1, L]
    positions: Tensor  # [3, 1, L]
    plan: object  # of the type that the core attention executes
    vision_rows: Tensor  # rows of this rank that vision embeddings replace
    vision_index: Tensor  # their indices in the embeddings of the micro-batch
    vision: VisionInputs | None  # None: no visual needs the tower
    source: Tensor  # [N] index in L
    target: Tensor  # [N]
    advantage: Tensor  # [N]
    engine_logprob: Tensor  # [N]
    sequence: Tensor  # [N]
    weight: Tensor  # [N]


def pass_inputs(batch: MicroBatch, arch: Architecture, mesh: Mesh, *, attention: str) -> PassInputs:
    """Return the tensors of `batch` on the device of `mesh`.

    `attention` is the key of `precision.ATTENTION` that the language layers use.
    """
    on = lambda array: upload(array, mesh.device)  # noqa: E731
    is_pad = np.isin(batch.token_ids, (arch.video_token, arch.image_token))
    vision_index = (np.cumsum(is_pad) - 1)[batch.rows]  # of each row, valid at pads
    pad_rows = np.flatnonzero(is_pad[batch.rows])
    encodes = len(batch.visual_embeds) < len(batch.visuals)
    grids = [visual.grid_thw for visual in batch.visuals]
    return PassInputs(
        batch=batch,
        token_ids=on(batch.token_ids[batch.rows][None]),
        positions=on(batch.positions[:, None, batch.rows]),
        plan=attention_plan(batch, arch, mesh, attention),
        vision_rows=on(pad_rows),
        vision_index=on(vision_index[pad_rows]),
        vision=vision_inputs(grids, arch.vision, mesh.device, mesh.vision) if encodes else None,
        source=on(batch.source),
        target=on(batch.target),
        advantage=on(batch.advantage),
        engine_logprob=on(batch.engine_logprob),
        sequence=on(batch.sequence),
        weight=on(batch.weight),
    )


def attention_plan(batch: MicroBatch, arch: Architecture, mesh: Mesh, attention: str) -> object:
    """Return the plan that the backend `attention` executes."""
    if attention == "flash":
        return cascade_plan(batch, mesh.device, arch.kv_heads // mesh.tensor.size)
    return (language_plan if attention == "sdpa" else varlen_plan)(batch, mesh.device)


def vision_inputs(
    grids: Sequence[Grid],
    arch: VisionArchitecture,
    device: torch.device,
    sharing: Axis | None = None,
) -> VisionInputs:
    """Return the tower's inputs for the temporal steps of this rank; all without `sharing`."""
    steps = [(h, w) for t, h, w in grids for _ in range(t)]
    sizes = [h * w for h, w in steps]
    bounds = shard_steps(sizes, sharing.size if sharing else 1)
    first, last = bounds[sharing.rank if sharing else 0]
    begin, mine = sum(sizes[:first]), steps[first:last]
    return VisionInputs(
        patches=slice(begin, begin + sum(sizes[first:last])),
        counts=[sum(sizes[a:b]) // arch.merge**2 for a, b in bounds],
        angles=upload(rotary_angles(mine, arch), device),
        plans=vision_plans(mine, arch, device) if mine else {},
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
