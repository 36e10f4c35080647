"""What a frozen vision tower makes of a video, computed once: for engine, reference and update.

Tokens are kept in host memory, dropped when they were used longest ago, and belong to a weight
epoch: the tower's parameters as they are until one of them is written to (torch counts that; a
write through `.data` it does not see). Of a new epoch nothing old is kept.

With pipeline stages the first one, which alone has the tower, looks for the others. Left out: the
warm-up, which shows the tower its pixels at every step.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray

from megatron_vrl.models.qwen2_5_vl.preprocess import patchify
from megatron_vrl.parallel.arrays import as_array
from megatron_vrl.parallel.mesh import Mesh, gather_objects
from megatron_vrl.policy.policy import Policy
from megatron_vrl.types import EncodedVideo, Prompt, Visual

MIB = 1 << 20
Key = tuple[Any, ...]


def embed_across_ranks(
    eyes: "VisionEmbeddingCache | None", mesh: Mesh, prompts: Sequence[Prompt]
) -> list[Prompt]:
    """Call `VisionEmbeddingCache.look` for each pipeline stage's own prompts.

    `eyes` is the cache of the first stage and None elsewhere. All stages call it together.
    """
    if mesh.pipeline.size == 1:
        assert eyes is not None
        return eyes.look(prompts)
    of_stages = gather_objects(mesh.pipeline, list(prompts))
    seen = [[p.seen for p in eyes.look(own)] for own in of_stages] if eyes else []
    own_seen = gather_objects(mesh.pipeline, seen)[0][mesh.pipeline.rank]
    return [replace(p, seen=tokens) for p, tokens in zip(prompts, own_seen, strict=True)]


class VisionEmbeddingCache:
    """One for each process of the first pipeline stage; ranks need not call it together."""

    def __init__(self, policy: Policy, memory_mib: int) -> None:
        assert policy.chunks[0].vision is not None, "not the first pipeline stage"
        self.epoch = 0  # of the tower's weights
        self.encoded = 0  # videos shown to the tower
        self._tower = policy.chunks[0].vision
        self._device = policy.mesh.device
        self._limit, self._used = memory_mib * MIB, 0
        self._kept: OrderedDict[Key, NDArray[Any]] = OrderedDict()  # longest unused first
        self._written = self._tower.parameter_versions()

    def look(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts with the vision tokens of their videos."""
        if (written := self._tower.parameter_versions()) != self._written:
            self._written, self.epoch = written, self.epoch + 1
            self._kept.clear()
            self._used = 0
        return [replace(p, seen=tuple(map(self._tokens, p.visuals))) for p in prompts]

    def _tokens(self, visual: Visual) -> NDArray[Any]:
        key = _key(visual)
        if key not in self._kept:
            self._kept[key] = self._encode(visual)
            self._used += self._kept[key].nbytes
        self._kept.move_to_end(key)
        tokens = self._kept[key]
        while self._used > self._limit:
            _, dropped = self._kept.popitem(last=False)
            self._used -= dropped.nbytes
        return tokens

    @torch.no_grad()
    def _encode(self, visual: Visual) -> NDArray[Any]:
        self.encoded += 1
        patches = patchify(visual.frames, self._device).to(self._tower.config.params_dtype)
        return as_array(self._tower.encode_local(patches, [visual.grid_thw]))  # [tokens, hidden]


def _key(visual: Visual) -> Key:
    """The frames without reading them: file, which of its frames, and their size."""
    frames = visual.frame_indices.tobytes() if isinstance(visual, EncodedVideo) else b""
    return visual.digest, visual.grid_thw, frames
