"""Inputs of the vision tower for a pass, and outputs of a frozen tower kept while a step lasts.

The reference pass, the old log-probs and all updates of a step run over the same micro-batches.
A frozen tower runs once for each of them. Its output before the merger, which may be trained, stays
on the device, and every pass is equal to the bit to one that encodes again. Nothing outlives a
step: 2,000 vision tokens of 3B take 20 MB, and a video returns after thousands of others.
`policy/vision_cache.py` keeps embeddings over steps, for a frozen tower with a frozen merger.

An output that does not fit is not kept. There is no eviction: every pass reads the outputs in the
same order, so the least recently used one is always the next.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron_vrl.batching.pack import MicroBatch
from megatron_vrl.models.inputs import PassInputs
from megatron_vrl.models.patchify import patchify
from megatron_vrl.models.vision_tower import VisionTower
from megatron_vrl.video.rules import PixelRules

MIB = 1 << 20


class VisionOutputs:
    """Outputs of this rank's patches, by micro-batch. `own` is the policy's tower, if it is here.

    `frozen`: whether the tower is not trained.
    """

    def __init__(
        self, own: VisionTower | None, pixels: PixelRules, *, frozen: bool, memory_mib: int
    ) -> None:
        self.runs = 0  # of a frozen tower
        self._pixels = pixels
        self._own, self._frozen, self._limit = own, frozen, memory_mib * MIB
        self._used = 0  # bytes
        self._kept: dict[int, Tensor] = {}
        self._keeping = False
        self._compared: tuple[Any, bool] = (None, False)  # versions; whether weights are equal

    @contextmanager
    def kept(self, passes: int) -> Iterator[None]:
        """Keep outputs in this block of `passes` over the same micro-batches, if it has several.

        The outputs are dropped at the block's end. The caller holds the micro-batches until then.
        """
        self._keeping = self._frozen and passes > 1
        try:
            yield
        finally:
            self._keeping, self._used = False, 0
            self._kept.clear()

    def compare(self, tower: VisionTower | None) -> None:
        """Note whether `tower` has the weights of the policy's. Called before a pass of `tower`.

        A run may resume with a tower that was trained after the reference model was made. The
        comparison waits for the GPU; its result holds until a weight changes.
        """
        if not self._keeping or tower is None or tower is self._own:
            return
        assert self._own is not None
        one, other = self._own.before_merger(), tower.before_merger()
        versions = [(param.untyped_storage()._cdata, param._version) for param in one + other]
        if self._compared[0] != versions:
            self._compared = (versions, all(map(torch.equal, one, other)))

    def of(self, tower: VisionTower, inputs: PassInputs) -> tuple[Tensor | None, Tensor | None]:
        """Return the patches of a micro-batch, or the output [P, C] of a frozen tower.

        Both are None if no visual needs the tower.
        """
        if inputs.vision is None or not inputs.batch.visuals:
            return None, None
        if not self._frozen:
            return self._patches(inputs.batch, tower), None
        key = id(inputs.batch)
        if key in self._kept and self._equals_own(tower):
            return None, self._kept[key]
        self.runs += 1
        output = tower.encode(self._patches(inputs.batch, tower), inputs.vision)
        size = output.numel() * output.element_size()
        if self._keeping and self._used + size <= self._limit and self._equals_own(tower):
            self._kept[key] = output
            self._used += size
        return None, output

    def _equals_own(self, tower: VisionTower) -> bool:
        """Return whether `tower` has the weights of the policy's, as `compare` found."""
        return tower is self._own or self._compared[1]

    def _patches(self, batch: MicroBatch, tower: VisionTower) -> Tensor:
        """Return the pixel patches of a micro-batch in the tower's dtype."""
        device = tower.patch_embed.weight.device
        patches = [patchify(visual.frames, self._pixels, device) for visual in batch.visuals]
        return torch.cat(patches).to(tower.config.params_dtype)
