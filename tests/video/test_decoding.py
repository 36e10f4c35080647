"""VideoReader: both decoders give the same bytes, and bad files do not affect other files."""

from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import pytest
import torch

from megatron_vrl.config import Video
from megatron_vrl.errors import ConfigError, VideoError
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.types import EncodedVideo, VideoClip
from megatron_vrl.video import VideoReader
from megatron_vrl.video.encode import Encoder
from megatron_vrl.video.probe import probe
from megatron_vrl.video.pyav import decode_frames
from megatron_vrl.video.resize import resize
from megatron_vrl.video.routing import dali_reads
from megatron_vrl.video.rules import plan_frames
from tests.video.conftest import MakeClip, errors_of, videos_of

SMALL: dict[str, Any] = {"min_pixels": 28 * 28, "fps": 4.0}
CLIPS: dict[str, dict[str, Any]] = {
    "constant.mp4": {},
    "one_frame.mp4": {"num_frames": 1},
    "three_frames.mp4": {"num_frames": 3},
    "odd_size.mp4": {"size": (122, 154)},
    "odd_pixels.mp4": {"size": (111, 133), "pixels": "yuv444p"},
    "short_gop.mp4": {"num_frames": 120, "gop": 5},
    "keyframes_only.mp4": {"num_frames": 30, "gop": 1},
    "long_gop.mp4": {"num_frames": 120, "gop": 250},
    "open_gop.mp4": {
        "num_frames": 120,
        "codec_options": {"x264-params": "open-gop=1:keyint=20:min-keyint=20:bframes=3"},
    },
    "variable.mp4": {"num_frames": 40, "times_ms": [i * 40 + i * i * 3 for i in range(40)]},
    "variable.mkv": {"num_frames": 40, "times_ms": [i * 40 + i * i * 3 for i in range(40)]},
    "matroska.mkv": {"num_frames": 120, "gop": 12},
    "hevc.mp4": {"codec": "libx265", "codec_options": {"x265-params": "log-level=none"}},
    "vp9.webm": {"codec": "libvpx-vp9", "num_frames": 30},
    "ten_bits.mp4": {"pixels": "yuv420p10le"},
    "full_range.mp4": {"pixels": "yuvj420p"},
}


def encoders(**keys: Any) -> tuple[Encoder, Encoder]:
    """Return both decoders, in this process."""
    return Encoder(Video(decoder="dali", **keys), PIXELS), Encoder(
        Video(decoder="pyav", **keys), PIXELS
    )


def fallbacks(dali: Encoder) -> int:
    """Return how many files the DALI decoder gave to PyAV."""
    from megatron_vrl.video.dali import DaliDecoder

    assert isinstance(dali.decoder, DaliDecoder)
    return dali.decoder.num_fallbacks


def encode(encoder: Encoder, paths: list[str]) -> list[EncodedVideo | VideoError]:
    clip = [VideoClip(path) for path in paths]
    return encoder.encode(clip, [encoder.identify(f, None).digest for f in clip])


def assert_same(one: EncodedVideo | VideoError, other: EncodedVideo | VideoError) -> None:
    assert isinstance(one, EncodedVideo), one
    assert isinstance(other, EncodedVideo), other
    np.testing.assert_array_equal(one.frames, other.frames)
    np.testing.assert_array_equal(one.timestamps_s, other.timestamps_s)
    np.testing.assert_array_equal(one.frame_indices, other.frame_indices)
    assert (one.digest, one.grid_thw, one.codec) == (other.digest, other.grid_thw, other.codec)


def test_decoders_are_equal(make_clip: MakeClip) -> None:
    paths = [make_clip(name, **options) for name, options in CLIPS.items()]
    dali, pyav = encoders(**SMALL)
    for one, other in zip(videos_of(encode(dali, paths)), encode(pyav, paths), strict=True):
        assert_same(one, other)
        assert one.frames.shape == (2 * one.grid_thw[0], *(14 * g for g in one.grid_thw[1:]), 3)
        assert len(one.timestamps_s) == len(one.frames)
    assert fallbacks(dali) == 0


def test_decoders_are_equal_on_real_clips(real_clips: list[str]) -> None:
    dali, pyav = encoders()
    for one, other in zip(encode(dali, real_clips), encode(pyav, real_clips), strict=True):
        assert_same(one, other)
    own = [path for path in real_clips if dali_reads(probe(path), "cpu")]
    assert fallbacks(dali) == len(real_clips) - len(own) > 0


