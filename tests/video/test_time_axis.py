"""time_problems reports clips whose frame times differ from annotated times or model positions."""

from pathlib import Path
from typing import Any

import pytest

from megatron_vrl.config import Video
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.types import VideoClip
from megatron_vrl.video.encode import Encoder
from megatron_vrl.video.time_axis import time_problems
from tests.video.conftest import MakeClip
from tests.video.oddities import mux, packets

RULE: dict[str, Any] = {"decoder": "pyav", "fps": 2.0, "min_pixels": 784}


def problems_of(path: str, window_s: tuple[float, float] | None = None, **rule: Any) -> list[str]:
    return list(
        time_problems(Encoder(Video(**RULE | rule), PIXELS).plan(VideoClip(path, window_s)))
    )


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.ts"])
@pytest.mark.parametrize(("late_s", "is_reported"), [(0.0, False), (0.5, False), (2.0, True)])
def test_pictures_that_start_after_the_sound(
    tmp_path: Path, name: str, late_s: float, is_reported: bool
) -> None:
    path = str(tmp_path / name)
    mux(path, ["audio", list(packets("libx264"))], seconds=late_s)
    sentences = problems_of(path)
    assert len(sentences) == is_reported
    if is_reported:
        assert "its first picture is shown 2." in sentences[0]


@pytest.mark.parametrize(
    ("name", "is_reported"), [("a.mp4", True), ("a.mkv", True), ("a.ts", False)]
)
def test_a_clock_that_starts_late_without_sound(
    tmp_path: Path, name: str, is_reported: bool
) -> None:
    """MP4 and Matroska clocks start at 0. A transport stream's clock starts at any time."""
    path = str(tmp_path / name)
    mux(path, [list(packets("libx264"))], seconds=30.0)
    assert len(problems_of(path)) == is_reported


def test_a_rate_that_varies(make_clip: MakeClip) -> None:
    slow_then_fast = [1000 * i for i in range(16)] + [16000 + 33 * i for i in range(60)]
    (sentence,) = problems_of(make_clip("slides.mkv", num_frames=76, times_ms=slow_then_fast))
    assert sentence.startswith("its frame rate varies: sampled frames are up to ")
    jitter = [100 * i + (i % 3) * 20 for i in range(64)]
    assert problems_of(make_clip("jitter.mkv", num_frames=64, times_ms=jitter)) == []


@pytest.mark.parametrize("num_frames", [1, 2, 5, 17, 64, 300])
@pytest.mark.parametrize("fps", [8, 25, 30])
@pytest.mark.parametrize("window_s", [None, (0.1, 1.5)])
def test_a_constant_rate_is_never_reported(
    make_clip: MakeClip, num_frames: int, fps: int, window_s: tuple[float, float] | None
) -> None:
    path = make_clip("clip.mp4", num_frames=num_frames, fps=fps, size=(32, 32))
    if window_s and num_frames / fps < window_s[0] + 0.2:
        window_s = None
    for rule in ({}, {"fps": 1.0}, {"num_frames": 4}, {"max_frames": 8}):
        assert problems_of(path, window_s, **rule) == []
