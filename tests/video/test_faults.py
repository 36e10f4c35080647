"""Bad files that must be crafted, and videos behind URLs."""

import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pytest

from megatron_vrl.config import Video
from megatron_vrl.errors import ConfigError, VideoError
from megatron_vrl.models.qwen2_5_vl.pixels import PIXELS
from megatron_vrl.types import EncodedVideo, VideoClip
from megatron_vrl.video import VideoReader
from megatron_vrl.video.encode import Encoder
from megatron_vrl.video.fetch import LocalCopies
from megatron_vrl.video.probe import probe
from tests.video.conftest import MakeClip, errors_of, videos_of

SMALL: dict[str, Any] = {"decoder": "pyav", "min_pixels": 28 * 28, "num_frames": 4}


def test_oversized_frames_are_rejected_before_decoding(tmp_path: Path) -> None:
    path = str(tmp_path / "wide.mkv")
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=1)
        stream.width, stream.height, stream.pix_fmt = 100_000, 16, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((16, 100_000, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match=r"has frames of 100000x16, wider or higher") as error:
        probe(path)
    assert error.value.kind == "too_large"


def test_no_duration(make_clip: MakeClip, tmp_path: Path) -> None:
    """All frames have one time: every sample delta of the mp4 is set to 0."""
    content = bytearray(
        Path(make_clip("clip.mp4", codec_options={"bf": "0"}, num_frames=8)).read_bytes()
    )
    at = content.index(b"stts") + 8
    (entries,) = struct.unpack_from(">I", content, at)
    for entry in range(entries):
        struct.pack_into(">I", content, at + 8 + 8 * entry, 0)
    path = tmp_path / "no_time.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError) as error:
        probe(str(path))
    assert error.value.kind in {"no_duration", "cut_off"}


def test_a_fifo_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (error,) = errors_of(VideoReader(Video(**SMALL), PIXELS).encode([str(tmp_path / "pipe.mp4")]))
    assert error.kind == "unreadable" and str(error).endswith("is not a file; check the path.")


@pytest.mark.parametrize("inside", [True, False])
def test_links_out_of_the_data_folder_are_rejected(
    make_clip: MakeClip, tmp_path: Path, inside: bool
) -> None:
    real = tmp_path / "real" / "videos"
    real.mkdir(parents=True)
    source = Path(make_clip("source.mp4", num_frames=8))
    target = real / "kept.mp4" if inside else source
    (real / "kept.mp4").write_bytes(source.read_bytes())
    (real / "clip.mp4").symlink_to(target)
    (tmp_path / "folder").symlink_to(real)  # the folder itself may be a link
    folder = str(tmp_path / "folder")
    (video,) = VideoReader(Video(**SMALL), PIXELS).encode(
        [VideoClip(f"{folder}/clip.mp4", folder=folder)]
    )
    if inside:
        assert isinstance(video, EncodedVideo)
    else:
        assert isinstance(video, VideoError) and video.kind == "outside"
        assert str(video).startswith(f"{folder}/clip.mp4 is a link out of the data folder {folder}")


def test_url_videos_are_copied_once_within_the_limit(make_clip: MakeClip, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    copies = tmp_path / "copies"
    for number in range(3):
        clip = Path(make_clip(f"{number}.mp4", num_frames=8 + number)).read_bytes()
        store.pipe_file(f"/bucket/{number}.mp4", clip + bytes(400_000))
    local = LocalCopies(str(copies), 1)
    first = local.path("memory://bucket/0.mp4")
    assert Path(first).read_bytes() == store.cat_file("/bucket/0.mp4")
    assert local.path("memory://bucket/0.mp4") == first
    os.utime(first, (1, 1))
    for number in (1, 2):
        local.path(f"memory://bucket/{number}.mp4")
    held = sum(path.stat().st_size for path in copies.iterdir())
    assert held <= 1 << 20 and not Path(first).exists()
    with pytest.raises(VideoError, match="does not exist; check the path") as error:
        local.path("memory://bucket/gone.mp4")
    assert error.value.kind == "missing"


def test_concurrent_copies_stay_within_the_limit(tmp_path: Path) -> None:
    store, copies = fsspec.filesystem("memory"), tmp_path / "copies"
    urls = [f"memory://at-once/{number}.mp4" for number in range(12)]
    for url in urls:
        store.pipe_file(url, bytes(300_000))
    with ThreadPoolExecutor(len(urls)) as threads:  # each with its own view of the directory
        list(threads.map(lambda url: LocalCopies(str(copies), 1).path(url), urls))
    held = list(copies.iterdir())
    assert 0 < len(held) <= 3  # of 300,000 bytes in 1 MiB
    store.pipe_file("memory://at-once/long.mp4", bytes(1_500_000))
    with pytest.raises(VideoError, match=r"\(1\.4 MiB, over video\.fetch_mib=1\)"):
        LocalCopies(str(copies), 1).path("memory://at-once/long.mp4")
    assert list(copies.iterdir()) == held  # nothing went for its sake


def test_a_url_is_decoded_like_a_file(make_clip: MakeClip, tmp_path: Path) -> None:
    path = make_clip("clip.mp4", num_frames=8)
    url = f"file://{path}"
    reader = VideoReader(Video(**SMALL, fetch_dir=str(tmp_path / "copies")), PIXELS)
    from_url, from_file = videos_of(reader.encode([url, path]))
    np.testing.assert_array_equal(from_url.frames, from_file.frames)
    assert from_url.path == url and reader.counts["decoded"] == 1
    with pytest.raises(ConfigError, match=r"set video\.fetch_dir"):
        Encoder(Video(**SMALL), PIXELS).plan(VideoClip(url))