@pytest.mark.parametrize("name", CLIPS)
def test_seeking_gives_the_frames_of_a_sequential_read(make_clip: MakeClip, name: str) -> None:
    file = probe(make_clip(name, **CLIPS[name]))
    plan = plan_frames(
        file.num_frames, file.native_fps, file.height, file.width, Video(min_pixels=28 * 28), PIXELS
    )
    np.testing.assert_array_equal(decode_frames(file, plan), decode_frames(file, plan, seek=False))


def test_frames_have_the_requested_indices(make_clip: MakeClip) -> None:
    """Compare with all frames in FFmpeg's order and default colours."""
    path = make_clip("clip.mp4", num_frames=50, gop=10)
    (video,) = videos_of(encode(Encoder(Video(decoder="pyav", **SMALL), PIXELS), [path]))
    with av.open(path) as container:
        shown = list(container.decode(video=0))
    assert len(shown) == 50
    np.testing.assert_allclose(video.timestamps_s, [shown[i].time for i in video.frame_indices])
    candidates = np.stack([frame.to_ndarray(format="rgb24") for frame in shown]).astype(int)
    for index, pixels in zip(video.frame_indices, video.frames, strict=True):
        assert np.abs(candidates - pixels).mean(axis=(1, 2, 3)).argmin() == index


def test_time_axis_of_a_variable_rate(make_clip: MakeClip) -> None:
    times_ms = CLIPS["variable.mp4"]["times_ms"]
    path = make_clip("clip.mkv", **CLIPS["variable.mkv"])
    (video,) = videos_of(encode(Encoder(Video(decoder="pyav", fps=1.0), PIXELS), [path]))
    want = [times_ms[i] / 1000 for i in video.frame_indices]
    np.testing.assert_allclose(video.timestamps_s, want, atol=2e-3)
    assert video.sampled_fps == pytest.approx(len(want) / video.duration_s)
    assert video.seconds_per_grid == pytest.approx(2 / video.sampled_fps)


