"""LRU cache of a frozen vision tower's embeddings, shared by rollout, reference and update.

The embeddings lie in host memory, at most `memory_mib` of them. Each entry belongs to a weight
epoch: the cache is emptied when the version counter of a tower parameter changes. A write through
`.data` does not change that counter and is not noticed.

Only the first pipeline stage has the vision tower, so it also embeds the prompts of the other
stages. SFT does not use the cache and runs the tower at every step.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray

from megatron_vrl.models.families import family_of
from megatron_vrl.models.patchify import patchify
from megatron_vrl.parallel.arrays import as_array
from megatron_vrl.parallel.mesh import Mesh, gather_objects
from megatron_vrl.policy.policy import Policy
from megatron_vrl.types import EncodedVideo, Prompt, Visual

MIB = 1 << 20
Key = tuple[Any, ...]


def embed_across_ranks(
    cache: "VisionEmbeddingCache | None", mesh: Mesh, prompts: Sequence[Prompt]
) -> list[Prompt]:
    """Return this rank's prompts with their vision embeddings.

    `cache` is the cache of the first pipeline stage and None elsewhere. All stages call it
    together, each with its own prompts.
    """
    if mesh.pipeline.size == 1:
        assert cache is not None
        return cache.embed(prompts)
    by_stage = gather_objects(mesh.pipeline, list(prompts))
    seen = (
        [[p.visual_embeds for p in cache.embed(of_stage)] for of_stage in by_stage] if cache else []
    )
    own_seen = gather_objects(mesh.pipeline, seen)[0][mesh.pipeline.rank]
    return [replace(p, visual_embeds=tokens) for p, tokens in zip(prompts, own_seen, strict=True)]


class VisionEmbeddingCache:
    """Cache of one process of the first pipeline stage. Ranks need not call it together."""

    def __init__(self, policy: Policy, memory_mib: int) -> None:
        assert policy.chunks[0].vision is not None, "not the first pipeline stage"
        self.epoch = 0  # of the tower's weights
        self.encoded = 0  # forward passes of the tower
        self._tower = policy.chunks[0].vision
        self._device = policy.mesh.device
        self._pixels = family_of(policy.arch).pixels
        self._limit, self._used = memory_mib * MIB, 0  # bytes
        self._kept: OrderedDict[Key, NDArray[Any]] = OrderedDict()  # least recently used first
        self._written = self._tower.parameter_versions()

    def embed(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts with the vision embeddings of their visuals."""
        if (written := self._tower.parameter_versions()) != self._written:
            self._written, self.epoch = written, self.epoch + 1
            self._kept.clear()
            self._used = 0
        return [replace(p, visual_embeds=tuple(map(self._tokens, p.visuals))) for p in prompts]

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
        patches = patchify(visual.frames, self._pixels, self._device).to(
            self._tower.config.params_dtype
        )
        return as_array(self._tower.encode_local(patches, [visual.grid_thw]))  # [tokens, hidden]


def _key(visual: Visual) -> Key:
    """Return the cache key of a visual: file digest, grid and frame indices, not the pixels."""
    frames = visual.frame_indices.tobytes() if isinstance(visual, EncodedVideo) else b""
    return visual.digest, visual.grid_thw, frames
