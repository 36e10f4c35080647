"""Prompts whose video has its frames in another order, for rewards of temporal sensitivity.

Timestamps, positions and tokens stay; only the pictures move. The frames are permuted before pairs
of them become temporal steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.types import EncodedVideo, Interval, Prompt, Sample, Visual

RADIUS_S = 3.0  # around a boundary; TaRO's `time_radius`


def all_shuffled(prompt: Prompt, seed: Sequence[int]) -> Prompt:
    """Return the prompt with the frames of its videos in random order (Video-R1)."""
    rng = np.random.default_rng(seed)
    return _reordered(prompt, lambda video: rng.permutation(len(video.frames)))


def boundaries_shuffled(prompt: Prompt, sample: Sample, seed: Sequence[int]) -> Prompt:
    """Return the prompt with the frames near each true boundary in random order (TaRO)."""
    rng = np.random.default_rng(seed)
    begins_s = sample.window_s[0] if sample.window_s else 0.0
    return _reordered(
        prompt,
        lambda video: _near_boundaries(video.timestamps_s - begins_s, sample.intervals_s, rng),
    )


def _near_boundaries(
    times_s: NDArray[np.float64], intervals_s: Sequence[Interval], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return an order of the frames in which those near each start and end are shuffled."""
    order = np.arange(len(times_s))
    for boundary_s in (time_s for interval_s in intervals_s for time_s in interval_s):
        near = np.flatnonzero(np.abs(times_s - boundary_s) <= RADIUS_S)
        order[near] = order[rng.permutation(near)]
    return order


def _reordered(prompt: Prompt, order_of: Callable[[EncodedVideo], NDArray[np.int64]]) -> Prompt:
    """Return the prompt with the frames of each video in another order, without embeddings."""

    def reordered(visual: Visual) -> Visual:
        if not isinstance(visual, EncodedVideo):
            return visual
        order = order_of(visual)
        indices = visual.frame_indices[order]  # they identify the frames in caches
        return replace(visual, frames=visual.frames[order], frame_indices=indices)

    return replace(prompt, visuals=tuple(map(reordered, prompt.visuals)), visual_embeds=())