@pytest.mark.parametrize(("height", "width"), [(56, 84), (300, 420), (112, 140)])
def test_resize_is_torchs_bicubic_on_bytes(height: int, width: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 112, 140, 3), dtype=np.uint8)
    want = torch.nn.functional.interpolate(
        torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(),
        (height, width),
        mode="bicubic",
        antialias=True,
    )
    np.testing.assert_array_equal(resize(frames, height, width), want.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("decoder", ["dali", "pyav"])
def test_bad_files_do_not_affect_other_files(
    make_clip: MakeClip, sound_only: str, tmp_path: Path, decoder: Literal["dali", "pyav"]
) -> None:
    good = make_clip("good.mp4")
    whole = Path(make_clip("whole.mp4", num_frames=300, faststart=True)).read_bytes()
    matroska = Path(make_clip("whole.mkv", num_frames=300)).read_bytes()
    no_moov = Path(make_clip("plain.mp4", num_frames=300)).read_bytes()
    contents = {
        "empty.mp4": b"",
        "garbage.mp4": np.random.default_rng(0).bytes(5000),
        "truncated.mp4": whole[: len(whole) * 2 // 3],
        "truncated.mkv": matroska[: len(matroska) * 2 // 3],
        "no_moov.mp4": no_moov[: len(no_moov) * 2 // 3],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.mp4").mkdir()
    reasons = {
        "missing.mp4": "cannot be read (No such file",
        "folder.mp4": "is not a file",
        "empty.mp4": "is empty",
        "garbage.mp4": "cannot be opened as a video",
        "truncated.mp4": "is cut off after",
        "truncated.mkv": "is cut off after",
        "no_moov.mp4": "cannot be opened as a video",
        Path(sound_only).name: "has no video stream",
    }
    paths = [str(tmp_path / name) for name in reasons]
    reader = VideoReader(Video(decoder=decoder, **SMALL), PIXELS)
    first, *bad, last = reader.encode([good, *paths, good])
    assert_same(first, last)
    for path, reason, error in zip(paths, reasons.values(), bad, strict=True):
        assert isinstance(error, VideoError)
        assert str(error).startswith(f"{path} {reason}")
        assert "\n" not in str(error)
    failed = len(bad)
    assert reader.counts == {"decoded": 1, "failed": failed, "store": 0, "retried": failed}
    assert [error.kind for error in errors_of(bad)] == [
        *("missing", "unreadable", "empty", "unreadable"),
        *("cut_off", "cut_off", "unreadable", "no_pictures"),
    ]


def test_a_file_that_breaks_dalis_run_is_isolated(make_clip: MakeClip, tmp_path: Path) -> None:
    """Valid packets, frames that do not decode: DALI fails for the whole batch."""
    good = [make_clip(f"good{i}.mp4", num_frames=20 + i) for i in range(5)]
    broken = bytearray(Path(make_clip("broken.mp4", num_frames=300, size=(240, 320))).read_bytes())
    payload = slice(len(broken) // 4, len(broken) * 3 // 4)
    broken[payload] = np.random.default_rng(0).bytes(len(broken[payload]))
    (tmp_path / "broken.mp4").write_bytes(broken)
    paths = [*good[:3], str(tmp_path / "broken.mp4"), *good[3:]]
    dali, pyav = encoders(**SMALL)
    one, other = encode(dali, paths), encode(pyav, paths)
    error, again = one.pop(3), other.pop(3)
    assert isinstance(error, VideoError)
    assert str(error) == str(again)
    assert error.kind == "damaged"
    for mine, theirs in zip(one, other, strict=True):
        assert_same(mine, theirs)
    assert fallbacks(dali) == 1
    assert isinstance(encode(dali, [make_clip("next.mp4")])[0], EncodedVideo)


def test_more_videos_than_one_batch(make_clip: MakeClip) -> None:
    paths = [make_clip(f"{i}.mp4", num_frames=8 + i) for i in range(40)]
    dali, pyav = encoders(**SMALL)
    ours, theirs = videos_of(encode(dali, paths)), videos_of(encode(pyav, paths))
    for path, one, other in zip(paths, ours, theirs, strict=True):
        assert_same(one, other)
        assert one.path == other.path == path


def hide_frames(source: str, target: str) -> None:
    """Insert a VP8 frame that is decoded and never shown before every tenth frame."""
    with av.open(source) as shown, av.open(target, "w") as container:
        stream = container.add_stream_from_template(shown.streams.video[0])
        for count, packet in enumerate(shown.demux(video=0)):
            if not packet.size:
                continue
            if count % 10 == 5:
                content = bytes(packet)
                hidden = av.Packet(bytes([content[0] & ~0x10]) + content[1:])
                assert packet.pts is not None
                hidden.pts = hidden.dts = packet.pts - 1
                hidden.time_base, hidden.stream = packet.time_base, stream
                container.mux(hidden)
            packet.stream = stream
            container.mux(packet)


def cut_by_edit_list(source: str, target: str) -> None:
    """Start in the middle of a group of pictures.

    The frames before are in the file and not shown.
    """
    with av.open(source) as whole, av.open(target, "w") as container:
        stream = container.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                assert packet.pts is not None and packet.dts is not None
                assert packet.duration is not None
                packet.pts -= 10 * packet.duration
                packet.dts -= 10 * packet.duration
                packet.stream = stream
                container.mux(packet)


def test_files_dali_cannot_decode_go_to_pyav(make_clip: MakeClip, tmp_path: Path) -> None:
    hidden, cut = str(tmp_path / "hidden.webm"), str(tmp_path / "cut.mp4")
    hide_frames(make_clip("shown.webm", codec="libvpx", num_frames=60), hidden)
    cut_by_edit_list(make_clip("whole.mp4"), cut)
    paths = [make_clip("old.avi", codec="mpeg4"), hidden, cut]
    dali, pyav = encoders(**SMALL)
    for one, other in zip(encode(dali, paths), encode(pyav, paths), strict=True):
        assert_same(one, other)
    assert fallbacks(dali) == 2  # DALI reads the third: its parts have no edit list
    assert [probe(path).num_frames for path in paths] == [64, 60, 54]
    for path in paths:
        with av.open(path) as container:
            assert len(list(container.decode(video=0))) == probe(path).num_frames


def test_device_gpu_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r"video\.device=gpu needs video\.decoder=dali"):
        VideoReader(Video(decoder="pyav", device="gpu"), PIXELS)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            VideoReader(Video(decoder="dali", device="gpu"), PIXELS)


@pytest.mark.gpu
def test_gpu_frames_are_close_to_cpu_frames(make_clip: MakeClip) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    path = make_clip("clip.mp4", size=(240, 320))
    (one,) = videos_of(
        encode(Encoder(Video(decoder="dali", device="gpu", **SMALL), PIXELS), [path])
    )
    (other,) = videos_of(encode(Encoder(Video(decoder="pyav", **SMALL), PIXELS), [path]))
    assert np.abs(one.frames.astype(int) - other.frames).max() <= 4
