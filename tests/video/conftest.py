"""Fixtures: generated clips, and real clips if the machine has them."""

import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from megatron_vrl.errors import VideoError
from megatron_vrl.types import EncodedVideo

REPOSITORY = Path(__file__).resolve().parents[2]
REAL_CLIPS = Path(os.environ.get("MVRL_REAL_CLIPS", REPOSITORY.parent / "shared" / "videos"))

MakeClip = Callable[..., str]


@pytest.fixture(scope="session")
def real_clips() -> list[str]:
    clips = sorted(str(path) for path in REAL_CLIPS.glob("*.m[pk][4v]"))
    if not clips:
        pytest.skip(f"no real clips in {REAL_CLIPS}; set MVRL_REAL_CLIPS")
    return clips


@pytest.fixture
def make_clip(tmp_path: Path) -> MakeClip:
    def make(name: str, **options: Any) -> str:
        path = str(tmp_path / name)
        write_clip(path, **options)
        return path

    return make


def videos_of(found: Sequence[EncodedVideo | VideoError]) -> list[EncodedVideo]:
    """Return the videos that a reader gave. None of them may be an error."""
    for video in found:
        assert isinstance(video, EncodedVideo), video
    return [video for video in found if isinstance(video, EncodedVideo)]


def errors_of(found: Sequence[EncodedVideo | VideoError]) -> list[VideoError]:
    """Return the errors that a reader gave. None of them may be a video."""
    assert not any(isinstance(error, EncodedVideo) for error in found)
    return [error for error in found if isinstance(error, VideoError)]


def write_clip(
    path: str,
    num_frames: int = 64,
    fps: int = 16,
    size: tuple[int, int] = (112, 112),
    codec: str = "libx264",
    gop: int = 30,
    pixels: str = "yuv420p",
    times_ms: list[int] | None = None,
    codec_options: dict[str, str] | None = None,
    faststart: bool = False,
    turned: int = 0,
    colours: tuple[int, int] | None = None,
) -> None:
    """Write a clip of a smooth, coloured, moving picture. All frames differ."""
    height, width = size
    rng = np.random.default_rng(num_frames)
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    smooth = av.VideoFrame.from_ndarray(coarse, format="rgb24").reformat(width, height, "rgb24")
    picture = smooth.to_ndarray().astype(np.uint8)
    muxer_options = {"movflags": "faststart"} if faststart else {}
    with av.open(path, "w", options=muxer_options) as container:
        stream = container.add_stream(codec, rate=fps)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        # With mbtree, x264's output depends on memory that it did not write.
        equal = {"x264-params": "mbtree=0"} if codec == "libx264" else {}
        stream.gop_size, stream.options = gop, {**equal, **(codec_options or {})}
        if turned:
            stream.set_display_rotation(turned)
        if colours:
            stream.codec_context.colorspace, stream.codec_context.color_range = colours
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(num_frames):
            shifted = np.roll(picture, 3 * index, axis=1)
            frame = av.VideoFrame.from_ndarray(shifted, format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def sound_only(tmp_path: Path) -> str:
    """Write one second of audio without video."""
    path = str(tmp_path / "sound.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=16000)
        assert isinstance(stream, av.AudioStream)
        for start in range(0, 16000, 1000):
            samples = np.zeros((1, 1000), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
