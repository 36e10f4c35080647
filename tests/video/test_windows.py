"""Windows and fixed frame counts: Qwen's arithmetic for constant rates, else timestamps."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vrl.config import Video
from megatron_vrl.errors import VideoError
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.types import VideoClip
from megatron_vrl.video import VideoReader
from megatron_vrl.video.encode import Encoder
from megatron_vrl.video.probe import VideoFile
from megatron_vrl.video.rules import frame_count, plan_frames
from tests.video.conftest import MakeClip, errors_of, videos_of


def file_of(timestamps_s: np.ndarray, fps: float) -> VideoFile:
    return VideoFile(
        path="clip.mp4",
        codec="h264",
        stream=0,
        height=112,
        width=112,
        quarter_turns=0,
        pixel_format="yuv420p",
        matrix=2,
        colour_range=0,
        native_fps=fps,
        duration_s=float(timestamps_s[-1]) + 1 / fps,
        timestamps_s=timestamps_s,
        pts=np.arange(len(timestamps_s)),
        keyframes=np.zeros(1, np.int64),
        has_pts=True,
        has_hidden_packets=False,
        has_other_pictures=False,
        format_changes=False,
        late_s=0.0,
    )


@given(
    num_frames=st.integers(2, 2000),
    fps=st.sampled_from([10.0, 25.0, 30.0, 30000 / 1001]),
    start=st.floats(0, 1),
    end=st.floats(0, 1),
)
def test_a_window_of_a_constant_rate_is_qwens(
    num_frames: int, fps: float, start: float, end: float
) -> None:
    """Equals `calculate_video_frame_range` of qwen-vl-utils to within 1 ms."""
    start, end = sorted((start * num_frames, end * num_frames))
    start_s, end_s = round(start) / fps + 2e-3, round(end) / fps - 2e-3
    first, last = math.ceil(start_s * fps), min(math.floor(end_s * fps), num_frames - 1)
    file = file_of(np.arange(num_frames) / fps, fps)
    if first > last:
        with pytest.raises(VideoError, match="has no frame from"):
            file.within((start_s, end_s))
    else:
        assert file.within((start_s, end_s)) == (first, last - first + 1, fps)


def test_a_window_of_a_variable_rate_goes_by_time() -> None:
    times = np.array([0, 0.1, 0.2, 0.3, 1.3, 2.3, 3.3])
    first, count, fps = file_of(times, 7 / 4.3).within((0.25, 2.5))
    assert (first, count) == (3, 3)
    assert fps == pytest.approx(1.0)


@pytest.mark.parametrize(("asked", "frames", "sampled"), [(16, 90, 16), (5, 90, 4), (7, 90, 8)])
def test_a_fixed_count_is_rounded_as_in_qwen(asked: int, frames: int, sampled: int) -> None:
    assert frame_count(frames, 30.0, Video(num_frames=asked)) == round(asked / 2) * 2 == sampled


def test_a_fixed_count_is_limited_by_the_number_of_frames() -> None:
    assert frame_count(9, 30.0, Video(num_frames=16)) == 8
    assert frame_count(1, 30.0, Video(num_frames=16)) == 1


def test_windows_are_decoded_and_stored_separately(make_clip: MakeClip) -> None:
    path = make_clip("clip.mp4", num_frames=64, fps=16)
    rule: dict[str, Any] = {"min_pixels": 784, "num_frames": 8}
    reader = VideoReader(Video(decoder="pyav", **rule), PIXELS)
    part, whole = VideoClip(path, (1.0, 2.0)), VideoClip(path)
    video, all_of_it = videos_of(reader.encode([part, whole]))
    assert reader.counts["decoded"] == 2
    assert video.frame_indices.tolist() == [16, 18, 21, 23, 25, 27, 30, 32]
    assert video.timestamps_s[[0, -1]].tolist() == [1.0, 2.0]
    assert video.duration_s == 1.0 and all_of_it.duration_s == 4.0
    assert video.sampled_fps == pytest.approx(8 / 17 * 16)
    dali = Encoder(Video(decoder="dali", **rule), PIXELS)
    (same,) = videos_of(dali.encode([part], [video.digest]))
    np.testing.assert_array_equal(same.frames, video.frames)
    again = reader.encode([part])[0]
    assert again is video and reader.counts["store"] == 1


def test_a_window_outside_the_file(make_clip: MakeClip) -> None:
    path = make_clip("clip.mp4", num_frames=16, fps=16)
    reader = VideoReader(Video(decoder="pyav"), PIXELS)
    (error,) = errors_of(reader.encode([VideoClip(path, (5.0, 6.0))]))
    assert str(error) == (
        f"{path} has no frame from 5.00 to 6.00 s, it is 1.00 s long; correct the window."
    )
    assert error.kind == "window"


@pytest.mark.parametrize("rule", [{}, {"num_frames": 6}, {"fps": 5.0, "max_pixels": 120_000}])
@pytest.mark.parametrize("window_s", [None, (0.5, 2.2)])
def test_tokens_are_known_before_decoding(
    make_clip: MakeClip, rule: dict[str, Any], window_s: tuple[float, float] | None
) -> None:
    path = make_clip("clip.mp4", size=(240, 320), turned=90)
    encoder = Encoder(Video(decoder="pyav", **rule), PIXELS)
    clip = VideoClip(path, window_s)
    plan = encoder.plan(clip).plan
    (video,) = videos_of(encoder.encode([clip], ["digest"]))
    assert plan.num_tokens == math.prod(video.grid_thw) // 4
    assert plan.frame_budget == video.frame_budget >= plan.height * plan.width


def test_first_frame_shifts_a_plan() -> None:
    cfg = Video(num_frames=4)
    plan, whole = (plan_frames(40, 10.0, 112, 112, cfg, PIXELS, first=first) for first in (100, 0))
    assert plan.indices.tolist() == (whole.indices + 100).tolist()
    np.testing.assert_array_equal(replace(plan, indices=whole.indices).indices, whole.indices)
