"""Video sampling rules: which frames, at what size, how many tokens.

Pure arithmetic: the token count of a video is known before a frame is decoded. The rules are those
of qwen-vl-utils 0.0.14 (`smart_nframes`, `smart_resize`, the pixel budget of `fetch_video`) and of
transformers' `Qwen2VLVideoProcessor` (frame indices). They are reimplemented because both packages
need a working torchvision.

Two cases that Qwen leaves undefined:

  - a video with fewer than two frames is sampled once, and that frame is repeated;
  - a very thin video keeps at least one merged patch per side.

`video.num_frames` is Qwen's `nframes`. A sample's window is the pair (`video_start`, `video_end`).
The frames of a window are chosen by timestamp (`probe.VideoFile.within`); for a constant frame rate
this equals Qwen's ceil(start * fps) to floor(end * fps). Qwen raises an error if a window has fewer
frames than requested. Here the window gives all its frames, rounded down to an even number.

Letters: F frames, T temporal steps (2 frames each), H, W pixels, h, w patches.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_vrl.config import Video
from megatron_vrl.errors import VideoError

TEMPORAL = 2  # frames per temporal step, in every family
CHANNELS = 3
MAX_ASPECT = 200
FRAME_MIN_TOKENS = 128  # VIDEO_MIN_TOKEN_NUM of qwen-vl-utils
FRAME_MAX_TOKENS = 768  # VIDEO_MAX_TOKEN_NUM
VIDEO_MAX_TOKENS = 115_200  # 0.9 x MODEL_SEQ_LEN


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelRules:
    """Sizes of a model family's patches, and constants of its processors.

    `mean` and `std` are of RGB values in [0, 1]. A checkpoint's image processor may have other
    limits of an image (`image.read_image_rules`).
    """

    patch: int  # pixels
    merge: int  # patches per side of one language token
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_min_pixels: int
    image_max_pixels: int

    @property
    def cell(self) -> int:
        """Return the pixels per side of one language token."""
        return self.patch * self.merge


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    """Frames to decode from one video, and their size for the model."""

    indices: NDArray[np.int64]  # [F] ascending; F is even, an odd count repeats the last frame
    sampled_fps: float  # frames sampled per second of video
    seconds_per_grid: float  # seconds between two temporal steps
    height: int  # pixels after resizing, a multiple of `PixelRules.cell`
    width: int
    grid_thw: tuple[int, int, int]  # temporal steps, height and width in patches
    frame_budget: int  # maximum pixels per frame
    num_tokens: int  # language tokens: one per merged patch


def plan_frames(
    num_frames: int,
    native_fps: float,
    height: int,
    width: int,
    cfg: Video,
    pixels: PixelRules,
    first: int = 0,
) -> SamplingPlan:
    """Return the plan for `num_frames` frames of the given size, from frame `first` of the file."""
    count = frame_count(num_frames, native_fps, cfg)
    indices = first + linspace_indices(num_frames, count)
    if count % TEMPORAL:
        indices = np.append(indices, indices[-1])
    sampled_fps = count / num_frames * native_fps
    budgets = pixel_budgets(cfg, pixels)
    budget = budgets.of_frame(count)
    resized = smart_resize(height, width, budgets.smallest, budget, pixels.cell)
    rows, columns = (side // pixels.patch for side in resized)
    steps = len(indices) // TEMPORAL
    return SamplingPlan(
        indices=indices,
        sampled_fps=sampled_fps,
        # Rounded to float32 as in vLLM and transformers, so that positions are equal.
        seconds_per_grid=float(np.float32(TEMPORAL / sampled_fps)),
        height=resized[0],
        width=resized[1],
        grid_thw=(steps, rows, columns),
        frame_budget=budget,
        num_tokens=steps * rows * columns // pixels.merge**2,
    )


def frame_count(num_frames: int, native_fps: float, cfg: Video) -> int:
    """Return the number of frames to sample: even, or 1 if the video has fewer than 2 frames."""
    if cfg.num_frames:
        asked = round(cfg.num_frames / TEMPORAL) * TEMPORAL
        return max(min(asked, num_frames // TEMPORAL * TEMPORAL), 1)
    fewest = math.ceil(cfg.min_frames / TEMPORAL) * TEMPORAL
    most = math.floor(min(cfg.max_frames, num_frames) / TEMPORAL) * TEMPORAL
    wanted = min(max(num_frames / native_fps * cfg.fps, fewest), most)
    return max(math.floor(wanted / TEMPORAL) * TEMPORAL, 1)


def linspace_indices(num_frames: int, count: int) -> NDArray[np.int64]:
    """Return [count] frame indices from first to last, bit-equal to `torch.linspace(...).round()`.

    Like torch's kernel, this computes in float32, from both ends towards the middle, with a fused
    multiply-add in the second half. A different order of operations would round some values that
    end in .5 to another frame.
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


class PixelBudgets(NamedTuple):
    """Limits of a frame's and a video's size, in pixels after resizing."""

    smallest: int  # of a frame
    largest: int  # of a frame
    total: int  # of a video: temporal steps x height x width

    def of_frame(self, count: int) -> int:
        """Return the maximum pixels per frame when `count` frames divide the video's budget."""
        per_frame = self.total / count * TEMPORAL
        return int(max(min(self.largest, per_frame), int(self.smallest * 1.05)))


def pixel_budgets(cfg: Video, pixels: PixelRules) -> PixelBudgets:
    """Return the budgets of section `video`; those it leaves out are Qwen's, in tokens."""
    token = pixels.cell**2
    return PixelBudgets(
        smallest=cfg.min_pixels or FRAME_MIN_TOKENS * token,
        largest=cfg.max_pixels or FRAME_MAX_TOKENS * token,
        total=cfg.total_pixels or VIDEO_MAX_TOKENS * token,
    )


def smart_resize(
    height: int, width: int, min_pixels: int, max_pixels: int, cell: int
) -> tuple[int, int]:
    """Return (height, width), multiples of `cell` near the aspect ratio, with min <= pixels <= max.

    `cell` is `PixelRules.cell`.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise VideoError(
            f"has frames of {width}x{height}, longer than {MAX_ASPECT}:1; crop the video.",
            "too_large",
        )
    rows = max(cell, round(height / cell) * cell)
    columns = max(cell, round(width / cell) * cell)
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(cell, math.floor(height / shrink / cell) * cell)
        columns = max(cell, math.floor(width / shrink / cell) * cell)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / cell) * cell
        columns = math.ceil(width * grow / cell) * cell
    return rows, columns
