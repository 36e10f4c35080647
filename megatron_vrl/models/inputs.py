"""Tensors that the passes over one micro-batch read, built on the host and sent before the passes.

A copy from pageable memory waits for all queued work of a GPU. Therefore every index tensor of a
step is made here, pinned, and sent before the first pass. Left out: frames and cached vision
embeddings, which are large; each pass sends its own, pinned.

Shape letters: L packed rows of this rank, N loss tokens.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megatron_vrl.batching.pack import MicroBatch
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.attention_plans import language_plan, varlen_plan
from megatron_vrl.models.cascade_plans import cascade_plan
from megatron_vrl.models.vision_inputs import MakeVisionInputs, VisionInputs
from megatron_vrl.parallel.arrays import upload
from megatron_vrl.parallel.mesh import Mesh


@dataclass(frozen=True, slots=True, kw_only=True)
class PassInputs:
    """Micro-batch with its tensors on the device."""

    batch: MicroBatch
    token_ids: Tensor  # [1, L]
    positions: Tensor  # [3, 1, L]
    plan: object  # of the type that the core attention executes
    vision_rows: Tensor  # rows of this rank that vision embeddings replace
    vision_index: Tensor  # their indices in the embeddings of the micro-batch
    deepstack_rows: Tensor  # rows of this rank's hidden states that get DeepStack features
    deepstack_index: Tensor  # their indices in the embeddings of the micro-batch
    vision: VisionInputs | None  # None: no visual needs the tower
    source: Tensor  # [N] index in L
    target: Tensor  # [N]
    advantage: Tensor  # [N]
    engine_logprob: Tensor  # [N]
    sequence: Tensor  # [N]
    weight: Tensor  # [N]


def pass_inputs(
    batch: MicroBatch,
    arch: Architecture,
    mesh: Mesh,
    vision_inputs: MakeVisionInputs,
    *,
    attention: str,
    sequence: bool,
) -> PassInputs:
    """Return the tensors of `batch` on the device of `mesh`.

    `vision_inputs` is the family's (`ModelParts`). `attention` is the key of `precision.ATTENTION`
    that the language layers use. `sequence` means that sequence parallelism splits the hidden
    states over the tensor ranks.
    """
    on = lambda array: upload(array, mesh.device)  # noqa: E731
    is_pad = np.isin(batch.token_ids, (arch.video_token, arch.image_token))
    vision_index = (np.cumsum(is_pad) - 1)[batch.rows]  # of each row, valid at pads
    pad_rows = np.flatnonzero(is_pad[batch.rows])
    hidden_rows = len(batch.rows) // mesh.tensor.size if sequence else len(batch.rows)
    first = mesh.tensor.rank * hidden_rows if sequence else 0
    own = pad_rows[(pad_rows >= first) & (pad_rows < first + hidden_rows)]
    own = own if arch.vision.deepstack_layers else own[:0]
    encodes = len(batch.visual_embeds) < len(batch.visuals)
    grids = [visual.grid_thw for visual in batch.visuals]
    return PassInputs(
        batch=batch,
        token_ids=on(batch.token_ids[batch.rows][None]),
        positions=on(batch.positions[:, None, batch.rows]),
        plan=attention_plan(batch, arch, mesh, attention),
        vision_rows=on(pad_rows),
        vision_index=on(vision_index[pad_rows]),
        deepstack_rows=on(own - first),
        deepstack_index=on(vision_index[own]),
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
