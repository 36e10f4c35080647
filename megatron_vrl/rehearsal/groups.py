"""Groups of the planned sizes, with black frames, for a rehearsal."""

import numpy as np

from megatron_vrl.batching.pack import Answer, Group
from megatron_vrl.models.architecture import Architecture
from megatron_vrl.models.families import family_of
from megatron_vrl.planner.workload import Grid, GroupSizes
from megatron_vrl.types import EncodedVideo, Prompt


def planned_group(arch: Architecture, sizes: GroupSizes) -> Group:
    """Return a group of `sizes`: a video and text in the prompt, answers of equal length."""
    answer = Answer(
        token_ids=np.ones(sizes.response, np.int64),
        advantage=1.0,
        engine_logprobs=np.zeros(sizes.response, np.float32),
    )
    videos = () if sizes.grid is None else (_video(arch, sizes.grid),)
    pads = np.full(sizes.vision_tokens, arch.video_token)
    text = sizes.prompt - len(pads)
    token_ids = np.concatenate(
        [np.ones(text // 2, np.int64), pads, np.ones(-(-text // 2), np.int64)]
    )
    if videos:
        token_ids[text // 2 - 1] = arch.vision_start_token
    positions = family_of(arch).prompt.positions(token_ids, videos, arch)
    prompt = Prompt(
        id="planned", visuals=videos, token_ids=token_ids, engine_token_ids=(), positions=positions
    )
    return Group(prompt=prompt, answers=(answer,) * sizes.answers)


def _video(arch: Architecture, grid: Grid) -> EncodedVideo:
    steps, rows, columns = grid
    count = arch.vision.temporal_patch * steps
    height, width = rows * arch.vision.patch, columns * arch.vision.patch
    return EncodedVideo(
        path="black.mp4",
        digest="0" * 32,
        codec="h264",
        duration_s=float(steps),
        frame_indices=np.arange(count),
        timestamps_s=np.arange(count) / arch.vision.temporal_patch,
        sampled_fps=2.0,
        seconds_per_grid=1.0,
        grid_thw=grid,
        frame_budget=height * width,
        frames=np.zeros((count, height, width, arch.vision.channels), np.uint8),
    )
