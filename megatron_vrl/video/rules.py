"""Qwen2.5-VL's video rules: which frames, at what size, how many tokens.

Pure arithmetic, so the token count of a video is known before a frame of it is decoded. The rules
are those of qwen-vl-utils 0.0.14 (`smart_nframes`, `smart_resize`, the budget in `fetch_video`)
and of transformers' `Qwen2VLVideoProcessor` (the frame indices), restated because
both packages need a working torchvision. Two corners Qwen leaves open are closed here: a video
too short for two frames is sampled once and the frame repeated, and a very thin video keeps at
least one merged cell on each side.

Qwen's `nframes` is `video.num_frames`; `video_start` and `video_end` are a sample's window, whose
frames are counted by their times (`probe.VideoFile.within`), which for a constant rate is Qwen's
ceil(start * fps) to floor(end * fps). More frames than the window has are not refused as in Qwen:
it then gives all of its frames but an odd last one.
Letters: F frames, T temporal steps (2 frames), H, W pixels, h, w patches.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.config import Video
from megatron_vrl.errors import VideoError

PATCH = 14  # pixels
MERGE = 2  # patches on each side of one language token
TEMPORAL = 2  # frames of one temporal step
CELL = PATCH * MERGE  # pixels on each side of one language token
CHANNELS = 3
MAX_ASPECT = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    """What will be decoded of one video, and how large it will be for the model."""

    indices: NDArray[np.int64]  # [F] rising; F is even, an odd count repeats the last frame
    sampled_fps: float  # frames sampled per second of video
    seconds_per_grid: float  # seconds between two temporal steps
    height: int  # pixels after resizing, a multiple of 28
    width: int
    grid_thw: tuple[int, int, int]  # temporal steps, height and width in patches
    frame_budget: int  # most pixels of one frame

    @property
    def num_tokens(self) -> int:
        """Language tokens of the video: one for each merged cell."""
        return math.prod(self.grid_thw) // MERGE**2


def plan_frames(
    num_frames: int, native_fps: float, height: int, width: int, cfg: Video, first: int = 0
) -> SamplingPlan:
    """The plan for `num_frames` frames of height x width pixels, from frame `first` of the file."""
    count = frame_count(num_frames, native_fps, cfg)
    indices = first + spread(num_frames, count)
    if count % TEMPORAL:
        indices = np.append(indices, indices[-1])
    sampled_fps = count / num_frames * native_fps
    budget = frame_budget(count, cfg)
    resized = smart_resize(height, width, cfg.min_pixels, budget)
    return SamplingPlan(
        indices=indices,
        sampled_fps=sampled_fps,
        # As float32, which is how vLLM and transformers keep it: a position must not depend on it.
        seconds_per_grid=float(np.float32(TEMPORAL / sampled_fps)),
        height=resized[0],
        width=resized[1],
        grid_thw=(len(indices) // TEMPORAL, resized[0] // PATCH, resized[1] // PATCH),
        frame_budget=budget,
    )


def frame_count(num_frames: int, native_fps: float, cfg: Video) -> int:
    """How many frames are sampled: even, or 1 when two do not fit."""
    if cfg.num_frames:
        asked = round(cfg.num_frames / TEMPORAL) * TEMPORAL
        return max(min(asked, num_frames // TEMPORAL * TEMPORAL), 1)
    fewest = math.ceil(cfg.min_frames / TEMPORAL) * TEMPORAL
    most = math.floor(min(cfg.max_frames, num_frames) / TEMPORAL) * TEMPORAL
    wanted = min(max(num_frames / native_fps * cfg.fps, fewest), most)
    return max(math.floor(wanted / TEMPORAL) * TEMPORAL, 1)


def spread(num_frames: int, count: int) -> NDArray[np.int64]:
    """[count] indices from the first frame to the last, `torch.linspace(...).round()` bit by bit.

    In float32, from both ends towards the middle and with one rounding for each half (the fused
    multiply-add of torch's kernel), because values that end in .5 then fall as they do there.
    """
    if count == 1:
        return np.zeros(1, np.int64)
    last = np.float32(num_frames - 1)
    step = last / np.float32(count - 1)
    order = np.arange(count, dtype=np.float32)
    rising = step * order
    falling = (np.float64(last) - np.float64(step) * order[::-1]).astype(np.float32)
    values: NDArray[np.float32] = np.rint(np.where(order < count // 2, rising, falling))
    return values.astype(np.int64)


def frame_budget(count: int, cfg: Video) -> int:
    """Most pixels of one frame when `count` frames share the video's budget."""
    share = cfg.total_pixels / count * TEMPORAL
    return int(max(min(cfg.max_pixels, share), int(cfg.min_pixels * 1.05)))


def smart_resize(height: int, width: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in multiples of 28 near the same shape, with min <= pixels <= max."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise VideoError(
            f"has frames of {width}x{height}, longer than {MAX_ASPECT}:1; crop the video.",
            "too_large",
        )
    rows = max(CELL, round(height / CELL) * CELL)
    columns = max(CELL, round(width / CELL) * CELL)
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(CELL, math.floor(height / shrink / CELL) * CELL)
        columns = max(CELL, math.floor(width / shrink / CELL) * CELL)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / CELL) * CELL
        columns = math.ceil(width * grow / CELL) * CELL
    return rows, columns
